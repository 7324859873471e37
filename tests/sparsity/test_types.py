"""Types of sparsity: counts and patterns, beside choices made entry by entry in plain Python."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppkernels import BitMask
from ppkernels.sparsity import ConstantFanIn, NofM, Size, Type, Unstructured, Weight

SHAPES = [(6, 8), (5, 12), (4, 8, 3), (3, 4, 2, 5), (2, 4, 1, 2, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def size(shape: tuple[int, ...], frozen: int = 0) -> Size:
    return Size(torch.Size(shape), math.prod(shape) - frozen)


def mask_of(
    type: Type, scores: Tensor, share: float, within: BitMask | None = None
) -> tuple[Tensor, int]:
    counts = type.counts({"w": size(tuple(scores.shape))}, {"w": share})
    assert isinstance(counts, dict)
    mask = type.masks({"w": Weight(scores)}, counts, {"w": within})["w"].unpack()
    return mask, counts["w"]


def largest(values: list[float], count: int) -> list[bool]:
    """Which are kept of a list; of equal ones the earlier."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    return [i in order[:count] for i in range(len(values))]


def groups(tensor: Tensor, m: int) -> list[list[Any]]:
    """Each m consecutive entries along dimension 1, by going through all the others."""
    flat = tensor.flatten(2) if tensor.dim() > 2 else tensor[..., None]
    out, inputs, kernel = flat.shape
    return [
        [flat[o, i + j, k].item() for j in range(m)]
        for o in range(out)
        for k in range(kernel)
        for i in range(0, inputs, m)
    ]


def with_ties(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-3, 4, shape).float()


@each_shape
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (1, 1), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_n_of_m_is_the_largest_of_each_group(
    shape: tuple[int, ...], n: int, m: int, dtype: torch.dtype
) -> None:
    scores = with_ties(shape).to(dtype)
    mask, count = mask_of(NofM(n, m), scores, n / m)
    assert int(mask.sum()) == count == math.prod(shape) * n // m
    for values, kept in zip(groups(scores, m), groups(mask, m), strict=True):
        assert kept == largest(values, n)


@each_shape
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99, 1])
def test_constant_fan_in_is_the_largest_of_each_row(shape: tuple[int, ...], share: float) -> None:
    scores = with_ties(shape)
    mask, count = mask_of(ConstantFanIn(), scores, share)
    of_row = math.floor(share * math.prod(shape[1:]) + 1e-9)
    assert int(mask.sum()) == count == shape[0] * of_row
    for values, kept in zip(scores.flatten(1).tolist(), mask.flatten(1).tolist(), strict=True):
        assert kept == largest(values, of_row)


@given(n=st.integers(1, 8), m=st.integers(1, 8), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_n_of_m_on_the_way(n: int, m: int, share: float, seed: int) -> None:
    """The smallest whole number of each m that is no less than the share."""
    if n > m or share < n / m:
        return
    torch.manual_seed(seed)
    mask, _ = mask_of(NofM(n, m), torch.rand(3, 2 * m), share)
    kept = {sum(group) for group in groups(mask, m)}
    assert len(kept) == 1
    (count,) = kept
    assert share * m <= count + 1e-5
    assert count < share * m + 1


@pytest.mark.parametrize("type", [NofM(1, 4), ConstantFanIn(), Unstructured()], ids=str)
def test_masks_are_nested(type: Type) -> None:
    scores, within = with_ties((6, 8)), None
    for share in (0.75, 0.5, 0.25):
        mask, count = mask_of(type, scores, share, within)
        assert int(mask.sum()) == count == 48 * share
        assert within is None or not (mask & ~within.unpack()).any()
        within = BitMask.pack(mask)


@pytest.mark.parametrize("type", [NofM(2, 4), ConstantFanIn()], ids=str)
def test_scores_of_entries_that_are_gone_do_not_count(type: Type) -> None:
    scores = torch.tensor([[9.0, 1, 9, 1, 9, 1, 9, 1], [torch.nan, 1, 9, 0, 0, 9, 1, torch.nan]])
    within = BitMask.pack(torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0, 1, 0]]) == 1)
    mask, _ = mask_of(type, scores, 0.5, within)
    assert torch.equal(mask, within.unpack())


def test_a_dense_layer_needs_no_multiple_of_m() -> None:
    pattern = NofM(2, 4)
    some = {"first": size((5, 3)), "second": size((5, 8))}
    shares = {"first": 1.0, "second": 0.5}
    pattern.check(some, shares)
    assert pattern.counts(some, shares) == {"first": 15, "second": 20}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NofM(5, 4), ValueError, "NofM: n must be from 1 to m, got n=5, m=4"),
        (lambda: NofM(0, 4), ValueError, "NofM: n must be from 1 to m, got n=0, m=4"),
        (lambda: NofM(2.0, 4), TypeError, "NofM: n must be a whole number >= 0, got 2.0"),
        (
            lambda: NofM(2, 4).check({"w": size((3, 8))}, 0.5),
            ValueError,
            "NofM(n=2, m=4): it wants a share for each layer, and the distribution has one for all "
            "together; use Uniform or PerLayer",
        ),
        (
            lambda: ConstantFanIn().check({"w": size((3, 8))}, 0.5),
            ValueError,
            "ConstantFanIn(): it wants a share for each layer",
        ),
        (
            lambda: NofM(2, 4).check({"w": size((3, 10))}, {"w": 0.5}),
            ValueError,
            "NofM(n=2, m=4): 'w' has 10 inputs, and a multiple of 4 is wanted",
        ),
        (
            lambda: NofM(2, 4).check({"w": size((3, 8))}, {"w": 0.6}),
            ValueError,
            "NofM(n=2, m=4): 'w' would keep 0.6, which is no whole number of each 4",
        ),
        (
            lambda: NofM(2, 4).check({"w": size((3, 8))}, {"w": 0.25}),
            ValueError,
            "NofM(n=2, m=4): 'w' would keep 0.25, and the least is 2/4",
        ),
        (
            lambda: NofM(2, 4).check({"w": size((3, 8), frozen=2)}, {"w": 0.5}),
            ValueError,
            "NofM(n=2, m=4): 'w' has 2 entries that are frozen by an update_mask or hidden",
        ),
        (
            lambda: ConstantFanIn().check({"w": size((3, 8), frozen=1)}, {"w": 0.5}),
            ValueError,
            "ConstantFanIn(): 'w' has 1 entries that are frozen",
        ),
        (
            lambda: mask_of(NofM(2, 4), torch.full((2, 4), torch.nan), 0.5),
            ValueError,
            "there is a NaN in the scores of 'w'",
        ),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
