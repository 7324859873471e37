"""Tests of the Triton kernels of op `step`, run in a process of their own.
Longer than 350 lines: one process costs seconds to start, so all cases share it.

With TRITON_INTERPRET=1 they run on CPU tensors in Triton's interpreter, else on the current GPU.
The interpreter must be chosen before triton is imported, hence the process, which
test_step_triton.py starts, and a name that pytest does not collect by itself.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops.step import gpu, kept, reference, table
from ppkernels.testing_steps import StepLists, check_step, step_cases, step_lists

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SGD, MOMENTUM, NESTEROV, ADAM, AMSGRAD = "sgd", "momentum", "nesterov", "adam", "amsgrad"
OPTIMIZERS = {SGD: 0, MOMENTUM: 1, NESTEROV: 1, ADAM: 2, AMSGRAD: 3}
DECAYS = list(itertools.product(("coupled", "decoupled"), ("theta", "phi")))
CASES = {case.name: case for case in step_cases()}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# One element, few, a block and a bit, none, and several words of mask; the third and fourth hold φ.
SHAPES = ((1,), (37,), (1030,), (6, 7), (0,), (13, 40))
ALPHAS = (3.0, 1.0, 1.5, 1.25, 2.0, 2.0)
HOLDS_PHI = (0, 0, 0, 1, 0, 0)


@pytest.fixture(autouse=True)
def _silence_numpy():
    # The interpreter computes discarded lanes too, and numpy would warn of their overflow.
    with np.errstate(all="ignore"):
        yield


@dataclass
class Call:
    """The arguments of a step."""

    optimizer: str
    weights: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    alphas: list[float]
    holds_phi: list[int] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    # Those of the masks, where every run is to be given the same tensors.
    words: list[Tensor] = field(default_factory=list)
    rule: str = "virtual"
    decay: tuple[str, str] = ("coupled", "theta")
    weight_decay: float = 0.0
    lr: float | Tensor = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    maximize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def run(self) -> None:
        words = [self.weight_decay, *self.decay, self.rule, self.maximize]
        none = torch.empty(0, dtype=torch.uint8, device=DEVICE)
        is_number = not isinstance(self.lr, Tensor)
        shared = [
            self.masters,
            self.words or [none if mask is None else words_of(mask) for mask in self.masks],
            [torch.as_tensor(a, dtype=torch.float64, device=DEVICE) for a in self.alphas],
            self.holds_phi,
            torch.tensor(self.lr, dtype=torch.float64) if is_number else self.lr,
        ]
        words += [self.grad_scale, self.found_inf]
        if self.optimizer in (ADAM, AMSGRAD):
            states = [*self.states, []][:3]
            gpu.adam_step_(
                *(self.weights, self.grads, *states, self.steps),
                *(*shared, *self.betas, self.eps, *words),
            )
            return
        buffers = self.states[0] if self.states else []
        options = [0.9, 0.2, self.optimizer == NESTEROV]
        gpu.sgd_step_(self.weights, self.grads, buffers, *shared, *options, *words)

    def copy(self) -> Call:
        def copies(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.clone() for tensor in tensors]

        return replace(
            self,
            weights=copies(self.weights),
            states=[copies(states) for states in self.states],
            steps=copies(self.steps),
            masters=copies(self.masters),
        )

    def form(self, i: int) -> reference.Form:
        holds_phi = bool(self.holds_phi and self.holds_phi[i])
        factor = -1.0 if self.maximize else 1.0
        if self.grad_scale is not None:
            factor /= self.grad_scale.item()
        decay = (float(self.lr), self.weight_decay, *self.decay)
        return reference.Form(float(self.alphas[i]), holds_phi, self.rule, *decay, factor)

    def expected(self, i: int) -> list[Tensor]:
        """Weight i and its states after the step, in float64."""
        start = self.masters[i] if self.masters else self.weights[i]
        weight, grad = start.double(), self.grads[i].double()
        states = [states[i].double() for states in self.states]
        mask = self.masks[i] if self.masks else None
        form = self.form(i)
        if self.optimizer in (ADAM, AMSGRAD):
            first, second, largest = [*states, None][:3]
            count = self.steps[i].item() + 1
            moments = (first, second, largest, count, mask, form)
            result = reference.adam_step(weight, grad, *moments, *self.betas, self.eps)
        else:
            buffer = states[0] if states else None
            nesterov = self.optimizer == NESTEROV
            result = reference.sgd_step(weight, grad, buffer, mask, form, 0.9, 0.2, nesterov)
        return [tensor for tensor in result if tensor is not None]


def words_of(mask: Tensor) -> Tensor:
    """A mask's words by NumPy."""
    flat = mask.cpu().contiguous().numpy().reshape(-1)
    return torch.from_numpy(np.packbits(flat, bitorder="little")).to(DEVICE)


def same_bits(result: Tensor, expected: Tensor) -> bool:
    integers = INTEGERS[expected.element_size()]
    return torch.equal(result.contiguous().view(integers), expected.contiguous().view(integers))


def tensors_like(shape: tuple[int, ...], random: torch.Generator, count: int) -> list[Tensor]:
    """A weight of many sizes, a gradient and ``count`` states.

    All have the weight's sign: what is added up does not cancel, so that errors can be judged by
    the result's own size. Nothing is said by this of the weight's own step, which may be as large.
    """
    size = torch.randn(shape, generator=random).abs()
    # Tiny weights, and steps that are larger than the weight.
    tiny = torch.rand(shape, generator=random) < 0.1
    size = torch.where(tiny, size * 2.0 ** -torch.randint(1, 60, shape, generator=random), size)
    sign = torch.where(torch.rand(shape, generator=random) < 0.5, -1.0, 1.0)
    rest = [torch.randn(shape, generator=random).abs() for _ in range(1 + count)]
    return [size * sign, *(tensor * sign for tensor in rest)]


def call_of(
    optimizer: str,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    masked: bool = True,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    **options: Any,
) -> Call:
    """A step of weights of all kinds; every second one is masked."""
    random = torch.Generator().manual_seed(1)
    count = OPTIMIZERS[optimizer]
    columns = [tensors_like(shape, random, count) for shape in shapes]
    weights, grads, *states = (
        [t.to(DEVICE) for t in column] for column in zip(*columns, strict=True)
    )
    if optimizer in (ADAM, AMSGRAD):
        states[1:] = [[t.abs() for t in column] for column in states[1:]]
    masks = [torch.rand(shape, generator=random) < 0.6 for shape in shapes]
    call = Call(
        optimizer,
        [weight.to(dtype) for weight in weights],
        [grad.to(dtype) for grad in grads],
        [[state.to(state_dtype or dtype) for state in column] for column in states],
        list(ALPHAS[: len(shapes)]),
        list(HOLDS_PHI[: len(shapes)]),
        [torch.tensor(float(2 + i), device=DEVICE) for i in range(len(shapes))],
        masks=[mask.to(DEVICE) if i % 2 else None for i, mask in enumerate(masks)]
        if masked
        else [],
    )
    return replace(call, **options)


def allowed_error(call: Call, i: int, exact: Tensor) -> Tensor:
    """What a weight may be off by: 2^-20 of φ's step, and some roundings of the result."""
    start = (call.masters or call.weights)[i].double()
    if call.weights[i].dtype == torch.float64:  # and the reference rounds as well
        return 2.0**-48 * call.alphas[i] * (exact.abs() + (exact - start).abs())
    step = 2.0**-20 * call.alphas[i] * (exact - start).abs()
    return 2.0**-22 * exact.abs() + step + 1e-44


def rounding_of(dtype: torch.dtype) -> tuple[float, float]:
    """What one rounding to a half type adds: relative to a normal number, and absolute."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 0.0, 0.0
    info = torch.finfo(dtype)
    # Triton's interpreter cuts float32 off where it should round to bfloat16, whose subnormal
    # numbers it takes for 0; that compiled kernels round is read off their code
    # (test_step_triton.py).
    if INTERPRETED and dtype is torch.bfloat16:
        return info.eps, info.tiny
    return info.eps / 2, info.tiny * info.eps / 2


def check(call: Call) -> None:
    """Runs the step and compares everything with the reference in float64."""
    before = call.copy()
    call.run()
    for i in range(len(call.weights)):
        stepped, *states = before.expected(i)
        error = allowed_error(before, i, stepped)
        if call.masters:
            assert ((call.masters[i].double() - stepped).abs() <= error).all(), f"master {i}"
        relative, absolute = rounding_of(call.weights[i].dtype)
        error = error + relative * stepped.abs() + absolute
        assert ((call.weights[i].double() - stepped).abs() <= error).all(), f"weight {i}"
        for k, (column, exact) in enumerate(zip(call.states, states, strict=True)):
            relative, absolute = rounding_of(column[i].dtype)
            share = relative + (1e-15 if column[i].dtype == torch.float64 else 2**-20)
            error = share * exact.abs() + absolute + 1e-44
            assert ((column[i].double() - exact).abs() <= error).all(), f"state {k} of {i}"
        if call.masks and call.masks[i] is not None:
            frozen = ~call.masks[i]
            assert same_bits(call.weights[i][frozen], before.weights[i][frozen])
            columns, olds = [*call.states, call.masters], [*before.states, before.masters]
            for column, old in zip(columns, olds, strict=True):
                assert not column or same_bits(column[i][frozen], old[i][frozen])
    if call.optimizer in (ADAM, AMSGRAD):
        assert [s.item() for s in call.steps] == [s.item() + 1 for s in before.steps]


# ---- against the reference


@pytest.mark.parametrize("decay", DECAYS, ids="-".join)
@pytest.mark.parametrize("rule", ["virtual", "chain"])
# Nesterov's momentum and AMSGrad see the gradient that these see; with decay they are below.
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM])
def test_single_precision(optimizer, rule, decay):
    check(call_of(optimizer, rule=rule, decay=decay, weight_decay=0.3))


@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_masks_and_no_decay(optimizer, rule):
    check(call_of(optimizer, rule=rule, masked=False, holds_phi=[]))


@pytest.mark.parametrize("decay", [DECAYS[0], DECAYS[3]], ids="-".join)
@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("optimizer", [MOMENTUM, AMSGRAD])
def test_double_precision(optimizer, rule, decay):
    shapes = SHAPES[:4]
    options = {"rule": rule, "decay": decay, "weight_decay": 0.3, "shapes": shapes}
    check(call_of(optimizer, torch.float64, **options))


@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("optimizer", [NESTEROV, ADAM])
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=["half_states", "wide_states"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, state_dtype, optimizer, rule):
    # Above fp16's subnormal numbers, where the chain rule's gradient is a matter of rounding.
    options = {"rule": rule, "weight_decay": 0.1, "lr": 0.01, "decay": DECAYS[2]}
    check(call_of(optimizer, dtype, state_dtype, **options))


@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, AMSGRAD])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters(dtype, optimizer, rule):
    call = call_of(optimizer, dtype, torch.float32, rule=rule, weight_decay=0.1, lr=0.01)
    # Copies that the weight says less than, though cut off it is the weight.
    call.masters = [
        weight.float() * (1 + torch.finfo(dtype).eps / 8 * torch.rand(weight.shape).to(DEVICE))
        for weight in call.weights
    ]
    # Where that is below the half type's normal numbers, the weight is its copy.
    call.masters = [
        torch.where(m.to(dtype) == w, m, w.float())
        for m, w in zip(call.masters, call.weights, strict=True)
    ]
    check(call)
    assert all(master.dtype == torch.float32 for master in call.masters)
    if dtype is torch.float16:
        for master, weight in zip(call.masters, call.weights, strict=True):
            assert torch.equal(master.half(), weight)


def test_an_overwritten_weight_counts_and_not_its_master():
    call = call_of(MOMENTUM, torch.float16, torch.float32, masked=False)
    call.masters = [torch.full(w.shape, 7.0, device=DEVICE) for w in call.weights]
    plain = call.copy()
    plain.masters = [weight.float() for weight in plain.weights]
    call.run()
    plain.run()
    for mine, other in zip(call.masters + call.weights, plain.masters + plain.weights, strict=True):
        assert same_bits(mine, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_frozen_master_keeps_its_bits_beside_an_overwritten_weight(dtype):
    weight = torch.full((20,), 3.0, dtype=dtype, device=DEVICE)
    master = torch.full((20,), 7.0, device=DEVICE)
    mask = torch.arange(20, device=DEVICE) % 3 == 0
    Call(SGD, [weight], [weight.clone()], [], [1.5], masters=[master], masks=[mask]).run()
    assert (master[~mask] == 7.0).all()
    assert (weight[~mask] == 3.0).all()
    assert (master[mask] < 3.0).all()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM])
def test_loss_scale_and_maximize(optimizer, maximize):
    scale = torch.tensor(1024.0, device=DEVICE)
    call = call_of(optimizer, maximize=maximize, grad_scale=scale)
    sign = -1.0 if maximize else 1.0
    call.grads = [grad * (1024.0 * sign) for grad in call.grads]
    check(call)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (0.99, 0.9999)])
@pytest.mark.parametrize("count", [0, 1, 9, 999, 70_000, 2**20])
def test_bias_corrections(betas, count):
    call = call_of(ADAM, shapes=((500,),), betas=betas, masked=False)
    call.steps = [torch.tensor(float(count), device=DEVICE)]
    call.states[0] = [torch.zeros_like(call.weights[0])]  # β₁ = 0 would cancel it
    check(call)


def test_several_dtypes_in_one_call():
    calls = [call_of(ADAM, dtype) for dtype in (torch.float16, torch.float32, torch.float64)]
    order = [(call, i) for i in range(len(SHAPES)) for call in calls]

    def gathered(name: str) -> list[Any]:
        return [getattr(call, name)[i] for call, i in order]

    joined = replace(
        calls[0],
        **{name: gathered(name) for name in ("weights", "grads", "alphas", "holds_phi", "masks")},
        states=[[call.states[k][i] for call, i in order] for k in range(2)],
        steps=[step.clone() for step in gathered("steps")],
    )
    check(joined)


def test_more_weights_than_are_looked_through_at_once():
    random = torch.Generator().manual_seed(0)
    count = 300
    # Most have no elements: a program costs the interpreter some 20 ms.
    drawn = torch.randint(1, 20, (count,), generator=random).tolist()
    sizes = [0 if i % 8 else size for i, size in enumerate(drawn)]
    sizes[3] = sizes[200] = 1030
    weights = [torch.randn(size, generator=random).to(DEVICE) for size in sizes]
    grads = [torch.randn(size, generator=random).to(DEVICE) for size in sizes]
    alphas = [1 + i / count for i in range(count)]
    check(Call(SGD, weights, grads, [], alphas))


@pytest.mark.parametrize("decay_of", ["theta", "phi"])
@pytest.mark.parametrize(("lr", "drift"), [(1e-5, 2**-28), (1e-3, 2**-28), (0.9, 2**-24)])
def test_decoupled_decay_does_not_drift(lr, drift, decay_of):
    """Roundings average out; what does not would add up over the steps of a training."""
    random = torch.Generator().manual_seed(5)
    weight = torch.rand(2048, generator=random).add(0.5).to(DEVICE)
    alphas, holds_phi = [1.0, 1.5, 3.0, 1.5, 1.5], [0, 0, 0, 1, 0]
    zeros = [torch.zeros_like(weight) for _ in alphas]
    decay = {"decay": ("decoupled", decay_of), "weight_decay": 1.0, "lr": lr}
    call = Call(SGD, [weight.clone() for _ in alphas], zeros, [], alphas, holds_phi, **decay)
    exact = [call.expected(i)[0] for i in range(len(alphas))]
    call.run()
    for i, expected in enumerate(exact):
        error = call.weights[i].double() / expected - 1
        assert error.mean().abs() < drift, f"weight {i}"
        assert error.abs().max() < 2.0**-22, f"weight {i}"


# ---- what is exact


# No numbers so large that their slope is not finite: it makes NaN of a gradient of 0.
SIZES = (0.0, -0.0, 1.0, -3.0, 1e-30, 1e-40, -1e-45, 6e-8, 60_000.0, 1e36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("optimizer", [SGD, NESTEROV, AMSGRAD])
def test_a_step_of_zero_keeps_the_weight(optimizer, rule, dtype):
    values = [*SIZES, *torch.randn(500).tolist()]
    weight = torch.tensor(values, dtype=torch.float64).to(dtype).to(DEVICE)
    weight = weight[weight.isfinite()]
    alphas = [1.0, 1.1, 1.5, 2.0, 3.0, 130.0]
    zeros = [torch.zeros_like(weight) for _ in alphas]
    states = [[zero.clone() for zero in zeros] for _ in range(OPTIMIZERS[optimizer])]
    steps = [torch.zeros((), device=DEVICE) for _ in alphas]
    weights = [weight.clone() for _ in alphas]
    Call(optimizer, weights, zeros, states, alphas, steps=steps, rule=rule).run()
    for stepped, alpha in zip(weights, alphas, strict=True):
        assert same_bits(stepped, weight), alpha


@pytest.mark.parametrize("alpha", [1e6, 1e7])
def test_a_series_beyond_float32_is_not_used(alpha):
    weight = torch.tensor([1.0, -3.0, 1e-30], device=DEVICE)
    stepped = weight.clone()
    Call(SGD, [stepped], [torch.zeros_like(weight)], [], [alpha]).run()
    assert same_bits(stepped, weight)


@pytest.mark.parametrize("dtype", [*INTEGERS.values()], ids=str)
@pytest.mark.parametrize("optimizer", [MOMENTUM, AMSGRAD])
def test_frozen_entries_keep_any_bits(optimizer, dtype):
    floats = {2: (torch.float16, torch.bfloat16), 4: (torch.float32,), 8: (torch.float64,)}
    for kind in floats[dtype.itemsize]:
        random = torch.Generator().manual_seed(2)
        ends = torch.iinfo(dtype)

        def bits(size: int, random=random, kind=kind, ends=ends) -> Tensor:
            drawn = torch.randint(ends.min, ends.max, (size,), dtype=dtype, generator=random)
            return drawn.view(kind).to(DEVICE)

        weights = [bits(1030), bits(77)]
        states = [[bits(1030), bits(77)] for _ in range(OPTIMIZERS[optimizer])]
        masks = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
        masks[0][5] = True
        steps = [torch.tensor(3.0, device=DEVICE) for _ in weights]
        call = Call(optimizer, weights, weights, states, [1.5, 1.0], steps=steps, masks=masks)
        call = replace(call, weight_decay=0.1, rule="chain")
        before = call.copy()
        before.grads = [grad.clone() for grad in call.grads]
        call.grads = before.grads
        call.run()
        for i, mask in enumerate(masks):
            assert same_bits(call.weights[i][~mask], before.weights[i][~mask])
            for column, old in zip(call.states, before.states, strict=True):
                assert same_bits(column[i][~mask], old[i][~mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_zero_is_dead_and_what_is_not_finite_shows(alpha, rule, dtype):
    weight = torch.tensor([0.0, -0.0, 0.0, 0.0, 1.0, 1.0, math.inf, math.nan], dtype=dtype)
    grad = torch.tensor([1.0, -2.0, math.inf, math.nan, math.inf, math.nan, 1.0, 1.0], dtype=dtype)
    weight, grad, m = weight.to(DEVICE), grad.to(DEVICE), torch.ones(8, dtype=dtype, device=DEVICE)
    Call(MOMENTUM, [weight], [grad], [[m]], [alpha], rule=rule).run()
    assert (weight[:2] == 0).all()
    assert weight[:2].signbit().tolist() == [False, True]
    assert not weight[2:].isfinite().any()
    assert not m[2:6].isfinite().any()


@pytest.mark.parametrize("lr", [0.5, 1e3, 1e6])
@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0, 4.0, 9.0])
def test_steps_of_every_size(alpha, rule, lr):
    """From far below the weight to far above it, over the whole range of weights."""
    random = torch.Generator().manual_seed(3)
    weight = torch.exp2(torch.rand(1000, generator=random) * 250 - 148)
    weight = weight * torch.randn(1000, generator=random).sign()
    grad = torch.exp2(torch.rand(1000, generator=random) * 60 - 50) * weight.sign()
    call = Call(SGD, [weight.to(DEVICE)], [grad.to(DEVICE)], [], [alpha], rule=rule, lr=lr)
    (exact,) = call.expected(0)
    before = weight.double().to(DEVICE)
    call.run()
    result = call.weights[0].double()
    # Subnormal weights have fewer bits, and so has what is next to overflow or underflow.
    inside = (before.abs() >= 2.0**-120) & (exact.abs() >= 2.0**-120) & (exact.abs() < 2.0**120)
    error = 2.0**-20 * alpha * (exact - before).abs() + 2.0**-22 * exact.abs()
    wrong = inside & ~((result - exact).abs() <= error)
    assert not wrong.any(), (before[wrong][:5], grad.to(DEVICE)[wrong][:5], result[wrong][:5])
    assert (result[~inside].isfinite() | (exact[~inside].abs() >= 2.0**119)).all()
    assert inside.sum() > 300


def crossing(alpha: float, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights, and gradients by which a step of SGD with lr = 0.1 leaves next to nothing of φ."""
    phi = (torch.randn(count, generator=random).double() * 0.3).exp2() * 0.5
    left = torch.exp2(torch.rand(count, generator=random).double() * -16)
    left = left * torch.randn(count, generator=random).sign()
    grad = (1 - left) * phi / (0.1 * alpha * phi ** (alpha - 1))
    return (phi**alpha).float(), grad.float()


@pytest.mark.parametrize("rule", ["virtual", "chain"])
def test_steps_that_end_near_zero(rule):
    """By the rule of `ppkernels.testing_steps`: as exact as the step of φ, however small θ is."""
    random = torch.Generator().manual_seed(4)
    alphas = [1.1, 1.5, 2.0, 3.0, 4.0, 5.5, 8.0]
    weights, grads = zip(*(crossing(alpha, 200, random) for alpha in alphas), strict=True)
    check_sgd(rule, StepLists([*weights], [*grads], [], [], alphas, [False] * len(alphas)))


@pytest.mark.parametrize("rule", ["virtual", "chain"])
def test_large_exponents(rule):
    """α times the rounding of 1 + r would be many units in the last place."""
    alphas = (8.0, 12.0, 32.0, 130.0)
    check_sgd(rule, step_lists(CASES[f"SGD, {rule}, no decay"], torch.float32, 400, alphas))


def check_sgd(rule: str, before: StepLists) -> None:
    before = before.map(lambda tensor: tensor.to(DEVICE))
    after = before.clone()
    Call(SGD, after.weights, after.grads, [], before.alphas, before.holds_phi, rule=rule).run()
    check_step(CASES[f"SGD, {rule}, no decay"], before, after)


# ---- overflows


@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0, 8.0, 64.0, 130.0])
@pytest.mark.parametrize("rule", ["virtual", "chain"])
def test_first_steps_of_weights_far_from_one(rule, alpha):
    """Momentum that begins at 0 is the gradient's, whose slope has to be right by itself."""
    weight = torch.tensor([sign * 2.0**k for k in (-101, -80, -40, 0, 40, 101) for sign in (1, -1)])
    size = weight.abs().double()
    # The step is 0.4·φ/α, in either direction.
    grad = (size ** (2 / alpha - 1) / alpha**2 * 5).float() * torch.tensor([1.0, 1.0, -1.0] * 4)
    zeros = [torch.zeros_like(weight, device=DEVICE)]
    call = Call(MOMENTUM, [weight.to(DEVICE)], [grad.to(DEVICE)], [zeros], [alpha], rule=rule)
    exact, momentum = (tensor.cpu() for tensor in call.expected(0))
    call.run()
    # What the docstring of `sgd_step_` says of φ's step, in φ and in θ.
    bound = 2.0**-20 + 2.0**-24 * size.log2().abs()
    bound *= 2.0 if rule == "chain" else 1.0
    off = (call.states[0][0].cpu().double() / momentum - 1).abs()
    assert (off <= bound).all(), (off, bound)
    off = (call.weights[0].cpu().double() / exact - 1).abs()
    assert (off <= 2.0**-22 + bound * 0.4 / 0.6).all(), (off, bound)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM])
def test_found_inf(optimizer):
    call = call_of(optimizer, weight_decay=0.1)
    call.found_inf = torch.tensor(1.0, device=DEVICE)
    before = call.copy()
    call.run()
    for mine, old in zip(call.weights, before.weights, strict=True):
        assert same_bits(mine, old)
    for column, olds in zip(call.states, before.states, strict=True):
        assert all(same_bits(mine, old) for mine, old in zip(column, olds, strict=True))
    assert call.steps == before.steps
    call.found_inf = torch.tensor(0.0, device=DEVICE)
    check(call)


def test_numbers_on_the_host(monkeypatch):
    """α, step counts, scale and overflow on the CPU, which a kernel on a GPU could not read."""
    expected = call_of(ADAM, grad_scale=torch.tensor(2.0), weight_decay=0.1)
    expected.grad_scale = expected.grad_scale.to(DEVICE)
    expected.found_inf = torch.tensor(0.0, device=DEVICE)
    call = expected.copy()
    expected.run()
    for module in (table, gpu, kept):
        monkeypatch.setattr(module, "lies_on", lambda tensor, device: False)
    call.run()
    theirs = expected.weights + expected.steps
    for mine, other in zip(call.weights + call.steps, theirs, strict=True):
        assert same_bits(mine, other)
    stopped = call.copy()
    stopped.found_inf = torch.tensor(1.0)
    stopped.run()
    for mine, old in zip(stopped.weights + stopped.steps, call.weights + call.steps, strict=True):
        assert same_bits(mine, old)


# ---- what changes from step to step


@pytest.mark.parametrize("decay", [DECAYS[0], DECAYS[2], DECAYS[3]], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM])
def test_a_learning_rate_in_a_tensor(optimizer, dtype, decay):
    """Read by the kernel, whatever was there when the table was made."""
    lr = torch.zeros((), dtype=dtype, device=DEVICE)
    call = call_of(optimizer, decay=decay, weight_decay=0.3, shapes=SHAPES[:4], lr=lr)
    for rate in (0.1, 0.01):
        lr.fill_(rate)
        as_number = replace(call.copy(), lr=lr.item())
        check(call)
        as_number.run()
        for mine, other in zip(call.weights, as_number.weights, strict=True):
            assert same_bits(mine, other)


def test_a_learning_rate_on_the_host():
    call = call_of(SGD, shapes=SHAPES[:2], weight_decay=2.0, decay=("decoupled", "theta"))
    check(replace(call, lr=torch.tensor([0.125])))
    for wrong in (torch.tensor(-0.1), torch.tensor(math.inf), torch.tensor(math.nan)):
        with pytest.raises(RuntimeError, match="lr must be a finite number >= 0"):
            check_rate_on_the_host(call, wrong)
    with pytest.raises(RuntimeError, match="1 - lr \\* weight_decay, which must be positive"):
        check_rate_on_the_host(call, torch.tensor(0.5))


def check_rate_on_the_host(call: Call, lr: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (table, gpu, kept):
            patch.setattr(module, "lies_on", lambda tensor, device: False)
        replace(call, lr=lr).run()


def test_steps_by_a_kept_table():
    """Values change in place, and numbers of the head: each step is that of the call as it is."""
    tables = []
    call = call_of(MOMENTUM, shapes=SHAPES[:4], weight_decay=0.3)
    call.words = [
        torch.empty(0, dtype=torch.uint8, device=DEVICE) if mask is None else words_of(mask)
        for mask in call.masks
    ]
    call.alphas = [torch.tensor(a, dtype=torch.float64, device=DEVICE) for a in call.alphas]
    steps = {
        "first": lambda c: c,
        "the same again": lambda c: c,
        "learning rate": lambda c: replace(c, lr=0.03),
        "decay": lambda c: replace(c, decay=("decoupled", "phi"), weight_decay=0.5),
        "rule": lambda c: replace(c, rule="chain"),
        "scale": lambda c: replace(c, grad_scale=torch.tensor(4.0, device=DEVICE)),
        "no scale": lambda c: replace(c, grad_scale=None, maximize=True),
    }
    for change in steps.values():
        call = change(call)
        call.alphas[0].add_(0.5)
        call.grads[0].mul_(-1).add_(1)
        # A step that cancels next to all of a weight is another test's.
        call.weights[0].fill_(3.0)
        call.states[0][0].zero_()
        with pytest.MonkeyPatch.context() as patch:
            made = patch.setattr(gpu, "table_for", noted(gpu.table_for, tables)) or tables
            check(call)
    assert len({id(each) for each in made}) == 1


def noted(function: Any, results: list[Any]) -> Any:
    """``function``, whose results are kept in a list."""

    def call(*args: Any) -> Any:
        results.append(function(*args))
        return results[-1]

    return call


# ---- layouts and addresses

LAYOUTS = {
    "scalar": lambda t: t[0],
    "unaligned": lambda t: t[1:1050],
    "transposed": lambda t: t[:2100].view(30, 70).t(),
    "channels_last": lambda t: (
        t[:2160].view(4, 6, 9, 10).contiguous(memory_format=torch.channels_last)
    ),
    "permuted": lambda t: t[:2160].view(4, 6, 9, 10).permute(2, 0, 3, 1),
    "columns": lambda t: t[:4000].view(40, 100)[:, 3:70],
    "every_second": lambda t: t[:2100:2],
    "size_one_dims": lambda t: t[:2000].view(1, 40, 1, 50),
}


@pytest.mark.parametrize("states", ["as the weight", "contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, states):
    arrange = LAYOUTS[layout]
    memory = [torch.linspace(-2, 2, 5000, device=DEVICE).roll(i) for i in range(3)]
    weight, grad, buffer = map(arrange, memory)
    mask = arrange(torch.rand(5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)) < 0.5
    if states == "contiguous":
        grad, buffer = grad.contiguous(), buffer.contiguous()
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (weight, grad, buffer)]
    rest = memory[0].clone()
    Call(MOMENTUM, [weight], [grad], [[buffer]], [1.5], masks=[mask]).run()
    Call(MOMENTUM, plain[:1], plain[1:2], [plain[2:]], [1.5], masks=[mask]).run()
    assert torch.equal(weight, plain[0])
    assert torch.equal(buffer, plain[2])
    if layout != "channels_last":  # a copy of its own
        arrange(rest).copy_(plain[0])
        assert torch.equal(memory[0], rest)  # the gaps are as they were


def test_an_expanded_gradient():
    weight, grad = torch.randn(9, 5, device=DEVICE), torch.ones((), device=DEVICE)
    expected = weight - 0.1
    Call(SGD, [weight], [grad.expand(9, 5)], [], [1.0]).run()
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_beside_the_weights_is_written(shift, dtype):
    sizes = (1, 15, 511, 1024, 1025)
    buffers, weights, states, grads = [], [], [], []
    for size in sizes:
        for kind in (weights, states):
            buffer = torch.full((size + 64,), math.nan, dtype=dtype, device=DEVICE)
            kind.append(buffer[16 + shift : 16 + shift + size].fill_(0.5))
            buffers.append(buffer)
        grads.append(torch.ones(size, dtype=dtype, device=DEVICE))
    masks = [torch.ones(size, dtype=torch.bool, device=DEVICE) for size in sizes]
    Call(MOMENTUM, weights, grads, [states], [1.5] * len(sizes), masks=masks).run()
    for weight, state in zip(weights, states, strict=True):
        assert (weight == weight[0]).all()
        assert weight[0] < 0.5
        assert (state > 0.5).all()
    assert all(buffer.isnan().sum() == 64 for buffer in buffers)


# ---- errors


def with_first(tensors: list[Tensor], first: Tensor) -> list[Tensor]:
    return [first, *tensors[1:]]


ERRORS = {
    "grads must have an entry": lambda c: {"grads": c.grads[:-1]},
    "alphas must have an entry": lambda c: {"alphas": c.alphas[:-1]},
    "exp_avg_sqs must have an entry": lambda c: {"states": [c.states[0], c.states[1][1:]]},
    "steps must have an entry": lambda c: {"steps": c.steps[1:]},
    "masks must have an entry": lambda c: {"masks": c.masks[1:]},
    "masters must have an entry": lambda c: {"masters": c.weights[1:]},
    "holds_phi must have an entry": lambda c: {"holds_phi": [1]},
    "weights must be float32": lambda c: {"weights": with_first(c.weights, c.weights[0].int())},
    "grads must be like": lambda c: {"grads": with_first(c.grads, torch.ones(2, device=DEVICE))},
    "exp_avgs must be like": lambda c: {
        "states": [with_first(c.states[0], c.states[0][0].half()), c.states[1]]
    },
    "steps must hold one float32": lambda c: {"steps": with_first(c.steps, c.steps[0].double())},
    "a master copy is float32 beside a half": lambda c: {"masters": c.weights},
    "words must be a contiguous uint8": lambda c: {"masks": [c.masks[1]] * len(c.masks)},
    "found_inf must hold one float32": lambda c: {"found_inf": torch.ones(2, device=DEVICE)},
    "grad_scale must hold one float32": lambda c: {"grad_scale": c.steps[0].half()},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    call = call_of(ADAM)
    call = replace(call, **ERRORS[message](call))
    before = call.copy()
    with pytest.raises((RuntimeError, TypeError), match=f"^adam_step_: {message}"):
        call.run()
    assert call.steps == before.steps
    for mine, old in zip(call.weights, before.weights, strict=True):
        assert torch.equal(mine, old)


# ---- launches


class Recorder:
    """Takes a kernel's place and notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append(options)


def test_one_launch_for_all_and_no_value_makes_another_kernel(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(gpu, "step_kernel", recorder)
    call = call_of(ADAM)
    call.run()
    other = replace(call, lr=0.0, weight_decay=1.0, eps=0.0, betas=(0.5, 0.0), maximize=True)
    other.alphas = [1.0 + i for i in range(len(other.alphas))]
    other.run()
    first, second = recorder.launches
    assert first == second


def test_a_launch_for_each_kind_of_weight(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(gpu, "step_kernel", recorder)
    memory = torch.ones(100, device=DEVICE)
    weights = [memory[:9], memory[1:9], memory[8:20], memory[:50].double(), memory[2:3]]
    Call(SGD, weights, [weight.clone() for weight in weights], [], [1.0] * 5).run()
    kinds = {(launch["WEIGHT"], launch["ALIGNED"]) for launch in recorder.launches}
    assert kinds == {(tl.float32, True), (tl.float32, False), (tl.float64, True)}
    assert len(recorder.launches) == 3


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nothing_waits_and_no_value_compiles_again():
    call = call_of(ADAM)
    call.found_inf = torch.zeros((), device=DEVICE)
    call.run()
    compiled: list[object] = []
    torch.cuda.set_sync_debug_mode("error")
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kw: compiled.append(kw)
    alphas = [torch.full((), 1.7, dtype=torch.float64, device=DEVICE) for _ in call.weights]
    try:
        words = [0.5, "coupled", "theta", "virtual", True, None, call.found_inf]
        lr = torch.tensor(0.03, dtype=torch.float64)
        shared = [[], [], alphas, [], lr, 0.5, 0.9, 1e-6, *words]
        gpu.adam_step_(call.weights, call.grads, *call.states, [], call.steps, *shared)
        shared[4] = torch.zeros((), device=DEVICE)
        gpu.adam_step_(call.weights, call.grads, *call.states, [], call.steps, *shared)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
        torch.cuda.set_sync_debug_mode("default")
    # The first of the two has no masks, which the call before had.
    assert len(compiled) <= 1


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_elements_than_fit_into_32_bits():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip(f"needs {5 * numel / 1e9:.0f} GB of free GPU memory")
    weight = torch.ones(numel, dtype=torch.float16, device=DEVICE)
    words = torch.full(((numel + 7) // 8,), 0b10, dtype=torch.uint8, device=DEVICE)
    alpha = torch.tensor(1.0, dtype=torch.float64)
    lr = torch.tensor(0.5, dtype=torch.float64)
    rest = [lr, 0.0, 0.0, False, 0.0, "coupled", "theta", "virtual", False, None, None]
    gpu.sgd_step_([weight], [weight.clone()], [], [], [words], [alpha], [], *rest)
    assert weight[-4099:].tolist() == ([1.0, 0.5] + 6 * [1.0]) * 512 + [1.0, 0.5, 1.0]
