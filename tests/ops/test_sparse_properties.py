"""Random sizes, topologies, geometries, dtypes and layouts: the products are the exact ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppkernels.testing_sparse import (
    CONVOLUTION,
    LINEAR,
    SparseCase,
    channels_last,
    check_sparse_call,
    constant,
    contiguous,
    in_rows_with_gaps,
    repeated,
    share,
    sparse_call,
    transposed,
    unaligned,
    with_gaps,
)

# The same examples in every run, as many as are quick.
quick = settings(derandomize=True, deadline=None, max_examples=150, database=None)

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
patterns = st.sampled_from([share(kept) for kept in (0.0, 0.02, 0.1, 0.4, 1.0)])
biases = st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
_LAYOUTS = (contiguous, transposed, with_gaps, in_rows_with_gaps, unaligned, repeated, constant)


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def linear_cases(draw: st.DrawFn) -> SparseCase:
    return SparseCase(
        "drawn",
        (draw(st.integers(0, 70)), draw(st.integers(0, 150))),
        tuple(draw(st.lists(st.integers(0, 12), max_size=3))),
        draw(patterns),
        draw(st.sampled_from(_LAYOUTS)),
        draw(biases),
        draw(st.booleans()),
    )


@st.composite
def convolution_cases(draw: st.DrawFn) -> SparseCase:
    kernel, padding, dilation = draw(pairs(1, 4)), draw(pairs(0, 4)), draw(pairs(1, 3))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    size = [draw(st.integers(low, low + 20)) for low in least]
    return SparseCase(
        "drawn",
        (draw(st.integers(1, 12)), draw(st.integers(1, 12)), *kernel),
        (draw(st.integers(0, 4)), *size),
        draw(patterns),
        draw(st.sampled_from((*_LAYOUTS, channels_last))),
        draw(biases),
        draw(st.booleans()),
        draw(pairs(1, 4)),
        padding,
        dilation,
    )


@quick
@given(linear_cases(), dtypes, dtypes)
def test_a_linear_layer(case: SparseCase, dtype: torch.dtype, values_dtype: torch.dtype) -> None:
    call = sparse_call(case, dtype, values_dtype)
    for op in LINEAR:
        check_sparse_call(call, op, call.run(op))


@quick
@given(convolution_cases(), dtypes, dtypes)
def test_a_convolution(case: SparseCase, dtype: torch.dtype, values_dtype: torch.dtype) -> None:
    call = sparse_call(case, dtype, values_dtype)
    for op in CONVOLUTION:
        check_sparse_call(call, op, call.run(op))
