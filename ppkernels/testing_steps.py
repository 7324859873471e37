"""What `sgd_step_` and `adam_step_` are tested on and how exact they must be, for tests and bench.
Longer than 350 lines: cases, exact step and the rule are one specification, read together.

`step_cases` are the options that are gone through, `step_lists` the tensors. `exact_step` takes the
step in φ-space, by the formulas of the ops' docstrings, on float64 tensors or on mpmath's numbers;
`check_step` compares with it, and `check_steps` is what `ppkernels.testing.check_values` calls.

The rule: what φ moves by may err by 8 machine epsilons of itself, plus half a one for each power of
two between |θ| and 1 (a logarithm is rounded there), and twice as much by the chain rule on θ,
which multiplies by two powers, and with the decay of θ on φ, whose exponent is about 2α; the weight
that this gives may err by `FLOORS` units in the last place (ULP) more. A state may err by as much,
without the chain rule's second power, of the terms that it is a sum of. The epsilon of the half
types is float32's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mpmath  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ppkernels import cpu_capability, ops

# A float64 tensor, or one of mpmath's numbers.
Number = Any

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The errors that kernels for GPUs promise are for exponents up to this one.
TUNED_FOR = 8.0
# 130 lies beyond the range that kernels are tuned for.
STEP_ALPHAS: tuple[float, ...] = (1.0, 1.05, 1.25, 1.5, 2.0, 2.5, 3.0, 4.5, 8.0, 16.0, 64.0, 130.0)
FLOORS = {torch.float32: 2.0, torch.float64: 3.0, torch.bfloat16: 0.51, torch.float16: 0.51}

# ---- what is called


@dataclass(frozen=True)
class StepCase:
    """An op with its options, for all weights of a list.

    Attributes:
        name: what a failure calls it.
        op: ``"sgd_step_"`` or ``"adam_step_"``.
        state_count: how many state lists go with it.
        options: its keyword arguments, but for those that `StepLists` has.
    """

    name: str
    op: str
    state_count: int
    options: dict[str, Any] = field(default_factory=dict)


_SGD = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
_ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
_OPTIMIZERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "SGD": ("sgd_step_", 0, _SGD),
    "momentum": ("sgd_step_", 1, {**_SGD, "momentum": 0.9}),
    "dampening": ("sgd_step_", 1, {**_SGD, "momentum": 0.8, "dampening": 0.3}),
    "Nesterov": ("sgd_step_", 1, {**_SGD, "momentum": 0.9, "nesterov": True}),
    "Adam": ("adam_step_", 2, _ADAM),
    "AMSGrad": ("adam_step_", 3, {**_ADAM, "eps": 1e-5}),
}
DECAYS: dict[str, dict[str, Any]] = {
    "no decay": {"weight_decay": 0.0, "decay": "coupled", "decay_of": "theta"},
    **{
        f"{decay} decay of {of}": {"weight_decay": 0.3, "decay": decay, "decay_of": of}
        for decay in ("coupled", "decoupled")
        for of in ("theta", "phi")
    },
}


def step_cases(op: str | None = None) -> Iterator[StepCase]:
    """Every optimizer (of ``op``, if named) with both rules and every kind of weight decay."""
    for name, (op_name, count, own) in _OPTIMIZERS.items():
        if op not in (None, op_name):
            continue
        for rule in ("virtual", "chain"):
            for decay, words in DECAYS.items():
                lr = 0.1 if op_name == "sgd_step_" else 0.01
                options = {"lr": lr, **own, **words, "rule": rule, "maximize": False}
                yield StepCase(f"{name}, {rule}, {decay}", op_name, count, options)


@dataclass
class StepLists:
    """The tensors of a call, one entry for each weight; see `ppkernels.sgd_step_`.

    Attributes:
        states: one list for each state of the optimizer.
        steps: how many steps Adam has taken; empty for SGD.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    steps: list[Tensor]
    alphas: list[float]
    holds_phi: list[bool]

    def map(self, function: Callable[[Tensor], Tensor]) -> StepLists:
        """What ``function`` makes of each weight, gradient and state; counts are copied."""
        return StepLists(
            [function(weight) for weight in self.weights],
            [function(grad) for grad in self.grads],
            [[function(state) for state in states] for states in self.states],
            [step.clone() for step in self.steps],
            self.alphas,
            self.holds_phi,
        )

    def clone(self) -> StepLists:
        """Copies of all tensors."""
        return self.map(torch.clone)


def step_lists(
    case: StepCase,
    dtype: torch.dtype,
    count: int,
    alphas: Sequence[float] = STEP_ALPHAS,
    state_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> StepLists:
    """For each of ``alphas`` weights that hold θ and others that hold φ, ``count`` elements each.

    A third of them is drawn as a network's weights are, a third has any size below 1 that the dtype
    has normal numbers for, a third lies where a step crosses 0. No weight is 0.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> Tensor:
        return torch.randn(count, dtype=torch.float64, generator=generator) * scale

    lists = StepLists([], [], [[] for _ in range(case.state_count)], [], [], [])
    smallest = math.log2(torch.finfo(dtype).tiny)
    for alpha in alphas:
        for holds_phi in (False, True):
            sizes = torch.rand(count, dtype=torch.float64, generator=generator) * smallest
            third = torch.arange(count) % 3
            theta = torch.where(third == 0, sizes.exp2(), normal(0.1))
            # δ is about lr·α|φ|^(α−1) or, by the chain rule, lr·α|φ|^(α−1) or lr.
            theta = torch.where(third == 1, (normal(2).abs() * case.options["lr"]) ** alpha, theta)
            theta = theta.abs().clamp(2.0**smallest, 1e3) * normal(1).sign()
            weight = theta.sign() * theta.abs() ** (1 / alpha) if holds_phi else theta
            states = [normal(0.5), normal(0.5).square() + 1e-6, normal(0.5).square() + 1e-6]
            lists.weights.append(weight.to(device, dtype))
            lists.grads.append(normal(1).to(device, dtype))
            for own, state in zip(lists.states, states, strict=False):
                own.append(state.to(device, state_dtype or dtype))
            if case.op == "adam_step_":
                lists.steps.append(torch.tensor(4.0, device=device))
            lists.alphas.append(alpha)
            lists.holds_phi.append(holds_phi)
    return lists


def take_step(case: StepCase, lists: StepLists, **more: Any) -> None:
    """The public op on ``lists``, in place; ``more`` are further keyword arguments of it."""
    call: Callable[..., None] = getattr(ops, case.op)
    steps = {"steps": lists.steps} if case.op == "adam_step_" else {}
    arguments = {"alphas": lists.alphas, "holds_phi": lists.holds_phi, **steps, **case.options}
    call(lists.weights, lists.grads, *lists.states, **{**arguments, **more})


def stepped(case: StepCase, lists: StepLists, **more: Any) -> StepLists:
    """A copy of ``lists`` after `take_step`."""
    copy = lists.clone()
    take_step(case, copy, **more)
    return copy


# ---- the exact step


@dataclass(frozen=True)
class ExactStep:
    """What a step of one weight gives.

    Attributes:
        weight, states: the new values.
        slack: how far ``weight`` goes where what φ moves by errs as much as it may.
        state_slacks: how far the states may be off, before they are rounded.
    """

    weight: Number
    slack: Number
    states: tuple[Number, ...]
    state_slacks: tuple[Number, ...]


def _power(x: Number, exponent: Number) -> Number:
    return x * abs(x) ** (exponent - 1)


def _log2_size(x: Number) -> Number:
    return x.abs().log2().abs() if isinstance(x, Tensor) else abs(mpmath.log(abs(x), 2))


def _larger(a: Number, b: Number) -> Number:
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)


@dataclass(frozen=True)
class _Sum:
    """A sum, and the sum of its terms' sizes: what a rounding error is relative to."""

    value: Number
    size: Number

    def weighed(self, factor: Number, other: _Sum, other_factor: Number) -> _Sum:
        return _Sum(
            factor * self.value + other_factor * other.value,
            abs(factor) * self.size + abs(other_factor) * other.size,
        )

    def times(self, factor: Number) -> _Sum:
        return _Sum(self.value * factor, self.size * abs(factor))


def _sgd_direction(
    grad: _Sum, states: Sequence[_Sum], count: int, o: dict[str, Any]
) -> tuple[_Sum, list[_Sum]]:
    """u and the new states."""
    if not states:
        return grad, []
    buffer = states[0].weighed(o["momentum"], grad, 1 - o["dampening"])
    return grad.weighed(1, buffer, o["momentum"]) if o["nesterov"] else buffer, [buffer]


def _adam_direction(
    grad: _Sum, states: Sequence[_Sum], count: int, o: dict[str, Any]
) -> tuple[_Sum, list[_Sum]]:
    """As `_sgd_direction`; u takes both bias corrections."""
    beta1, beta2 = o["beta1"], o["beta2"]
    first = states[0].weighed(beta1, grad, 1 - beta1)
    # As m + (1 − β₁)(g − m), it is rounded at the size of m.
    first = _Sum(first.value, first.size + (1 - beta1) * states[0].size)
    # A square errs twice as much as what is squared.
    square = _Sum(grad.value * grad.value, 2 * grad.size * grad.size)
    news = [first, states[1].weighed(beta2, square, 1 - beta2)]
    if len(states) == 3:
        news.append(_Sum(_larger(states[2].value, news[1].value), news[1].size))
    root = (news[-1].value / (1 - beta2**count)) ** 0.5
    u = first.times(1 / ((root + o["eps"]) * (1 - beta1**count)))
    # By how much √v errs of itself, where v is a sum whose terms cancel.
    root_size = root / (root + o["eps"]) * news[-1].size / news[-1].value / 2
    return _Sum(u.value, u.size + abs(u.value) * root_size), news


def _seen_gradient(
    grad: Number, phi: Number, theta: Number, slope: Number, holds_phi: bool, o: dict[str, Any]
) -> _Sum:
    """The gradient that is averaged: with coupled decay, by the chain rule of φ."""
    factor = slope if o["rule"] == "chain" and not holds_phi else 1
    seen = _Sum(grad, abs(grad)).times((-1 if o["maximize"] else 1) * factor)
    if o["decay"] == "decoupled" or o["weight_decay"] == 0:
        return seen
    # λθ is added to ∂L/∂θ; a gradient of φ has it times the slope.
    added = phi if o["decay_of"] == "phi" else theta * (slope if holds_phi else factor)
    return seen.weighed(1, _Sum(added, abs(added)), o["weight_decay"])


def exact_step(
    case: StepCase,
    weight: Number,
    grad: Number,
    states: Sequence[Number],
    count: int,
    alpha: float,
    holds_phi: bool,
    eps: float,
    number: Callable[[float], Number] = float,
) -> ExactStep:
    """One step of a weight that is not 0, taken in φ-space.

    Args:
        weight, grad, states: before the step; float64 tensors, or mpmath's numbers.
        count: which step it is, from 1 on.
        eps: the epsilon that the slacks are for.
        number: what options are converted to: float, or mpmath.mpf.
    """
    o = {key: number(x) if type(x) is float else x for key, x in case.options.items()}
    exponent = number(alpha)
    phi = weight if holds_phi else _power(weight, 1 / exponent)
    theta = _power(phi, exponent)
    slope = exponent * abs(phi) ** (exponent - 1)
    seen = _seen_gradient(grad, phi, theta, slope, holds_phi, o)
    direction = _sgd_direction if case.op == "sgd_step_" else _adam_direction
    u, news = direction(seen, [_Sum(state, abs(state)) for state in states], count, o)

    kept = 1 - o["lr"] * o["weight_decay"] if o["decay"] == "decoupled" else number(1.0)
    keep = kept if o["decay_of"] == "phi" else kept ** (1 / exponent)
    delta = u.times(o["lr"] * (slope if o["rule"] == "virtual" and not holds_phi else 1))
    reach = (8 + _log2_size(theta) / 2) * eps
    if holds_phi and o["decay"] == "coupled" and o["decay_of"] == "theta":
        reach = 2 * reach
    powers = 2 if o["rule"] == "chain" and not holds_phi else 1
    moved, off = keep * phi - delta.value, powers * reach * delta.size
    value, low, high = (
        x if holds_phi else _power(x, exponent) for x in (moved, moved - off, moved + off)
    )
    return ExactStep(
        value,
        _larger(abs(low - value), abs(high - value)),
        tuple(state.value for state in news),
        tuple(reach * state.size for state in news),
    )


# ---- comparison


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of ``dtype`` at ``x``, float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    exponent = exponent.clamp(round(math.log2(info.tiny)), math.ceil(math.log2(info.max)) - 1)
    return torch.ldexp(torch.full_like(x, info.eps), exponent)


def _exact_results(
    case: StepCase, before: StepLists, i: int, after: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For weight and states of entry ``i``: the exact values, their slacks and the errors."""
    tensors = [before.weights[i], before.grads[i], *(states[i] for states in before.states)]
    count = round(before.steps[i].item()) + 1 if before.steps else 1
    more = (count, before.alphas[i], before.holds_phi[i])
    if tensors[0].dtype is not torch.float64:
        weight, grad, *states = [tensor.double().cpu() for tensor in tensors]
        exact = exact_step(case, weight, grad, states, *more, torch.finfo(torch.float32).eps)
        # Infinity counts as the power of two above the largest number.
        limit = 2.0 ** math.ceil(math.log2(torch.finfo(tensors[0].dtype).max))
        for value, slack, came in zip(
            (exact.weight, *exact.states), (exact.slack, *exact.state_slacks), after, strict=True
        ):
            clamped = value.clamp(-limit, limit), came.double().cpu().clamp(-limit, limit)
            yield value, slack.nan_to_num(nan=math.inf), (clamped[0] - clamped[1]).abs()
        return
    rows: list[list[tuple[float, float, float]]] = [[] for _ in after]
    with mpmath.workprec(120):
        for j, numbers in enumerate(zip(*(t.cpu().tolist() for t in tensors), strict=True)):
            weight, grad, *states = [mpmath.mpf(x) for x in numbers]
            exact = exact_step(
                case, weight, grad, states, *more, torch.finfo(torch.float64).eps, mpmath.mpf
            )
            values, slacks = (exact.weight, *exact.states), (exact.slack, *exact.state_slacks)
            for row, value, slack, came in zip(rows, values, slacks, after, strict=True):
                row.append((float(value), float(slack), float(abs(value - came[j].item()))))
    for row in rows:
        value, slack, error = torch.tensor(row, dtype=torch.float64).t()
        yield value, slack, error


def check_step(
    case: StepCase, before: StepLists, after: StepLists, is_reference: bool = False
) -> None:
    """Raise AssertionError unless ``after`` is ``before`` after a step, by the rule of this module.

    Args:
        case: the op and its options.
        before: tensors [N] of finite numbers; no weight is 0.
        after: a clone of ``before`` that the op has stepped.
        is_reference: plain PyTorch has stepped it, whose powers of what is rounded already lose α
            ULP more, and which is allowed four times the slack.
    """
    for i, weight in enumerate(after.weights):
        came = [weight, *(states[i] for states in after.states)]
        names = ["weight", *(f"state {k}" for k in range(case.state_count))]
        for name, tensor, results in zip(
            names, came, _exact_results(case, before, i, came), strict=True
        ):
            exact, slack, error = results
            allowed = slack + FLOORS[tensor.dtype] * _unit(exact, tensor.dtype)
            if is_reference:
                size = torch.maximum(exact.abs(), before.weights[i].double().cpu().abs())
                allowed = 4 * slack + (2 + before.alphas[i]) * _unit(size, tensor.dtype)
            wrong = (~(error <= allowed)).nonzero().flatten().tolist()
            if not wrong:
                continue
            j = max(wrong, key=lambda j: float(error[j] / allowed[j]))
            raise AssertionError(
                f"{case.op}: {case.name}, {tensor.dtype}, alpha={before.alphas[i]}, "
                f"{'phi' if before.holds_phi[i] else 'theta'}: {name} {j} of "
                f"{before.weights[i][j].item()!r}, gradient {before.grads[i][j].item()!r}: got "
                f"{tensor[j].item()!r}, exact {exact[j].item()!r}; the error is "
                f"{error[j].item():.3g}, allowed are {allowed[j].item():.3g}; {len(wrong)} of "
                f"{len(error)} elements fail"
            )


def check_steps(op: str, device: str = "cpu", dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise AssertionError unless ``op`` is right on all of `step_cases`.

    Takes a second on a CPU. float64 is compared number by number, so fewer of them have to do.
    Where the CPU has no compiled kernels, plain PyTorch is held to what it can give. On a GPU,
    float64 goes through the exponents that the kernels are tuned for, and half types have float32
    states: the powers of others are shorter (ops/step/README.md).
    """
    is_reference = device == "cpu" and cpu_capability() == "reference"
    for dtype in dtypes:
        is_double, is_half = dtype is torch.float64, dtype.itemsize == 2
        count, alphas, state_dtype = 3 if is_double else 99, STEP_ALPHAS, dtype
        if device != "cpu":
            alphas = tuple(alpha for alpha in alphas if alpha <= TUNED_FOR or not is_double)
            state_dtype = torch.float32 if is_half else dtype
        for case in step_cases(op):
            if is_half and device != "cpu" and case.state_count == 0:
                continue
            before = step_lists(case, dtype, count, alphas, state_dtype, device=device)
            check_step(case, before, stepped(case, before), is_reference)
