"""Op `step`: layouts, lists of tensors, threads, half types and their master copies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ppkernels as pp
from ppkernels.testing_steps import (
    DTYPES,
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
HALF = (torch.bfloat16, torch.float16)
IS_REFERENCE = pp.cpu_capability() == "reference"

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME_CASES], ids=SOME_CASES)


def assert_same_bits(result: Tensor, expected: Tensor, what: str = "") -> None:
    """Bit for bit; with plain PyTorch, whose loops round differently, about so."""
    if IS_REFERENCE:
        torch.testing.assert_close(result, expected, equal_nan=True)
        return
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    signs_differ = (result.signbit() != expected.signbit()) & ~result.isnan()
    assert not signs_differ.any(), f"{what}: signs of zeros differ"


def assert_same_lists(result: StepLists, expected: StepLists, what: str = "") -> None:
    for one, other in zip(
        [result.weights, *result.states, result.steps],
        [expected.weights, *expected.states, expected.steps],
        strict=True,
    ):
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b, what)


def words_of(masks: list[Tensor]) -> list[Tensor]:
    return [pp.BitMask.pack(mask).words for mask in masks]


def some_mask(*shape: int) -> Tensor:
    return (torch.arange(math.prod(shape)) % 5 != 2).reshape(shape)


# ---- layouts


def in_gaps(tensor: Tensor) -> Tensor:
    """Every second column of a matrix twice as wide."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7.0, dtype=tensor.dtype)
    view = wide[..., ::2]
    view.copy_(tensor)
    return view


def off_by_one(tensor: Tensor) -> Tensor:
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


# What is done to weights, and to gradients and states.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "channels_last": (channels_last, channels_last),
    "channels_last weights": (channels_last, torch.clone),
    "channels_last states": (torch.clone, channels_last),
    "transposed": (transposed, transposed),
    "transposed weights": (transposed, torch.clone),
    "transposed weights, channels_last states": (transposed, channels_last),
    "with gaps": (in_gaps, in_gaps),
    "weights with gaps": (in_gaps, torch.clone),
    "states with gaps": (torch.clone, in_gaps),
    "off by one element": (off_by_one, off_by_one),
    "channels_last weights, states off by one": (channels_last, off_by_one),
}
SHAPE = (4, 3, 5, 7)


def shaped(lists: StepLists, *shape: int) -> StepLists:
    return lists.map(lambda tensor: tensor.reshape(shape).clone())


def arranged(lists: StepLists, layout: str) -> StepLists:
    weight_layout, state_layout = LAYOUTS[layout]
    result = lists.map(state_layout)
    result.weights = [weight_layout(weight) for weight in lists.weights]
    return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@some_cases
def test_layouts(case: StepCase, layout: str, masked: bool) -> None:
    for dtype, state_dtype in [(dtype, dtype) for dtype in DTYPES] + [
        (d, torch.float32) for d in HALF
    ]:
        lists = step_lists(case, dtype, math.prod(SHAPE), [1.0, 1.5], state_dtype)
        lists = shaped(lists, *SHAPE)
        # The bits of a mask stand in row-major order of the shape, wherever the elements lie.
        masks = words_of([some_mask(*SHAPE)] * len(lists.weights)) if masked else []
        other = arranged(lists, layout)
        strides = [weight.stride() for weight in other.weights]
        grads = [grad.clone() for grad in other.grads]
        take_step(case, other, masks=masks)
        assert_same_lists(other, stepped(case, lists, masks=masks), f"{layout}, {dtype}")
        assert strides == [weight.stride() for weight in other.weights]
        for grad, before in zip(other.grads, grads, strict=True):
            assert torch.equal(grad, before)


def test_gaps_are_left_alone() -> None:
    wide, buffer = torch.full((9, 6), 7.0), torch.full((9, 6), 7.0)
    pp.sgd_step_(
        [wide[:, ::2]], [torch.ones(9, 3)], [buffer[:, ::2]], alphas=[1.5], lr=0.1, momentum=0.9
    )
    for tensor in (wide, buffer):
        assert (tensor[:, 1::2] == 7).all()
        assert (tensor[:, ::2] != 7).all()


@each_dtype
@some_cases
def test_any_size_gives_the_same_bits(case: StepCase, dtype: torch.dtype) -> None:
    whole = step_lists(case, dtype, 600, [1.25, 2.0])
    expected = stepped(case, whole)
    for size in [*range(1, 34), 47, 48, 49, 63, 64, 65, 96, 127, 128, 129, 191, 200]:
        start = size % 5
        part = whole.map(lambda x, a=start, b=start + size: x[a:b].clone())
        result = stepped(case, part)
        assert_same_lists(
            result, expected.map(lambda x, a=start, b=start + size: x[a:b]), f"{size} elements"
        )


@some_cases
def test_0_dim_and_empty_tensors(case: StepCase) -> None:
    lists = step_lists(case, torch.float32, 1, [1.5, 2.0])
    expected = stepped(case, lists)
    assert_same_lists(stepped(case, shaped(lists)), expected.map(lambda x: x.reshape(())))
    for shape in ((0,), (3, 0, 2)):
        empty = step_lists(case, torch.float32, 0, [1.5, 2.0])
        after = stepped(case, shaped(empty, *shape))
        assert all(weight.shape == shape for weight in after.weights)
        assert all(step.item() == 5 for step in after.steps)


# ---- lists


@some_cases
def test_a_list_gives_the_bits_of_one_call_each(case: StepCase) -> None:
    # Some 140,000 elements: several parts for each of two threads, cut within tensors.
    sizes = [1, 70_001, 3, 0, 64, 63, 65, 33_000, 1, 4_097, 30_000]
    all_dtypes = [torch.float32, torch.bfloat16, torch.float64]
    lists = StepLists([], [], [[] for _ in range(case.state_count)], [], [], [])
    masks = []
    for i, size in enumerate(sizes):
        one = step_lists(case, all_dtypes[i % 3], size, [(1.0, 1.5, 2.0, 3.0)[i % 4]])
        for own, other in zip(
            (lists.weights, lists.grads, *lists.states),
            (one.weights, one.grads, *one.states),
            strict=True,
        ):
            own.append(other[i % 2])
        lists.steps += one.steps[:1]
        lists.alphas += one.alphas[:1]
        lists.holds_phi.append(bool(i % 2))
        masks.append(words_of([some_mask(size)])[0] if i % 3 else torch.empty(0, dtype=torch.uint8))
    together = stepped(case, lists, masks=masks)
    for i in range(len(sizes)):
        one = StepLists(
            lists.weights[i : i + 1],
            lists.grads[i : i + 1],
            [states[i : i + 1] for states in lists.states],
            lists.steps[i : i + 1],
            lists.alphas[i : i + 1],
            lists.holds_phi[i : i + 1],
        )
        torch.set_num_threads(1 + i % 2)
        alone = stepped(case, one, masks=masks[i : i + 1])
        torch.set_num_threads(2)
        assert_same_bits(together.weights[i], alone.weights[0])
        for states, state in zip(together.states, alone.states, strict=True):
            assert_same_bits(states[i], state[0])
    torch.set_num_threads(1)
    assert_same_lists(stepped(case, lists, masks=masks), together)


@pytest.mark.parametrize("op", ["sgd_step_", "adam_step_"])
def test_an_empty_list(op: str) -> None:
    more = {"steps": []} if op == "adam_step_" else {}
    states = [[], []] if op == "adam_step_" else [[]]
    getattr(pp, op)([], [], *states, alphas=[], lr=0.1, **more)


def test_tuples_are_lists_too() -> None:
    weight = torch.ones(3)
    pp.sgd_step_((weight,), (torch.ones(3),), alphas=(1.0,), holds_phi=(False,), lr=0.5)
    assert torch.equal(weight, torch.full((3,), 0.5))


# ---- half types and master copies


@each_half
@some_cases
def test_a_master_follows_the_float32_trajectory(case: StepCase, dtype: torch.dtype) -> None:
    masters = step_lists(case, torch.float32, 300, [1.0, 1.5, 2.0, 3.0])
    halves = step_lists(case, dtype, 300, [1.0, 1.5, 2.0, 3.0], torch.float32)
    copies = [weight.float() for weight in halves.weights]
    masters.weights = [copy.clone() for copy in copies]
    masters.states = [[state.clone() for state in states] for states in halves.states]
    masters.grads = [grad.float() for grad in halves.grads]
    for _ in range(5):
        take_step(case, halves, masters=copies)
        take_step(case, masters)
        for weight, copy, wanted in zip(halves.weights, copies, masters.weights, strict=True):
            assert_same_bits(copy, wanted)
            torch.testing.assert_close(weight, copy.to(dtype), rtol=0, atol=0, equal_nan=True)


@each_half
def test_overwriting_a_weight_wins_over_its_master(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.5, -0.25, 0.125, 1.0]).to(dtype)
    # What the half type cannot hold must survive where the weight is untouched.
    master = weight.float() * (1 + 2.0**-14)
    weight[1], weight[3] = 0.0, 0.75
    pp.sgd_step_([weight], [torch.zeros(4).to(dtype)], masters=[master], alphas=[1.5], lr=0.1)
    assert weight.tolist() == [0.5, 0.0, 0.125, 0.75]
    assert master.tolist() == [0.5 * (1 + 2.0**-14), 0.0, 0.125 * (1 + 2.0**-14), 0.75]


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@each_half
def test_frozen_entries_with_a_master(dtype: torch.dtype, backend: str) -> None:
    weight = torch.randn(77).to(dtype)
    master = weight.float() * (1 + 2.0**-14)
    # Frozen and overwritten: nothing is written, neither to the weight nor to its master.
    weight[3::7] = 0.0
    mask = some_mask(77)
    before = weight.clone(), master.clone()
    buffer = torch.randn(77)
    with pp.backend(backend):
        for _ in range(3):
            pp.sgd_step_(
                [weight],
                [torch.randn(77).to(dtype)],
                [buffer],
                masters=[master],
                masks=words_of([mask]),
                alphas=[1.5],
                lr=0.1,
                momentum=0.9,
            )
    for tensor, start in zip((weight, master), before, strict=True):
        assert torch.equal(tensor[~mask], start[~mask])
        assert not torch.equal(tensor[mask], start[mask])
    assert torch.equal(weight[mask], master[mask].to(dtype))


@each_half
def test_a_master_of_some_weights_only(dtype: torch.dtype) -> None:
    weights = [torch.ones(5, dtype=dtype), torch.ones(5, dtype=dtype), torch.ones(5)]
    grads = [torch.full((5,), 2.0**-12, dtype=weight.dtype) for weight in weights]
    master = torch.ones(5)
    none = torch.empty(0)
    pp.sgd_step_(weights, grads, masters=[none, master, none], alphas=[1.0] * 3, lr=1.0)
    assert master.tolist() == [1 - 2.0**-12] * 5
    assert torch.equal(weights[1], master.to(dtype))
    assert torch.equal(weights[0], torch.ones(5).to(dtype))
    assert weights[2].tolist() == [1 - 2.0**-12] * 5


@each_half
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_masters(layout: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(CASES["momentum, virtual, no decay"])
    lists = shaped(step_lists(case, dtype, math.prod(SHAPE), [1.5], torch.float32), *SHAPE)
    masks = words_of([some_mask(*SHAPE)] * 2)
    other = arranged(lists, layout)
    copies = [weight.float().contiguous() for weight in lists.weights]
    other_copies = [LAYOUTS[layout][1](copy.clone()) for copy in copies]
    take_step(case, other, masks=masks, masters=other_copies)
    take_step(case, lists, masks=masks, masters=copies)
    assert_same_lists(other, lists)
    for one, two in zip(other_copies, copies, strict=True):
        assert_same_bits(one, two)
