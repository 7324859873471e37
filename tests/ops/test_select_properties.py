"""Random lists of tensors: kernels, reference and Python's sort agree on every bit."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppkernels as pp
from ppkernels import BitMask
from ppkernels.testing import DTYPES, random_bits
from ppkernels.testing_selection import KINDS, Selection, check_selection, weights

# The same examples in every run, as many as are quick.
quick = settings(derandomize=True, deadline=None, max_examples=300, database=None)


@st.composite
def tensor(draw: st.DrawFn, generator: torch.Generator) -> Tensor:
    """Weights of any dtype, shape and strides, without NaN."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 9), max_size=3)) + draw(st.sampled_from([[], [70], [999]]))
    kind = draw(st.sampled_from([*KINDS, "bits"]))
    count = math.prod(shape)
    values = (
        random_bits(count, dtype, generator)
        if kind == "bits"
        else weights(dtype, count, kind, generator)
    )
    values = torch.where(values.isnan(), 0.0, values).reshape(shape)
    if shape and draw(st.booleans()):
        values = values[..., :: draw(st.integers(1, 3))]
    return values.permute(draw(st.permutations(range(len(shape)))))


@st.composite
def calls(draw: st.DrawFn) -> Selection:
    """Tensors, how many to keep together or of each, exponents, and masks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = draw(st.lists(tensor(generator), min_size=1, max_size=4))
    within: list[BitMask | None] | None = None
    sizes = [each.numel() for each in tensors]
    if draw(st.booleans()):
        within = [BitMask.pack(torch.rand(t.shape, generator=generator) < 0.6) for t in tensors]
        within[0] = None
        sizes = [n if m is None else m.count() for n, m in zip(sizes, within, strict=True)]
    each = [draw(st.integers(0, size)) for size in sizes]
    k = each if draw(st.booleans()) else draw(st.integers(0, sum(sizes)))
    # Float64 under other exponents is ranked by rounded logarithms: left to the reference's test.
    alphas = [1.5] * len(tensors)
    if draw(st.booleans()) and all(t.dtype != torch.float64 for t in tensors):
        alphas = [draw(st.sampled_from([1.0, 1.5, 2.0, 3.7])) for _ in tensors]
    return Selection("drawn", tensors, k, alphas, within)


@quick
@given(calls())
def test_masks_are_those_of_a_sort(call: Selection) -> None:
    check_selection(call)


@quick
@given(calls(), st.lists(st.sampled_from([1.0, 1.25, 2.0, 4.0]), min_size=4, max_size=4))
def test_kernels_are_the_reference(call: Selection, alphas: list[float]) -> None:
    args = (call.tensors, call.k, alphas[: len(call.tensors)])
    masks = pp.topk_mask(*args, within=call.within)
    with pp.backend("reference"):
        assert pp.topk_mask(*args, within=call.within) == masks


@quick
@given(calls(), st.integers(0, 50))
def test_more_entries_keep_the_ones_there_were(call: Selection, fewer: int) -> None:
    def masks(k: int) -> list[BitMask]:
        return pp.topk_mask(call.tensors, k, call.alphas, within=call.within)

    k = call.k if isinstance(call.k, int) else sum(call.k)
    for few, many in zip(masks(max(k - fewer, 0)), masks(k), strict=True):
        assert (few - many).count() == 0


@quick
@given(calls(), st.sampled_from([2.0, -0.5, 1024.0]))
def test_a_common_power_of_two_and_signs_change_nothing(call: Selection, factor: float) -> None:
    tensors = [t for t in call.tensors if t.dtype in (torch.float32, torch.float64)]
    tensors = [t.clamp(-1e30, 1e30) * (t.abs() > 1e-30) for t in tensors]
    if not tensors:
        return
    k = sum(t.numel() for t in tensors) // 3
    scaled = [t * factor for t in tensors]
    assert pp.topk_mask(scaled, k) == pp.topk_mask(tensors, k)
