"""Op `step` beside torch.optim, and under autograd, opcheck and torch.compile."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ppkernels as pp
from ppkernels.testing_steps import (
    StepCase,
    StepLists,
    step_cases,
    step_lists,
    stepped,
    take_step,
)

CASES = {case.name: case for case in step_cases()}
# Each optimizer once or twice, with different rules and decays.
SOME_CASES = [name for i, name in enumerate(CASES) if i % 7 == 3]
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME_CASES], ids=SOME_CASES)
OPS = {
    "sgd_step_": CASES["momentum, virtual, no decay"],
    "adam_step_": CASES["AMSGrad, virtual, no decay"],
}
each_op = pytest.mark.parametrize("op", OPS)
kernels_only = pytest.mark.skipif(
    pp.cpu_capability() == "reference", reason="no compiled kernels: PyTorch has no single fma"
)


def assert_equal(result: StepLists, expected: StepLists) -> None:
    for one, other in zip(
        [result.weights, *result.states, result.steps],
        [expected.weights, *expected.states, expected.steps],
        strict=True,
    ):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


# ---- torch.optim


@kernels_only
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=["SGD", "momentum", "dampening", "Nesterov"],
)
def test_alpha_1_is_torch_sgd_bit_for_bit(
    options: dict[str, Any], weight_decay: float, maximize: bool
) -> None:
    theirs = torch.nn.Parameter(torch.randn(1_003))
    options = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize, **options}
    optimizer = torch.optim.SGD([theirs], foreach=False, **options)
    ours = theirs.detach().clone()
    buffers: list[Tensor] = []
    for count in range(10):
        grad = torch.randn(1_003)
        theirs.grad = grad.clone()
        optimizer.step()
        if count == 0 and "momentum" in options:
            # Its buffer starts as the first gradient, with no dampening.
            buffers = [optimizer.state[theirs]["momentum_buffer"].clone()]
            ours = theirs.detach().clone()
            continue
        pp.sgd_step_([ours], [grad], buffers, alphas=[1.0], **options)
        assert torch.equal(ours, theirs.detach())
        if buffers:
            assert torch.equal(buffers[0], optimizer.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("optimizer_type", "decay", "weight_decay"),
    [
        (torch.optim.Adam, "coupled", 0.0),
        (torch.optim.Adam, "coupled", 0.1),
        (torch.optim.AdamW, "decoupled", 0.1),
    ],
    ids=["Adam", "Adam with decay", "AdamW"],
)
def test_alpha_1_is_torch_adam(
    optimizer_type: type[torch.optim.Optimizer], decay: str, weight_decay: float, amsgrad: bool
) -> None:
    theirs = torch.nn.Parameter(torch.randn(1_003))
    options = {"lr": 0.01, "weight_decay": weight_decay}
    optimizer = optimizer_type([theirs], amsgrad=amsgrad, foreach=False, **options)
    states = [[torch.zeros(1_003)] for _ in range(3 if amsgrad else 2)]
    steps = [torch.zeros(())]
    ours = theirs.detach().clone()
    for _ in range(10):
        grad = torch.randn(1_003)
        theirs.grad = grad.clone()
        before = theirs.detach().clone()
        optimizer.step()
        pp.adam_step_([ours], [grad], *states, steps=steps, alphas=[1.0], decay=decay, **options)
        size = torch.maximum(before.abs(), theirs.detach().abs())
        error = (ours - theirs.detach()).abs() / (torch.nextafter(size, size + 1) - size)
        # Two roundings of the weight, and those of its step, which is 0.01 and less of 1.
        assert error.max() <= 2 + (0.01 * 2**-22 / (torch.nextafter(size, size + 1) - size)).max()
        ours.copy_(theirs.detach())
    assert steps[0].item() == 10


# ---- GradScaler, maximize, exponents that change


@some_cases
def test_found_inf_changes_nothing(case: StepCase) -> None:
    before = step_lists(case, torch.float32, 99)
    before.grads[0][7] = torch.inf
    assert_equal(stepped(case, before, found_inf=torch.ones(1)), before)
    before.grads[0][7] = 1.0
    assert_equal(stepped(case, before, found_inf=torch.zeros(1)), stepped(case, before))


@some_cases
def test_a_loss_scale_of_a_power_of_two_changes_no_bit(case: StepCase) -> None:
    before = step_lists(case, torch.float32, 99)
    scaled = dataclasses.replace(before, grads=[grad * 2.0**16 for grad in before.grads])
    expected = stepped(case, before)
    assert_equal(stepped(case, scaled, grad_scale=torch.tensor([2.0**16])), expected)
    assert_equal(stepped(case, scaled, grad_scale=torch.tensor(2.0**16)), expected)


@some_cases
def test_maximize_is_the_step_of_minus_the_gradient(case: StepCase) -> None:
    before = step_lists(case, torch.float32, 99)
    negated = dataclasses.replace(before, grads=[-grad for grad in before.grads])
    assert_equal(stepped(case, negated, maximize=True), stepped(case, before))


@each_op
def test_an_exponent_in_a_tensor_counts_as_it_is_at_the_step(op: str) -> None:
    case = OPS[op]
    alpha = torch.tensor(1.5, dtype=torch.float64)
    before = step_lists(case, torch.float32, 99, [1.5])
    for value in (1.5, 2.0, 1.0, 2.7):
        alpha.fill_(value)
        numbers = dataclasses.replace(before, alphas=[value, value])
        tensors = dataclasses.replace(before, alphas=[alpha, alpha])  # type: ignore[list-item]
        assert_equal(stepped(case, tensors), stepped(case, numbers))


# ---- autograd


@each_op
def test_versions_are_bumped(op: str) -> None:
    case = OPS[op]
    lists = step_lists(case, torch.bfloat16, 9, [1.5], torch.float32)
    masters = [weight.float() for weight in lists.weights]
    states = [state for states in lists.states for state in states]
    written = [*lists.weights, *states, *lists.steps, *masters]
    read = [*lists.grads]
    versions = [tensor._version for tensor in written]
    grad_versions = [tensor._version for tensor in read]
    take_step(case, lists, masters=masters)
    assert all(t._version > v for t, v in zip(written, versions, strict=True))
    assert [tensor._version for tensor in read] == grad_versions


@each_op
def test_parameters_stay_leaves(op: str) -> None:
    case = OPS[op]
    lists = step_lists(case, torch.float32, 9)
    lists.weights = [torch.nn.Parameter(weight) for weight in lists.weights]
    take_step(case, lists)
    assert all(weight.is_leaf and weight.requires_grad for weight in lists.weights)
    # A graph that was recorded before must notice that its weight is another.
    (weight,) = [torch.nn.Parameter(torch.randn(9))]
    loss = weight.square().sum()
    pp.sgd_step_([weight], [torch.ones(9)], alphas=[1.5], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the raw ops


def raw_arguments(op: str, with_more: bool) -> dict[str, Any]:
    """Keyword arguments of torch.ops.ppkernels.<op>."""
    case = OPS[op]
    lists = step_lists(case, torch.float32, 24, [1.0, 1.5])
    names = list(inspect.signature(getattr(pp, op)).parameters)
    states = dict(zip(names[2:], lists.states, strict=False))
    steps = {"steps": lists.steps} if op == "adam_step_" else {}
    mask = pp.BitMask.pack(torch.arange(24) % 3 != 0).words
    one = torch.ones(()) if with_more else None
    return {
        "weights": lists.weights,
        "grads": lists.grads,
        **states,
        **steps,
        "masters": [],
        "masks": [mask.clone() for _ in lists.weights] if with_more else [],
        "alphas": [torch.tensor(alpha, dtype=torch.float64) for alpha in lists.alphas],
        "holds_phi": [int(holds) for holds in lists.holds_phi] if with_more else [],
        **case.options,
        "lr": torch.tensor(case.options["lr"], dtype=torch.float64),
        "grad_scale": one,
        "found_inf": None if one is None else torch.zeros(()),
    }


@pytest.mark.parametrize("with_more", [False, True])
@each_op
def test_opcheck(op: str, with_more: bool) -> None:
    raw = getattr(torch.ops.ppkernels, op).default
    torch.library.opcheck(raw, (), raw_arguments(op, with_more))


# ---- torch.compile


def compiled_step(case: StepCase) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    def function(lists: StepLists, alpha: Tensor, lr: Any) -> Tensor:
        take_step(case, dataclasses.replace(lists, alphas=[alpha] * len(lists.weights)), lr=lr)
        return lists.weights[0] * 2

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@each_op
def test_compile_without_recompiling_for_another_exponent(op: str) -> None:
    case = OPS[op]
    compiled, counter = compiled_step(case)
    for call, value in enumerate((1.5, 2.0, 1.0, 2.7)):
        lists = step_lists(case, torch.float32, 33, [value])
        result = compiled(lists, torch.tensor(value, dtype=torch.float64), 0.1)
        expected = step_lists(case, torch.float32, 33, [value])
        take_step(case, expected, lr=0.1)
        assert_equal(lists, expected)
        assert torch.equal(result, lists.weights[0] * 2)
        if call == 0:
            counter.frame_count = 0
    assert counter.frame_count == 0, f"compiled again, {counter.frame_count} times"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None], ids=str)
@each_op
def test_compile_with_another_learning_rate(op: str, dtype: torch.dtype | None) -> None:
    """A tensor compiles once. A number (None) is right too, but a constant to PyTorch."""
    case = OPS[op]
    compiled, counter = compiled_step(case)
    alpha = torch.tensor(1.5, dtype=torch.float64)
    for call, rate in enumerate((0.1, 0.2, 0.05, 0.0)):
        lr = rate if dtype is None else torch.tensor(rate, dtype=dtype)
        lists = step_lists(case, torch.float32, 33, [1.5])
        expected = lists.clone()
        compiled(lists, alpha, lr)
        take_step(case, expected, lr=float(lr))
        assert_equal(lists, expected)
        if call == 0:
            counter.frame_count = 0
    assert dtype is None or counter.frame_count == 0, f"compiled again, {counter.frame_count} times"


@each_op
def test_a_learning_rate_in_a_tensor_counts_as_it_is_at_the_step(op: str) -> None:
    case = OPS[op]
    before = step_lists(case, torch.float32, 99)
    for dtype, shape in itertools.product((torch.float32, torch.float64), ((), (1,))):
        lr = torch.zeros(shape, dtype=dtype)
        for rate in (0.1, 0.02, 0.0):
            lr.fill_(rate)
            assert_equal(stepped(case, before, lr=lr), stepped(case, before, lr=lr.item()))
