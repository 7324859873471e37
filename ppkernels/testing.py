"""What the ops are tested on and how exact they must be: one row per op, for tests and benchmarks.
Longer than 350 lines: tables, exact results and the rule are one specification, read together.

`SAMPLES` says what an op is called with, `TOLERANCES` how far its results may lie from the exact
ones, `check_values` compares the two. An op is added by one entry in each table.

The rule: a result may err by twice what plain PyTorch (the reference in the same dtype) errs, plus
a floor. Errors are counted in units in the last place (ULP) of the result's dtype at the exact
value: 2^(floor(log2|exact|) − p + 1) with p bits of precision, and the smallest subnormal number
below the normal range.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import mpmath  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ppkernels import ops, reference
from ppkernels.testing_products import PRODUCTS, check_product
from ppkernels.testing_selection import SELECTIONS, check_selections
from ppkernels.testing_sparse import SPARSE, check_sparse
from ppkernels.testing_statistics import STATISTICS, check_statistics
from ppkernels.testing_steps import TUNED_FOR, check_steps

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# 130 lies beyond the range that kernels are tuned for.
ALPHAS = (1.0, 1.1, 1.25, 1.5, 2.0, 2.7, 3.0, 4.0, 8.0, 130.0)

# An exact result: the nearest float64 and what float64 leaves over.
Exact = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """A shape and a way to lay it out in memory.

    ``arrange`` takes a contiguous tensor of ``shape`` and returns one that is laid out otherwise;
    it may drop or repeat elements, and does so in the same way whatever the elements are.
    """

    name: str
    shape: tuple[int, ...]
    arrange: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)


def _off_by_one(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:1], tensor])[1:]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


LAYOUTS = (
    Layout("0-dim", ()),
    Layout("empty", (0,)),
    Layout("empty 3-dim", (3, 0, 2)),
    Layout("one element", (1,)),
    Layout("odd", (37,)),
    Layout("3-dim", (7, 5, 3)),
    Layout("whole table", (4_999,)),
    Layout("off by one element", (1_003,), _off_by_one),
    Layout("step 2", (1_003,), lambda tensor: tensor[::2]),
    Layout("rows with gaps", (33, 65), lambda tensor: tensor[:, :-2]),
    Layout("transposed", (33, 65), lambda tensor: tensor.t()),
    Layout("permuted with gaps", (5, 6, 8), lambda tensor: tensor.permute(2, 0, 1)[::3]),
    Layout("channels_last", (2, 3, 5, 7), _channels_last),
    Layout("expanded", (65, 33), lambda tensor: tensor[:, :1].expand(65, 33)),
)

# More than a block for each of two threads, and a remainder behind the last vector. It costs as
# much as all the others, so only every third exponent goes through it.
LARGE = Layout("large", (70_001,))


@dataclass(frozen=True)
class Sample:
    """One call of an op and the exact result of it.

    Attributes:
        name: what a failure calls it.
        inputs: the tensors that the op is called with, in order; the last one gives the result its
            shape, dtype and strides.
        exponents: the numbers that follow them.
        exact: the exact result, of the result's shape: float64 and remainder, on the CPU.
        plain_error: what plain PyTorch errs there, in ULP; see `plain_errors`.
        words: those of the mask that it is called with, or None.
    """

    name: str
    inputs: tuple[Tensor, ...]
    exponents: tuple[float, ...]
    exact: Exact
    plain_error: Tensor
    words: Tensor | None = None

    @property
    def options(self) -> dict[str, Tensor]:
        """The keyword arguments of the call."""
        return {} if self.words is None else {"words": self.words}


@dataclass(frozen=True)
class Op:
    """One row of `SAMPLES`.

    Attributes:
        call: the public function, called as ``call(*inputs, *exponents)``, with a mask
            ``call(*inputs, *exponents, words=words)``.
        reference: its specification in pure PyTorch, called in the same way.
        samples: ``samples(dtype, device)`` yields the calls to be checked.
        exponents: the numbers that the samples go through.
        gradients: for each tensor input, the op that is its gradient, called with the incoming
            gradient first; empty for an op that is not differentiable.
        has_out: whether ``call`` takes ``out=``.
        has_mask: whether it takes ``words=``.
    """

    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    samples: Callable[[torch.dtype, str], Iterator[Sample]]
    exponents: tuple[tuple[float, ...], ...]
    gradients: tuple[str, ...] = ()
    has_out: bool = False
    has_mask: bool = False


# ---- values


def special_values(dtype: torch.dtype) -> list[float]:
    """±0, ±inf, NaN, the ends of the subnormal and of the normal range, and 1 with neighbours."""
    info = torch.finfo(dtype)
    largest_subnormal = info.tiny * (1 - info.eps)
    positive = [info.tiny * info.eps, largest_subnormal, info.tiny, info.max]
    positive += [1.0, 1 - info.eps / 2, 1 + info.eps, 0.0, math.inf]
    return [sign * value for value in positive for sign in (1, -1)] + [math.nan]


def random_bits(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of every exponent and either sign, NaN and subnormals among them."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    ends = torch.iinfo(bits)
    # The upper end is excluded, and 2^63 is no int64: the pattern of all ones is a NaN anyway.
    return torch.randint(ends.min, ends.max, (count,), dtype=bits, generator=generator).view(
        dtype
    )  # [count]


@functools.cache
def value_table(dtype: torch.dtype, inputs: int) -> tuple[Tensor, ...]:
    """Columns of values, one per input of an op: special values crossed, then random ones.

    The last column is the weight: half of it is drawn like the weights of a network, half from all
    bit patterns. The others are gradients, drawn from a normal distribution.

    Returns:
        ``inputs`` tensors [R] of ``dtype`` on the CPU; the same at every call.
    """
    generator = torch.Generator().manual_seed(0)
    # float64 results are compared with mpmath, number by number: fewer will do.
    count = 64 if dtype is torch.float64 else 2_048
    gradients = [1.0, 0.0, -0.0, -2.5, math.inf, math.nan]
    crossed = torch.cartesian_prod(
        torch.tensor(special_values(dtype), dtype=torch.float64),
        *[torch.tensor(gradients, dtype=torch.float64)] * (inputs - 1),
    )
    crossed = crossed.reshape(-1, inputs)  # [S, inputs], the weight first
    weights = torch.randn(count, dtype=torch.float64, generator=generator) * 0.3
    columns = [
        torch.cat(
            [
                crossed[:, 1 + column].to(dtype),
                torch.randn(2 * count, generator=generator).to(dtype),
            ]
        )
        for column in range(inputs - 1)
    ]
    bits = random_bits(count, dtype, generator)
    return (*columns, torch.cat([crossed[:, 0].to(dtype), weights.to(dtype), bits]))


# ---- exact results

# |result| from the magnitudes of the inputs, in mpmath numbers. Signs, and what happens at 0, inf
# and NaN, are taken from the reference in float64.
_MAGNITUDES: dict[str, Callable[..., object]] = {
    "power": lambda phi, alpha: phi**alpha,
    "power_backward": lambda g, phi, alpha: g * alpha * phi ** (alpha - 1),
    "power_double_backward": lambda h, g, phi, alpha: (
        h * g * alpha * (alpha - 1) * phi ** (alpha - 2)
    ),
    "inverse_power": lambda theta, alpha: theta ** (1 / alpha),
    "rebase": lambda phi, alpha_from, alpha_to: phi ** (alpha_from / alpha_to),
}


def exact_values(name: str, inputs: tuple[Tensor, ...], exponents: tuple[float, ...]) -> Exact:
    """The exact result of an elementwise op: its reference in float64, or mpmath for float64."""
    alphas = [torch.tensor(exponent, dtype=torch.float64) for exponent in exponents]
    value = SAMPLES[name].reference(*[tensor.double() for tensor in inputs], *alphas)
    remainder = torch.zeros_like(value)
    if inputs[-1].dtype is not torch.float64:
        return value, remainder
    regular = torch.stack([tensor.isfinite() & (tensor != 0) for tensor in inputs]).all(0)
    with mpmath.workprec(160):
        powers = [mpmath.mpf(exponent) for exponent in exponents]
        for row in regular.nonzero().flatten().tolist():
            magnitudes = [mpmath.mpf(abs(tensor[row].item())) for tensor in inputs]
            exact = mpmath.mpf(_MAGNITUDES[name](*magnitudes, *powers))
            nearest = float(exact)
            value[row] = math.copysign(nearest, value[row].item())
            if math.isfinite(nearest):
                remainder[row] = math.copysign(1.0, value[row].item()) * float(exact - nearest)
    return value, remainder


def plain_errors(result: Tensor, exact: Exact) -> Tensor:
    """What plain PyTorch errs, in ULP, as a smooth bound over its ``result`` [R].

    Its error grows with the distance of log2|exact| from 0, but at one element it may be small by
    luck, and it depends on where in memory the element lies. So each element is given the largest
    error of all results that are as close to 1, in powers of two, as its own.
    """
    errors = ulp_errors(result, exact)
    order = torch.frexp(exact[0]).exponent.abs().argsort()
    largest_so_far = torch.empty_like(errors)
    largest_so_far[order] = errors[order].nan_to_num(posinf=0.0).cummax(0).values
    return torch.maximum(errors, largest_so_far)


@functools.cache
def _table(
    name: str, dtype: torch.dtype, inputs: int, exponents: tuple[float, ...]
) -> tuple[Exact, Tensor]:
    """Exact results and errors of plain PyTorch over the whole value table."""
    columns = value_table(dtype, inputs)
    exact = exact_values(name, columns, exponents)
    return exact, plain_errors(SAMPLES[name].reference(*columns, *exponents), exact)


def _masked(sample: Sample) -> Sample:
    """``sample`` under a mask."""
    shape = sample.plain_error.shape
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    *exact, error = (torch.where(mask, part, 0.0) for part in (*sample.exact, sample.plain_error))
    words = ops.pack_bits(mask.to(sample.inputs[-1].device))
    name = f"{sample.name}, masked"
    return replace(sample, name=name, exact=(exact[0], exact[1]), plain_error=error, words=words)


def _elementwise_samples(
    name: str, inputs: int, exponents: tuple[tuple[float, ...], ...], has_mask: bool
) -> Callable[[torch.dtype, str], Iterator[Sample]]:
    """Samples of an op whose result at an element depends on that element of its inputs alone."""

    def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
        columns = [column.to(device) for column in value_table(dtype, inputs)]
        for position, numbers in enumerate(exponents):
            (value, remainder), error = _table(name, dtype, inputs, numbers)
            for layout in (*LAYOUTS, LARGE) if position % 3 == 2 else LAYOUTS:
                rows = torch.arange(math.prod(layout.shape)).reshape(layout.shape) % len(value)
                arranged = [layout.arrange(column[rows.to(device)]) for column in columns]
                rows = layout.arrange(rows)
                expected = ((value[rows], remainder[rows]), error[rows])
                found = [Sample(layout.name, tuple(arranged), numbers, *expected)]
                if inputs > 1 and not arranged[-1].is_contiguous():
                    arranged[:-1] = [gradient.contiguous() for gradient in arranged[:-1]]
                    found += [Sample(f"{layout.name} weight", tuple(arranged), numbers, *expected)]
                yield from found
                # Masks cost as much again, so only every third exponent has them.
                if has_mask and position % 3 == 2:
                    yield from map(_masked, found)

    return samples


def _elementwise(
    name: str,
    inputs: int,
    exponents: tuple[tuple[float, ...], ...],
    gradients: tuple[str, ...] = (),
    has_out: bool = False,
    has_mask: bool = False,
) -> Op:
    samples = _elementwise_samples(name, inputs, exponents, has_mask)
    call, plain = getattr(ops, name), getattr(reference, name)
    return Op(call, plain, samples, exponents, gradients, has_out, has_mask)


_EACH_ALPHA = tuple((alpha,) for alpha in ALPHAS)
_ALPHA_PAIRS = (
    (1.0, 2.0),
    (2.0, 1.0),
    (1.1, 1.1),
    (1.5, 1.1),
    (1.25, 2.7),
    (8.0, 1.25),
    (1.0, 130.0),
)

SAMPLES: dict[str, Op] = {
    "power": _elementwise(
        "power", 1, _EACH_ALPHA, ("power_backward",), has_out=True, has_mask=True
    ),
    "power_backward": _elementwise(
        "power_backward",
        2,
        _EACH_ALPHA,
        ("power_backward", "power_double_backward"),
        has_out=True,
        has_mask=True,
    ),
    "power_double_backward": _elementwise("power_double_backward", 3, _EACH_ALPHA, has_mask=True),
    "inverse_power": _elementwise("inverse_power", 1, _EACH_ALPHA),
    "rebase": _elementwise("rebase", 1, _ALPHA_PAIRS),
}

# Ops on lists of tensors, in place: their cases and their rule are in ppkernels/testing_steps.py.
STEPS = ("sgd_step_", "adam_step_")

# The floors, in ULP. The half types are computed in float32 and rounded once.
_HALF = {torch.bfloat16: 0.51, torch.float16: 0.51}
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "power": {torch.float32: 1.0, torch.float64: 2.0, **_HALF},
    "power_backward": {torch.float32: 3.0, torch.float64: 3.0, **_HALF},
    "power_double_backward": {torch.float32: 6.0, torch.float64: 6.0, **_HALF},
    "inverse_power": {torch.float32: 1.0, torch.float64: 2.0, **_HALF},
    "rebase": {torch.float32: 1.0, torch.float64: 2.0, **_HALF},
}


# ---- comparison


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact down to the smallest subnormal, from its bits."""
    normal = (exponent.clamp(min=-1022) + 1023) << 52
    subnormal = torch.ones_like(exponent) << (exponent.clamp(-1074, -1023) + 1074)
    return torch.where(exponent >= -1022, normal, subnormal).view(torch.float64)


def ulp_errors(result: Tensor, exact: Exact) -> Tensor:
    """How far ``result`` lies from ``exact``, in units in the last place of its dtype.

    Infinity counts as the power of two above the largest finite number (float64: as wrong unless
    exact). Infinite where one of the two is NaN and the other is not, or where the signs differ,
    signs of zeros included.

    Args:
        result: what an op returned, any dtype.
        exact: float64 value and remainder, of ``result``'s shape.

    Returns:
        Errors, float64, of ``result``'s shape.
    """
    info = torch.finfo(result.dtype)
    value, remainder = exact
    came = result.double()
    if result.dtype is not torch.float64:
        beyond = 2.0 ** math.ceil(math.log2(info.max))
        came, value = came.clamp(-beyond, beyond), value.clamp(-beyond, beyond)
    exponent = torch.frexp(value).exponent.long() - 1
    lowest, highest = round(math.log2(info.tiny)), math.ceil(math.log2(info.max)) - 1
    unit = _power_of_two(exponent.clamp(lowest, highest) + round(math.log2(info.eps)))
    errors = ((came - value) - remainder).abs() / unit
    errors = torch.where((came == value) & (remainder == 0), 0.0, errors)
    is_wrong = (came.isnan() != value.isnan()) | (came.signbit() != value.signbit())
    errors = torch.where(is_wrong | errors.isnan(), math.inf, errors)
    return torch.where(came.isnan() & value.isnan(), 0.0, errors)


def check_sample(op: str, sample: Sample, result: Tensor) -> None:
    """Raise AssertionError unless ``result`` is what ``op`` should return for ``sample``.

    Checked are shape, dtype, strides (those of ``torch.empty_like`` of the last input) and every
    element against the exact result, by the rule of this module.
    """
    like = torch.empty_like(sample.inputs[-1])
    called = f"{op}: {like.dtype}, alpha={'→'.join(map(str, sample.exponents))}, {sample.name}"
    for what in ("shape", "dtype", "device"):
        wanted, came = getattr(like, what), getattr(result, what)
        assert came == wanted, f"{called}: {what} should be {wanted}, got {came}"
    assert result.stride() == like.stride(), (
        f"{called}: strides should be {like.stride()}, got {result.stride()}"
    )
    error = ulp_errors(result.cpu(), sample.exact)
    allowed = 2 * sample.plain_error + TOLERANCES[op][like.dtype]
    excess = torch.where(error <= allowed, 0.0, error)
    if not excess.any():
        return
    place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    inputs = ", ".join(f"{tensor[place].item()!r}" for tensor in sample.inputs)
    raise AssertionError(
        f"{called}: at {place}, input {inputs}: got {result[place].item()!r}, exact "
        f"{sample.exact[0][place].item()!r}; the error is {error[place].item():.3g} ULP, allowed "
        f"are {allowed[place].item():.3g} (plain PyTorch errs by "
        f"{sample.plain_error[place].item():.3g}); {int((excess > 0).sum())} of {excess.numel()} "
        f"elements fail"
    )


def check_values(op: str, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raise AssertionError unless ``op`` is right on all of its samples.

    Takes less than two seconds on a CPU, so that a benchmark can call it before it times an op.

    Args:
        op: a name in `SAMPLES`, or one of `STEPS`, `PRODUCTS`, `SPARSE`, `SELECTIONS` or
            `STATISTICS`.
        device: where the op runs; on a GPU, for the exponents that its kernels are tuned for.
        dtypes: the dtypes to go through.

    Errors name op, dtype, exponent, layout or options, index, inputs, and both values.
    """
    if op in STEPS:
        return check_steps(op, device, dtypes)
    if op in PRODUCTS:
        return check_product(op, device, dtypes)
    if op in SPARSE:
        return check_sparse(op, device, dtypes)
    if op in SELECTIONS:
        return check_selections(op, device, dtypes)
    if op in STATISTICS:
        return check_statistics(op, device, dtypes)
    row = SAMPLES[op]
    for dtype in dtypes:
        for sample in row.samples(dtype, device):
            if device != "cpu" and max(sample.exponents) > TUNED_FOR:
                continue
            result = row.call(*sample.inputs, *sample.exponents, **sample.options)
            check_sample(op, sample, result)
