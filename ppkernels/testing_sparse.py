"""What products of sparse weights are tested on and how exact they must be, for tests and bench.
Longer than 350 lines: tables of cases, exact results and the rule are one specification.

The exact results are those of the entries alone, one product per entry, in float64: an entry that
is not kept takes no part, whatever it would be multiplied with. A convolution is the linear layer
of its patches (F.unfold).

The rule: a result may err by twice what the reference in the same dtype errs there, plus a floor:
four units of float32 (float64 beside float64) of the sum of the magnitudes Σ|x·θ|, and the one
rounding of a half type. Not specified are the signs of zeros, and whether the zeros beside an
image, where they meet an infinity or NaN, give NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ppkernels import BitMask, Topology, _backend, ops, reference

LINEAR = ("spmm", "spmm_grad_input", "spmm_grad_values")
CONVOLUTION = ("sparse_conv2d", "sparse_conv2d_grad_input", "sparse_conv2d_grad_values")
SPARSE = LINEAR + CONVOLUTION
IN_KERNELS = (torch.float32, torch.bfloat16)

# ---- which entries are kept: masks [N, K] of a pattern's rows and columns

Pattern = Callable[[int, int], Tensor]


@functools.cache
def share(kept: float) -> Pattern:
    """Entries anywhere, ``kept`` of them."""

    def pattern(rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < kept

    return pattern


ordinary = share(0.3)


def long_row(rows: int, columns: int) -> Tensor:
    """One full row, three single entries, and else nothing."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[rows // 2] = True
    mask[[0, rows // 4, rows - 1], [columns - 1, columns // 2, 0]] = True
    return mask


def long_column(rows: int, columns: int) -> Tensor:
    """One full column, three single entries, and else nothing."""
    return long_row(columns, rows).t()


def few(rows: int, columns: int) -> Tensor:
    """Forty entries, the corners among them."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    mask.view(-1)[torch.randperm(rows * columns, generator=generator)[:36]] = True
    mask[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    return mask


# ---- how an operand lies in memory

Layout = Callable[[Tensor], Tensor]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """First and last dimension swapped in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def with_gaps(tensor: Tensor) -> Tensor:
    """Every second element of a larger tensor, from the second on."""
    wide = tensor.new_full((*tensor.shape, 2), torch.nan)
    wide[..., 1] = tensor
    return wide[..., 1]


def in_rows_with_gaps(tensor: Tensor) -> Tensor:
    """Rows of a wider tensor."""
    return F.pad(tensor, (1, 2), value=torch.nan)[..., 1:-2]


def unaligned(tensor: Tensor) -> Tensor:
    """Beginning one element behind an aligned address, at the end of its memory."""
    return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)


def repeated(tensor: Tensor) -> Tensor:
    """The first of the batch, expanded."""
    return tensor[:1].expand(tensor.shape)


def constant(tensor: Tensor) -> Tensor:
    """One number, expanded: what the gradient of a sum is."""
    return tensor.flatten()[:1].view((1,) * tensor.dim()).expand(tensor.shape)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


# ---- the cases


@dataclass(frozen=True)
class SparseCase:
    """A sparse weight and what it meets.

    Attributes:
        name: what a failure calls it.
        shape: the weight's: [N, K], or [N, C, H, W].
        batch: a linear layer's leading dimensions; of a convolution (B, Y, X).
        pattern: which entries are kept.
        layout: how input, gradient and values lie in memory.
        bias: the dtype of a bias; None, no bias.
        special: whether ±0, subnormal numbers, ±inf and NaN are among the operands; a
            convolution's values are finite.
        stride, padding, dilation: of a convolution.
    """

    name: str
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    pattern: Pattern = ordinary
    layout: Layout = contiguous
    bias: torch.dtype | None = None
    special: bool = False
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def topology(self) -> Topology:
        """Made once for each shape and pattern."""
        return _topology(self.shape, self.pattern)

    @property
    def is_convolution(self) -> bool:
        return len(self.shape) == 4

    @property
    def moves(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Stride, padding and dilation, in the order of the ops."""
        return self.stride, self.padding, self.dilation

    @property
    def input_shape(self) -> tuple[int, ...]:
        if not self.is_convolution:
            return (*self.batch, self.shape[1])
        return (self.batch[0], self.shape[1], *self.batch[1:])

    @property
    def output_shape(self) -> tuple[int, ...]:
        if not self.is_convolution:
            return (*self.batch, self.shape[0])
        places = zip(self.batch[1:], self.shape[2:], *self.moves, strict=True)
        size = [(y + 2 * p - d * (k - 1) - 1) // s + 1 for y, k, s, p, d in places]
        return (self.batch[0], self.shape[0], *size)


@functools.cache
def _topology(shape: tuple[int, ...], pattern: Pattern) -> Topology:
    mask = pattern(shape[0], math.prod(shape[1:]))
    return Topology.of_mask(BitMask.pack(mask.reshape(shape)))


_BATCHES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 100, 200)
_LEADING = ((), (2, 3), (4, 1, 5), (0, 3), (2, 0, 3))
_WEIGHTS = ((0, 7), (7, 0), (0, 0), (1, 1), (1, 50), (50, 1), (33, 65), (64, 128))
_LAYOUTS = (transposed, with_gaps, in_rows_with_gaps, unaligned, repeated, constant)
# Layouts that a vector cannot have, or that would make all values equal.
_OF_BATCHES = (channels_last, repeated, constant)
_BIASES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, None)


def _linear_cases() -> Iterator[SparseCase]:
    for batch in _BATCHES:
        bias = _BIASES[batch % len(_BIASES)]
        yield SparseCase(f"batch {batch}", (13, 37), (batch,), bias=bias)
    for leading in _LEADING:
        yield SparseCase(f"leading {leading}", (5, 9), leading, bias=torch.float32)
    for shape in _WEIGHTS:
        yield SparseCase(f"weight {shape}", shape, (5,), bias=torch.float32)
    for batch in (1, 5, 70):
        yield SparseCase("no entries", (20, 30), (batch,), share(0.0), bias=torch.float32)
        yield SparseCase("all entries", (20, 30), (batch,), share(1.0))
        yield SparseCase("one long row", (40, 3000), (batch,), long_row, bias=torch.float32)
        yield SparseCase("one long column", (3000, 40), (batch,), long_column)
        for layout in _LAYOUTS:
            yield SparseCase(layout.__name__, (13, 37), (batch,), layout=layout, bias=torch.float32)
        yield SparseCase("special values", (13, 37), (batch,), special=True)
    for columns in (65535, 65536, 65537):
        yield SparseCase(f"{columns} columns", (3, columns), (17,), few)
        yield SparseCase(f"{columns} columns", (2, columns), (1,), few)
    yield SparseCase("65537 rows", (65537, 2), (3,), few)
    yield SparseCase("permuted", (13, 37), (3, 5, 4), layout=transposed)
    yield SparseCase("larger", (300, 400), (70,), share(0.1), bias=torch.float32)


# Kernel, image, stride, padding, dilation.
_GEOMETRIES = (
    ((1, 1), (7, 7), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (14, 14), (2, 2), (0, 0), (1, 1)),
    ((1, 1), (5, 6), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (5, 6), (2, 2), (2, 2), (1, 1)),
    ((3, 3), (7, 7), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (14, 14), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (14, 14), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (15, 17), (1, 2), (2, 0), (1, 1)),
    ((3, 3), (15, 17), (3, 3), (0, 0), (1, 1)),
    ((3, 3), (4, 70), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (3, 130), (1, 2), (0, 1), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (6, 5), (1, 1), (5, 4), (1, 1)),
    ((3, 3), (6, 5), (2, 3), (5, 4), (1, 1)),
    ((3, 3), (9, 8), (1, 1), (2, 2), (2, 2)),
    ((3, 3), (9, 8), (2, 1), (1, 3), (1, 3)),
    ((5, 5), (15, 17), (1, 1), (2, 2), (1, 1)),
    ((5, 5), (14, 14), (2, 2), (2, 2), (1, 1)),
    ((5, 5), (7, 9), (3, 3), (1, 1), (1, 1)),
    ((2, 3), (7, 7), (1, 1), (1, 1), (1, 1)),
    ((2, 3), (8, 9), (2, 2), (2, 0), (1, 1)),
    ((3, 1), (8, 9), (3, 2), (0, 0), (2, 1)),
)


def _convolution_cases() -> Iterator[SparseCase]:
    for kernel, image, stride, padding, dilation in _GEOMETRIES:
        moves = f"stride {stride}, padding {padding}, dilation {dilation}"
        name = f"kernel {kernel}, image {image}, {moves}"
        base = SparseCase(name, (6, 5, *kernel), (2, *image))
        base = replace(base, stride=stride, padding=padding, dilation=dilation)
        yield base
        yield replace(base, name=f"special values, {base.name}", special=True)
    padded = SparseCase("", (6, 5, 3, 3), (2, 9, 11), padding=(1, 1), bias=torch.float32)
    strided = replace(padded, stride=(2, 2), bias=torch.bfloat16)
    pointwise = SparseCase("", (6, 5, 1, 1), (2, 9, 11), bias=torch.float64)
    for base in (padded, strided, pointwise):
        how = f"{base.shape[2:]}, stride {base.stride}"
        for batch in ((0, 9, 11), (1, 9, 11), (3, 9, 11), (9, 5, 4)):
            yield replace(base, name=f"batch {batch}, {how}", batch=batch)
        for layout in (*_LAYOUTS, channels_last):
            yield replace(base, name=f"{layout.__name__}, {how}", layout=layout)
        yield replace(base, name=f"no entries, {how}", pattern=share(0.0))
        yield replace(base, name=f"all entries, {how}", pattern=share(1.0))
        lengthy = (20, 300, *base.shape[2:])
        yield replace(base, name=f"one long row, {how}", shape=lengthy, pattern=long_row)
        lengthy = (300, 20, *base.shape[2:])
        yield replace(base, name=f"one long column, {how}", shape=lengthy, pattern=long_column)
        larger = (40, 33, *base.shape[2:])
        yield replace(base, name=f"larger, {how}", shape=larger, pattern=share(0.1))
        single = (1, 1, *base.shape[2:])
        yield replace(base, name=f"one channel, {how}", shape=single, pattern=share(1.0))
        wide = (4, 3, *base.shape[2:])
        yield replace(base, name=f"56x56, {how}", shape=wide, batch=(1, 56, 56))
    small = replace(padded, batch=(2, 3, 3), pattern=few)
    yield replace(small, name="65538 columns", shape=(2, 7282, 3, 3))
    yield replace(small, name="65538 rows and taps", shape=(7282, 2, 3, 3))


@functools.cache
def sparse_cases(op: str) -> tuple[SparseCase, ...]:
    """The cases of an op of `SPARSE`."""
    return tuple(_linear_cases() if op in LINEAR else _convolution_cases())


# ---- the tensors of a case


@dataclass(frozen=True)
class SparseCall:
    """The tensors that a case's op meets: values [E], input, ∂L/∂y, and a bias or None."""

    case: SparseCase
    topology: Topology
    values: Tensor
    input: Tensor
    grad_output: Tensor
    bias: Tensor | None

    def run(self, op: str) -> Tensor:
        """What the public function gives."""
        call: Callable[..., Tensor] = getattr(ops, op)
        moves = self.case.moves if self.case.is_convolution else ()
        if op.endswith("grad_input"):
            size = (self.case.batch[1:],) if self.case.is_convolution else ()
            return call(self.grad_output, self.values, self.topology, *size, *moves)
        if op.endswith("grad_values"):
            dtype = self.values.dtype
            return call(self.grad_output, self.input, self.topology, *moves, dtype=dtype)
        return call(self.input, self.values, self.topology, self.bias, *moves)

    def raw(self, op: str) -> list[Tensor | Sequence[int] | None]:
        """The arguments of the raw op, and of its reference."""
        topology, is_convolution = self.topology, self.case.is_convolution
        geometry = [list(pair) for pair in (self.case.shape[2:], *self.case.moves)]
        geometry = geometry if is_convolution else []
        if op.endswith("grad_input"):
            size = [list(self.case.batch[1:])] if is_convolution else []
            return [self.grad_output, self.values, *topology.transposed(), *size, *geometry]
        indices = (topology.offsets, topology.columns)
        if op.endswith("grad_values"):
            return [self.grad_output, self.input, self.values, *indices, *geometry]
        return [self.input, self.values, *indices, self.bias, *geometry]

    def plain(self, op: str) -> Tensor:
        """What the reference gives."""
        plain: Callable[..., Tensor] = getattr(reference, op)
        return plain(*self.raw(op))


def _strewn(tensor: Tensor, generator: torch.Generator, finite: bool) -> Tensor:
    """``tensor`` with special values at some places, or the finite ones of them."""
    info = torch.finfo(tensor.dtype)
    numbers = [0.0, -0.0, info.tiny / 4, -info.tiny, info.tiny * info.eps]
    numbers += [] if finite else [math.inf, -math.inf, math.nan]
    special = torch.tensor(numbers, dtype=torch.float64).to(tensor.dtype)
    flat = tensor.flatten()
    at = torch.randperm(len(flat), generator=generator)[: max(8, len(flat) // 200)]
    flat[at] = special[torch.arange(len(at)) % len(special)]
    return flat.view(tensor.shape)


def sparse_call(
    case: SparseCase, dtype: torch.dtype, values_dtype: torch.dtype, device: str = "cpu"
) -> SparseCall:
    """Random tensors for ``case``, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int], dtype: torch.dtype, finite: bool = False) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(dtype)
        return _strewn(tensor, generator, finite) if case.special else tensor

    def lay(tensor: Tensor, layout: Layout) -> Tensor:
        return layout(tensor.to(device)) if tensor.numel() else tensor.to(device)

    values = draw((case.topology.count(),), values_dtype, case.is_convolution)
    x, g = draw(case.input_shape, dtype), draw(case.output_shape, dtype)
    bias = None if case.bias is None else draw(case.shape[:1], case.bias)
    of_vectors = contiguous if case.layout in _OF_BATCHES else case.layout
    return SparseCall(
        case,
        case.topology.to(device),
        lay(values, of_vectors),
        lay(x, case.layout),
        lay(g, case.layout),
        None if bias is None else lay(bias, of_vectors),
    )


# ---- exact results


def _summed(terms: Tensor, places: Tensor, size: int) -> Tensor:
    """The terms [M, E] of each of ``size`` places, added up: [M, size]."""
    return terms.new_zeros(len(terms), size).index_add(1, places, terms)


def _unfolded(call: SparseCall, image: Tensor) -> Tensor:
    """The patches of images [B, C, Y, X]: [B·Y'·X', K]."""
    case = call.case
    patches = F.unfold(image, case.shape[2:], case.dilation, case.padding, case.stride)
    return patches.transpose(1, 2).reshape(-1, call.topology.in_features)


def _as_matrix(call: SparseCall, output: Tensor) -> Tensor:
    """[..., N] or [B, N, Y', X'] with everything but N in rows."""
    last = output.movedim(1, -1) if call.case.is_convolution else output
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1])


def _entry_by_entry(call: SparseCall, op: str) -> Tensor:
    """The result of ``op``, one product for each entry and place."""
    case, topology = call.case, call.topology
    rows = topology.places() // max(topology.in_features, 1)
    columns = topology.places() - rows * topology.in_features
    if op.endswith("grad_input"):
        terms = _as_matrix(call, call.grad_output)[:, rows] * call.values
        summed = _summed(terms, columns, topology.in_features)
        if not case.is_convolution:
            return summed.view(case.input_shape)
        places = math.prod(case.output_shape[2:])
        by_image = summed.view(case.batch[0], places, topology.in_features).transpose(1, 2)
        size, kernel = case.batch[1:], case.shape[2:]
        return F.fold(by_image, size, kernel, case.dilation, case.padding, case.stride)
    x = _unfolded(call, call.input) if case.is_convolution else _as_matrix(call, call.input)
    if op.endswith("grad_values"):
        return (_as_matrix(call, call.grad_output)[:, rows] * x[:, columns]).sum(0)
    y = _summed(x[:, columns] * call.values, rows, topology.rows)
    if call.bias is not None:
        y = y + call.bias
    if not case.is_convolution:
        return y.view(case.output_shape)
    shape = case.output_shape
    return y.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _wide(call: SparseCall, change: Callable[[Tensor], Tensor]) -> SparseCall:
    """The call with ``change`` of its tensors, in float64 on the CPU."""
    values, x, g = (
        change(tensor.cpu().double()) for tensor in (call.values, call.input, call.grad_output)
    )
    bias = None if call.bias is None else change(call.bias.cpu().double())
    return SparseCall(call.case, call.case.topology, values, x, g, bias)


def exact_result(call: SparseCall, op: str) -> tuple[Tensor, Tensor]:
    """The exact result of ``op``, and the sum of the magnitudes of its terms: float64, CPU."""
    finite = _wide(call, lambda tensor: tensor.nan_to_num(0.0, 0.0, 0.0).abs())
    return _entry_by_entry(_wide(call, lambda tensor: tensor), op), _entry_by_entry(finite, op)


# ---- comparison


def has_kernel(op: str, call: SparseCall) -> bool:
    """Whether ``op`` runs on a kernel here, which never sees the entries that are not kept."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[call.values.device.type]
    dtypes = {call.values.dtype, call.input.dtype}
    return (
        dtypes <= {*IN_KERNELS}
        and not _backend.uses_reference()
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"ppkernels::{op}", key)
    )


def _may_be_nan(call: SparseCall, op: str, plain: Tensor) -> Tensor | bool:
    """Where NaN may stand in place of a finite or infinite number."""
    if not has_kernel(op, call):
        return plain.isnan()
    if op != "sparse_conv2d_grad_values":
        return False
    # Whatever is beside the image meets the other image's values, infinite ones too.
    from_output, from_input = (
        ~tensor.cpu().isfinite().flatten(2).all(2).all(0)
        for tensor in (call.grad_output, call.input)
    )
    places = call.case.topology.places()
    taps = math.prod(call.case.shape[2:])
    row, channel = places // call.case.topology.in_features, places // taps % call.case.shape[1]
    return from_output[row] | from_input[channel]


def check_sparse_call(call: SparseCall, op: str, result: Tensor) -> None:
    """Raise AssertionError unless ``result`` is what ``op`` should give for ``call``."""
    case, dtype = call.case, call.input.dtype
    called = f"{op}: {dtype} beside values of {call.values.dtype}, {case.name}, batch {case.batch}"
    exact, magnitude = exact_result(call, op)
    wanted_dtype = call.values.dtype if op.endswith("grad_values") else dtype
    wanted = (exact.shape, wanted_dtype, call.values.device)
    came = (result.shape, result.dtype, result.device)
    assert came == wanted, f"{called}: wanted {wanted}, got {came}"
    assert result.is_contiguous(), f"{called}: strides {result.stride()} of {tuple(result.shape)}"
    wide, out = (torch.finfo(torch.promote_types(dtype, torch.float32)), torch.finfo(wanted_dtype))
    plain, found = call.plain(op).cpu().double(), result.cpu().double()
    # Below the normal range each product and the result are rounded to a fixed place.
    underflow = case.topology.numel() * wide.tiny * wide.eps + out.tiny * out.eps
    floor = 4 * wide.eps * magnitude + underflow
    rounding = 0.51 * out.eps if out.bits == 16 else 0.0
    plain_error = (plain - exact).abs().nan_to_num(0.0, 0.0)
    error, allowed = (found - exact).abs(), 2 * plain_error + floor + rounding * exact.abs()
    is_right = (error <= allowed) | (found == exact) | (found.isnan() & exact.isnan())
    is_right |= found.isinf() & (found == exact.to(wanted_dtype).double())
    is_right |= found.isnan() & _may_be_nan(call, op, plain)
    if op == "sparse_conv2d_grad_values":
        # Without the zeros beside the image, as the reference may leave them out.
        is_close = (found - plain).abs() <= floor + rounding * plain.abs()
        is_right |= exact.isnan() & (is_close | (found == plain))
    if is_right.all():
        return
    place = tuple(int(i) for i in torch.unravel_index((~is_right).int().argmax(), exact.shape))
    raise AssertionError(
        f"{called}: at {place}: got {found[place].item()!r}, exact {exact[place].item()!r}; "
        f"off by {error[place].item():.3g}, allowed are {allowed[place].item():.3g}; "
        f"{int((~is_right).sum())} of {exact.numel()} elements fail"
    )


def check_sparse(op: str, device: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise AssertionError unless a product of sparse weights is right in all of its cases.

    Values have the operands' dtype, and once another that goes with it.
    """
    others = {torch.float32: torch.bfloat16, torch.float64: torch.float64}
    for dtype in dtypes:
        for own in dict.fromkeys((dtype, others.get(dtype, torch.float32))):
            for case in sparse_cases(op):
                call = sparse_call(case, dtype, own, device)
                check_sparse_call(call, op, call.run(op))
