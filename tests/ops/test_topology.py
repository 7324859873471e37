"""The ops on the indices of sparse weights: kernels against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppkernels as pp
from ppkernels.ops import topology as ops
from ppkernels.testing import DTYPES

# The same examples in every run, as many as are quick.
quick = settings(derandomize=True, deadline=None, max_examples=200, database=None)


class Case(NamedTuple):
    """A weight [N, K] of which a share is kept, and the taps of its columns."""

    rows: int
    in_features: int
    taps: int
    kept: float

    def mask(self) -> Tensor:
        return torch.rand(self.rows, self.in_features) < self.kept

    def indices(self) -> tuple[Tensor, Tensor]:
        return pp.reference.topology_of_mask(pp.pack_bits(self.mask()), *self[:2])


CASES = (
    Case(0, 5, 1, 0.5),
    Case(5, 0, 1, 0.5),
    Case(3, 0, 0, 0.5),
    Case(1, 1, 1, 1.0),
    Case(3, 7, 1, 0.0),
    Case(3, 7, 7, 1.0),
    Case(9, 63, 9, 0.3),
    Case(33, 129, 1, 0.1),
    Case(300, 333, 3, 0.5),
    Case(64, 2_304, 9, 0.05),
    Case(2_500, 64, 1, 0.9),
    # Indices of two bytes and of four, of columns and of rows.
    Case(2, 65_536, 1, 0.1),
    Case(2, 65_537, 1, 0.1),
    Case(65_536, 2, 1, 0.5),
    Case(65_537, 2, 1, 0.5),
    Case(7_282, 18, 9, 0.2),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.rows}x{c.in_features}")
each_threads = pytest.mark.parametrize("threads", [1, 2])
each_backend = pytest.mark.parametrize("backend", ["kernels", "reference"])


def assert_same(result: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    """The same dtypes, shapes and numbers, and no strides but those of contiguous tensors."""
    results = result if isinstance(result, tuple) else (result,)
    for one, other in zip(
        results, expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert torch.equal(one, other)


# ---- kernels and reference


@each_threads
@each_case
def test_indices_are_those_of_the_reference(case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    words = pp.pack_bits(case.mask())
    offsets, columns = ops.topology_of_mask(words, case.rows, case.in_features)
    assert_same(
        (offsets, columns), pp.reference.topology_of_mask(words, case.rows, case.in_features)
    )
    assert_same(ops.mask_of_topology(offsets, columns, case.in_features), words)
    args = (offsets, columns, case.in_features)
    assert_same(
        ops.transpose_topology(*args, case.taps),
        pp.reference.transpose_topology(*args, case.taps),
    )
    assert ops.topology_fault(*args) == 0


@each_backend
@each_case
def test_indices_are_those_of_numpy(case: Case, backend: str) -> None:
    mask = case.mask()
    rows, columns = (index.astype(np.int64) for index in mask.numpy().nonzero())
    with pp.backend(backend):
        offsets, found = ops.topology_of_mask(pp.pack_bits(mask), case.rows, case.in_features)
        args = (offsets, found, case.in_features)
        assert torch.equal(ops.mask_of_topology(*args), pp.pack_bits(mask))
        ends, found_rows, order = ops.transpose_topology(*args, case.taps)
    assert np.array_equal(found.numpy(), columns)
    assert np.array_equal(offsets.numpy(), np.searchsorted(rows, np.arange(case.rows + 1)))
    expected = np.lexsort((rows, columns))
    assert np.array_equal(order.numpy(), expected)
    taps = max(case.taps, 1)
    assert np.array_equal(found_rows.numpy(), (rows * taps + columns % taps)[expected])
    each = np.arange(case.in_features + 1)
    assert np.array_equal(ends.numpy(), np.searchsorted(np.sort(columns), each))


LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda weight, taps: weight,
    "transposed": lambda weight, taps: weight.t().contiguous().t(),
    "with gaps": lambda weight, taps: torch.stack([weight, weight], 2)[..., 1],
    "expanded": lambda weight, taps: weight[:, :1].expand(weight.shape),
    "channels last": lambda weight, taps: weight.unflatten(1, (-1, taps, 1)).contiguous(
        memory_format=torch.channels_last
    ),
    "dimensions of one": lambda weight, taps: weight[:, None, :, None],
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES[3:10], ids=lambda c: f"{c.rows}x{c.in_features}")
def test_gather_and_scatter(case: Case, layout: str, dtype: torch.dtype) -> None:
    weight = LAYOUTS[layout](torch.randn(case[:2]).to(dtype), case.taps)
    offsets, columns = case.indices()
    values = ops.gather_kept(weight, offsets, columns)
    assert_same(values, pp.reference.gather_kept(weight, offsets, columns))
    args = (offsets, columns, case.in_features)
    assert_same(ops.scatter_kept(values, *args), pp.reference.scatter_kept(values, *args))
    spread = torch.stack([values, values], 1)[:, 0]
    assert_same(ops.scatter_kept(spread, *args), pp.reference.scatter_kept(values, *args))


@each_threads
@each_case
def test_gather_and_scatter_of_odd_shapes(case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    offsets, columns = case.indices()
    weight = torch.randn(case[:2])
    values = ops.gather_kept(weight, offsets, columns)
    assert_same(values, weight[pp.Topology(offsets, columns, case[:2]).mask().unpack()])
    scattered = ops.scatter_kept(values, offsets, columns, case.in_features)
    assert_same(scattered, pp.reference.scatter_kept(values, offsets, columns, case.in_features))


def test_special_values_keep_their_bits() -> None:
    weight = torch.tensor([[torch.nan, -0.0, torch.inf], [0.0, -torch.nan, 1e-45]])
    topology = pp.Topology.of_mask(pp.BitMask.ones((2, 3)))
    assert torch.equal(
        topology.scatter(topology.gather(weight)).view(torch.int32), weight.view(torch.int32)
    )


def lists_to_change(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions to drop, and places to grow, some of them of what is dropped."""
    places = mask.flatten().nonzero().squeeze(1)
    drop = torch.randperm(len(places))[: len(places) // 3].sort().values
    free = (~mask).flatten().nonzero().squeeze(1)
    grow = free[torch.randperm(len(free))[: len(free) // 4]]
    return drop, torch.cat([grow, places[drop][::2]]).sort().values


@each_threads
@each_case
def test_changes_are_those_of_the_reference(case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    mask = case.mask()
    drop, grow = lists_to_change(mask)
    words = pp.pack_bits(mask)
    args = (*pp.reference.topology_of_mask(words, *case[:2]), case.in_features, drop, grow)
    assert_same(ops.change_topology(*args), pp.reference.change_topology(*args))


@each_threads
@each_case
def test_a_place_that_is_kept_is_refused(case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    offsets, columns = case.indices()
    places = pp.Topology(offsets, columns, case[:2]).places()
    drop, left = torch.arange(0, len(places), 2), places[1::2]
    for grow, first in ((left, left[:1]), (left[-1:], left[-1:]), (places, left[:1])):
        args = (offsets, columns, case.in_features, drop, grow)
        refused = ops.change_topology(*args)[3]
        assert refused == pp.reference.change_topology(*args)[3]
        assert refused == (first if len(first) else -1)


# ---- what is wrong with indices


@st.composite
def broken(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """The indices of a small weight, some of them replaced; perhaps they are right."""
    rows, in_features = draw(st.integers(0, 5)), draw(st.sampled_from([0, 1, 7, 65_537]))
    columns = [sorted(draw(st.sets(st.integers(0, max(in_features - 1, 0)), max_size=3)))] * rows
    if in_features == 0:
        columns = [[]] * rows
    flat = [k for row in columns for k in row]
    offsets = np.cumsum([0, *map(len, columns)]).tolist()
    for _ in range(draw(st.integers(0, 2))):
        offsets[draw(st.integers(0, rows))] = draw(st.sampled_from([-1, 0, 1, 3, 5, 2**31 - 1]))
    for _ in range(draw(st.integers(0, 2)) if flat else 0):
        wrong = st.sampled_from([0, 1, 6, 7, 65_535])
        if in_features > 65_536:
            wrong = st.sampled_from([-1, 0, 1, 65_536, 65_537, 2**31 - 1])
        flat[draw(st.integers(0, len(flat) - 1))] = draw(wrong)
    dtype = torch.int32 if in_features > 65_536 else torch.uint16
    return torch.tensor(offsets, dtype=torch.int32), torch.tensor(flat, dtype=dtype), in_features


@quick
@given(broken())
def test_faults_are_found(indices: tuple[Tensor, Tensor, int]) -> None:
    offsets, columns, in_features = indices
    ends, flat = offsets.tolist(), columns.tolist()
    if ends[0] != 0 or ends[-1] != len(flat) or sorted(ends) != ends:
        expected = 1
    elif any(not 0 <= k < in_features for k in flat):
        expected = 2
    else:
        rows = [flat[a:b] for a, b in pairwise(ends)]
        expected = 0 if all(sorted(set(row)) == row for row in rows) else 3
    for backend in ("kernels", "reference"):
        with pp.backend(backend):
            assert ops.topology_fault(*indices) == expected


# ---- as PyTorch ops


def raw_calls() -> dict[str, tuple[object, ...]]:
    """Arguments for each op under torch.ops.ppkernels."""
    case = Case(5, 12, 4, 0.5)
    mask = case.mask()
    words = pp.pack_bits(mask)
    indices = pp.reference.topology_of_mask(words, 5, 12)
    return {
        "topology_of_mask": (words, 5, 12),
        "mask_of_topology": (*indices, 12),
        "transpose_topology": (*indices, 12, 4),
        "gather_kept": (torch.randn(5, 3, 2, 2), *indices),
        "scatter_kept": (torch.randn(len(indices[1])), *indices, 12),
        "change_topology": (*indices, 12, *lists_to_change(mask)),
        "topology_fault": (*indices, 12),
    }


@pytest.mark.parametrize("op", raw_calls())
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.ppkernels, op).default, raw_calls()[op])


@pytest.mark.parametrize("op", [op for op in raw_calls() if op != "topology_of_mask"])
def test_meta_tensors_give_shapes_and_dtypes(op: str) -> None:
    args = raw_calls()[op]
    there = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
    results, shapes = (getattr(torch.ops.ppkernels, op)(*each) for each in (args, there))
    as_tuple = (results,) if isinstance(results, Tensor) else results
    for result, shape in zip(
        as_tuple, (shapes,) if isinstance(shapes, Tensor) else shapes, strict=True
    ):
        assert shape.is_meta
        assert (shape.dtype, shape.shape) == (result.dtype, result.shape)


INDICES = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2], dtype=torch.uint16))
LONG = torch.tensor([0])
BEYOND = torch.tensor([0, 2], dtype=torch.int32)
RAW_ERRORS = [
    ("topology_of_mask", (torch.zeros(2, dtype=torch.uint8), 1, 3), "words must be"),
    ("topology_of_mask", (torch.zeros(0, dtype=torch.uint8), -1, 0), "rows and in_features must"),
    ("mask_of_topology", (LONG, INDICES[1], 3), "offsets must be a contiguous 1-dim CPU tensor"),
    ("mask_of_topology", (BEYOND, INDICES[1], 3), "offsets must begin with 0 and end with"),
    (
        "mask_of_topology",
        (INDICES[0][:0], INDICES[1], 3),
        "offsets must have a number for each row",
    ),
    ("transpose_topology", (*INDICES, 65_537, 1), "columns must be a contiguous 1-dim CPU tensor"),
    ("transpose_topology", (*INDICES, 3, 1 << 32), "rows \\* taps must be at most 2\\^31"),
    ("transpose_topology", (*INDICES, 3, 0), "taps must be a divisor of in_features, got 0"),
    ("gather_kept", (torch.zeros(2, 3), *INDICES), "weight must have a row for each"),
    ("gather_kept", (torch.zeros(1, 3, dtype=torch.cdouble), *INDICES), "weight must be a CPU"),
    ("scatter_kept", (torch.zeros(2), *INDICES, 3), "values must have shape \\(1\\), one"),
    ("change_topology", (*INDICES, 3, LONG.int(), LONG), "drop must be a contiguous 1-dim CPU"),
    ("change_topology", (*INDICES, 3, torch.arange(2), LONG[:0]), "a topology can have 2"),
    ("topology_fault", (INDICES[0], INDICES[1].int(), 3), "columns must be a contiguous 1-dim CPU"),
]


@pytest.mark.skipif(pp.cpu_capability() == "reference", reason="what the compiled kernels check")
@pytest.mark.parametrize(("op", "args", "message"), RAW_ERRORS)
def test_the_raw_ops_refuse_what_they_would_misread(
    op: str, args: tuple[object, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(torch.ops.ppkernels, op)(*args)
