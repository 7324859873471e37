"""Op `step`: special values, steps of zero, frozen entries."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import ppkernels as pp
from ppkernels.testing_steps import (
    DTYPES,
    STEP_ALPHAS,
    StepCase,
    StepLists,
    check_step,
    step_cases,
    step_lists,
    stepped,
    take_step,
)

CASES = {case.name: case for case in step_cases()}
IS_REFERENCE = pp.cpu_capability() == "reference"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_rule = pytest.mark.parametrize("rule", ["virtual", "chain"])


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.itemsize])


def for_each_alpha(case: StepCase, columns: list[Tensor], holds_phi: bool = False) -> StepLists:
    """The same weight, gradient and states [N] for each of `STEP_ALPHAS`."""
    count = len(STEP_ALPHAS)
    weight, grad, *states = columns
    return StepLists(
        [weight.clone() for _ in range(count)],
        [grad] * count,
        [[state.clone() for _ in range(count)] for state in states],
        [torch.tensor(4.0) for _ in range(count)] if case.op == "adam_step_" else [],
        list(STEP_ALPHAS),
        [holds_phi] * count,
    )


# ---- special values


def special_grid(dtype: torch.dtype, state_count: int) -> list[Tensor]:
    """Weight, gradient and states: special and ordinary values in every combination."""
    info = torch.finfo(dtype)
    weights = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, 0.3, -1e-3]
    weights += [info.tiny, -info.tiny * info.eps, info.tiny / 2]
    grads = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, info.max, info.tiny * info.eps]
    states = [[0.0, 0.5, math.inf, math.nan], [0.0, 0.5, math.inf, math.nan], [0.5, math.nan]]
    columns = torch.cartesian_prod(
        *(torch.tensor(x, dtype=torch.float64) for x in (weights, grads, *states[:state_count]))
    )
    return [column.to(dtype).contiguous() for column in columns.unbind(1)]


@each_dtype
@each_case
def test_what_is_not_finite_shows_and_nothing_else_does(case: StepCase, dtype: torch.dtype) -> None:
    weight, grad, *states = special_grid(dtype, case.state_count)
    after = stepped(case, for_each_alpha(case, [weight, grad, *states]))
    # A second moment that is infinite, or becomes it, makes Adam's step 0 where m is finite.
    is_bad = ~weight.isfinite() | grad.isnan()
    for state in states:
        is_bad |= state.isnan()
    if case.op == "sgd_step_":
        is_bad |= grad.isinf()
        for state in states:
            is_bad |= state.isinf()
    else:
        is_bad |= grad.isinf() | (states[0].isinf() & (grad.abs() <= 1))
    is_fine = (weight.abs() < 1) & (grad.abs() <= 1)
    for state in states[:1]:
        is_fine &= state <= 1
    for state in states[1:]:
        is_fine &= state == 0.5
    for alpha, result in zip(STEP_ALPHAS, after.weights, strict=True):
        for what, wrong in (
            ("hidden", is_bad & result.isfinite()),
            # A step of 1.5 from 0.3 leaves float16's range at large exponents.
            ("made up", is_fine & ~result.isfinite() & (alpha <= 4.5)),
        ):
            places = wrong.nonzero().flatten().tolist()
            assert not places, (
                f"alpha={alpha}, {what} at weight {weight[places[0]].item()}, gradient "
                f"{grad[places[0]].item()}, states {[s[places[0]].item() for s in states]}: "
                f"{result[places[0]].item()}, and {len(places) - 1} more"
            )


@each_dtype
@each_rule
@pytest.mark.parametrize("buffers", [0, 1])
def test_zero_stays_and_keeps_its_sign(dtype: torch.dtype, rule: str, buffers: int) -> None:
    zeros = torch.tensor([0.0, -0.0] * 20, dtype=dtype)
    grads = torch.randn(40).to(dtype)
    for alpha in STEP_ALPHAS[1:]:
        weight = zeros.clone()
        momenta = [torch.ones(40, dtype=dtype)] * buffers
        more = {"weight_decay": 0.1, "decay": "decoupled", "rule": rule}
        more["momentum"] = 0.9 if buffers else 0.0
        pp.sgd_step_([weight], [grads], momenta, alphas=[alpha], lr=0.5, **more)
        assert torch.equal(bits(weight), bits(zeros)), f"alpha={alpha}: {weight}"


@each_dtype
@each_rule
@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_a_step_of_zero_leaves_every_bit(dtype: torch.dtype, rule: str, lr: float) -> None:
    info = torch.finfo(dtype)
    # Beyond max / α the slope α|φ|^(α−1) is infinite, and times 0 no number.
    ends = [0.0, info.tiny * info.eps, info.tiny, info.tiny / 2, info.max / 2e7, 1.0]
    sizes = torch.cat([torch.tensor(ends, dtype=torch.float64), torch.randn(97)]).to(dtype)
    weights = torch.cat([sizes, -sizes])
    grads = torch.zeros_like(weights) if lr else torch.randn(len(weights)).to(dtype)
    exponents = [*STEP_ALPHAS, math.nextafter(1, 2), math.nextafter(2, 3), 1e4, 1e7]
    for alpha in exponents:
        if alpha == 1:
            # The plain step is torch.optim's, where −0 + 0 is +0.
            weights, grads = weights[weights != 0], grads[weights != 0]
        for maximize in (False, True):
            told = f"alpha={alpha}, maximize={maximize}"
            more = {"alphas": [alpha], "rule": rule, "lr": lr, "maximize": maximize}
            weight = weights.clone()
            pp.sgd_step_([weight], [grads], **more)
            assert torch.equal(bits(weight), bits(weights)), told
            buffer = torch.zeros_like(weight)
            pp.sgd_step_([weight], [grads], [buffer], momentum=0.9, nesterov=True, **more)
            assert torch.equal(bits(weight), bits(weights)), told
            moments = [torch.zeros_like(weight), torch.full_like(weight, 0.5)]
            states = [[moment] for moment in moments]
            pp.adam_step_([weight], [grads], *states, steps=[torch.zeros(())], **more)
            assert torch.equal(bits(weight), bits(weights)), told


@each_rule
@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0, 3.0, 8.0])
def test_the_smallest_weights(rule: str, alpha: float) -> None:
    """Finite steps of subnormal weights: what overflows on the way must not show."""
    weight = torch.tensor([2.0**-149, -(2.0**-149), 2.0**-140, -(2.0**-130), 2.0**-127])
    case = CASES[f"momentum, {rule}, no decay"]
    before = StepLists([weight], [torch.randn(5)], [[torch.randn(5)]], [], [alpha], [False])
    check_step(case, before, stepped(case, before), IS_REFERENCE)


@each_rule
def test_a_step_far_across_zero(rule: str) -> None:
    # lr·g far above the weight, of both signs, up to where float32 ends.
    case = CASES[f"SGD, {rule}, decoupled decay of theta"]
    for lr in (1.0, 1e3, 1e6):
        before = step_lists(case, torch.float32, 200, [1.05, 1.5, 2.0, 3.0, 4.5])
        huge = dataclasses.replace(
            case, options={**case.options, "lr": lr, "weight_decay": 0.5 / lr}
        )
        check_step(huge, before, stepped(huge, before), IS_REFERENCE)


@pytest.mark.parametrize("alpha", [math.nextafter(1, 2), 1 + 1e-9, math.nextafter(2, 1), 2 + 1e-12])
@each_rule
def test_exponents_beside_the_exact_ones(alpha: float, rule: str) -> None:
    case = CASES[f"momentum, {rule}, decoupled decay of phi"]
    before = step_lists(case, torch.float32, 500, [alpha])
    check_step(case, before, stepped(case, before), IS_REFERENCE)


# ---- frozen entries


def words_of(masks: list[Tensor]) -> list[Tensor]:
    return [pp.BitMask.pack(mask).words for mask in masks]


@each_dtype
@each_case
def test_frozen_entries_keep_every_bit(case: StepCase, dtype: torch.dtype) -> None:
    lists = step_lists(case, dtype, 77)
    free = [torch.rand(77) < 0.5 for _ in lists.weights]
    for i, mask in enumerate(free):
        # Whatever a frozen entry holds.
        for tensors in (lists.weights, *lists.states):
            tensors[i][~mask] = special_values(int((~mask).sum()), dtype)
        lists.grads[i][~mask] = special_values(int((~mask).sum()), dtype)
    before, plain = lists.clone(), lists.clone()
    for _ in range(20):
        take_step(case, lists, masks=words_of(free))
        take_step(case, plain)
    for own, start, unmasked in zip(
        (lists.weights, *lists.states),
        (before.weights, *before.states),
        (plain.weights, *plain.states),
        strict=True,
    ):
        for i, mask in enumerate(free):
            assert torch.equal(bits(own[i])[~mask], bits(start[i])[~mask])
            torch.testing.assert_close(
                own[i][mask], unmasked[i][mask], rtol=0, atol=0, equal_nan=True
            )


def special_values(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros, infinities, NaN, subnormals and ordinary numbers, drawn at random."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, info.tiny * info.eps, info.max, 0.3, -0.7]
    table = torch.tensor(values, dtype=torch.float64).to(dtype)
    return table[torch.randint(0, len(values), (count,))]


@pytest.mark.parametrize("size", [*range(1, 66), 127, 128, 129, 200, 511, 513])
def test_masks_of_every_length(size: int) -> None:
    grad, start = torch.randn(size), torch.randn(size)
    for share in (0.0, 0.5, 1.0):
        mask = torch.rand(size) < share
        weight, unmasked = start.clone(), start.clone()
        pp.sgd_step_([weight], [grad], masks=words_of([mask]), alphas=[1.5], lr=0.1)
        pp.sgd_step_([unmasked], [grad], alphas=[1.5], lr=0.1)
        assert torch.equal(weight, torch.where(mask, unmasked, start))


def test_a_tensor_of_no_elements_is_no_mask() -> None:
    weights, grads = [torch.randn(9), torch.randn(7)], [torch.ones(9), torch.ones(7)]
    expected = [weight.clone() for weight in weights]
    mask = torch.zeros(7, dtype=torch.bool)
    none = torch.empty(0, dtype=torch.uint8)
    pp.sgd_step_(weights, grads, masks=[none, *words_of([mask])], alphas=[1.0, 1.0], lr=0.5)
    assert torch.equal(weights[0], expected[0] - 0.5)
    assert torch.equal(weights[1], expected[1])
