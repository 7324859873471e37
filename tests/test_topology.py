"""`pp.Topology`: from and to masks, changes, copies, devices, files, errors."""
# Longer than 350 lines: a third of it is the table of errors.

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppkernels as pp
from ppkernels import BitMask, Topology

# The same examples in every run, as many as are quick.
quick = settings(derandomize=True, deadline=None, max_examples=200, database=None)

SHAPES = ((3, 5), (1, 1), (0, 4), (4, 0), (8, 3, 3, 3), (2, 65_537), (5, 2, 3), (3, 2, 0, 3))


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """A bool tensor of two dimensions or more, from none to all entries set."""
    shape = draw(st.lists(st.integers(0, 6), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.1, 0.5, 1]))


def random_topology(*shape: int) -> Topology:
    return Topology.of_mask(BitMask.pack(torch.rand(shape) < 0.4))


# ---- from and to masks and weights


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_there_and_back(shape: tuple[int, ...], kept: float) -> None:
    tensor = torch.rand(shape) < kept
    mask = BitMask.pack(tensor)
    topology = Topology.of_mask(mask)
    assert topology.mask() == mask
    assert (topology.shape, topology.rows) == (torch.Size(shape), shape[0])
    assert topology.in_features == math.prod(shape[1:])
    assert (topology.count(), topology.numel()) == (mask.count(), mask.numel())
    assert torch.equal(topology.places(), tensor.flatten().nonzero().squeeze(1))
    assert Topology(topology.offsets, topology.columns, shape) == topology
    weight = torch.randn(shape)
    values = topology.gather(weight)
    assert torch.equal(values, weight[tensor])
    assert torch.equal(topology.scatter(values), torch.where(tensor, weight, 0.0))
    assert Topology.of(topology.scatter(values)) == topology
    transposed = topology.transposed()
    assert topology.transposed() is transposed
    assert torch.equal(transposed.order.long().sort().values, torch.arange(topology.count()))


def test_of_keeps_nan_and_drops_both_zeros() -> None:
    weight = torch.tensor([[torch.nan, -0.0, 1e-45], [0.0, torch.inf, 2.0]], requires_grad=True)
    assert Topology.of(weight).places().tolist() == [0, 2, 4, 5]


def test_rows_of_a_transposed_convolution() -> None:
    topology = Topology.of_mask(BitMask.ones((2, 3, 1, 2)))
    offsets, rows, order = topology.transposed()
    # Column k is channel k // 2 and tap k % 2; two entries, of rows 0 and 1, stand in each.
    assert offsets.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert rows.tolist() == [0, 2, 1, 3] * 3
    assert order.tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


# ---- entries dropped and grown


@quick
@given(masks(), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_changed_is_what_a_mask_says(
    mask: Tensor, seed: int, as_bools: bool, ascending: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    topology, places = Topology.of_mask(BitMask.pack(mask)), mask.flatten().nonzero().squeeze(1)
    drop = torch.randperm(len(places), generator=generator)[: len(places) // 2]
    after = mask.flatten().index_fill(0, places[drop], False)
    free = (~after).nonzero().squeeze(1)
    grow = free[torch.randperm(len(free), generator=generator)[: len(free) // 2]]
    after[grow] = True
    if ascending:
        drop, grow = drop.sort().values, grow.sort().values
    before, chosen = copy.deepcopy(topology), drop
    if as_bools:
        chosen = torch.zeros(len(places), dtype=torch.bool).index_fill(0, drop, True)
    changed, origin = topology.changed(chosen, grow)
    assert topology == before
    assert changed == Topology.of_mask(BitMask.pack(after.view(mask.shape)))
    assert Topology(changed.offsets, changed.columns, mask.shape) == changed
    assert (origin.dtype, origin.shape) == (torch.int64, (changed.count(),))
    is_old = origin >= 0
    assert torch.equal(changed.places()[is_old], places[origin[is_old]])
    assert not torch.isin(origin, drop).any()
    # What goes with grow[g] stands where grow.argsort() has g.
    assert torch.equal(changed.places()[~is_old], grow[grow.argsort()])


def test_nothing_dropped_and_nothing_grown() -> None:
    topology, none = random_topology(5, 7), torch.empty(0, dtype=torch.int64)
    changed, origin = topology.changed(none, none)
    assert changed == topology
    assert torch.equal(origin, torch.arange(topology.count()))


# ---- what it is


def test_equality() -> None:
    topology = Topology.of_mask(BitMask.ones((2, 4)))
    assert topology != Topology.of_mask(BitMask.ones((4, 2)))
    assert topology != Topology.of_mask(BitMask.zeros((2, 4)))
    assert topology != Topology.of_mask(BitMask.ones((2, 2, 2)))
    assert topology != "topology"
    assert (topology == None) is False  # noqa: E711 - the comparison itself is tested
    with pytest.raises(TypeError, match="unhashable"):
        hash(topology)


def test_repr() -> None:
    topology = Topology.of(torch.eye(4))
    assert repr(topology) == "Topology(4x4, 4 of 16 kept)"
    assert repr(topology.to("meta")) == "Topology(4x4, 4 of 16 kept, meta)"
    assert repr(random_topology(2, 3, 0, 3)) == "Topology(2x3x0x3, 0 of 0 kept)"


def test_bytes() -> None:
    topology = Topology.of_mask(BitMask.ones((4, 10)))
    assert topology.nbytes == 5 * 4 + 40 * 2
    topology.transposed()
    assert topology.nbytes == 5 * 4 + 40 * 2 + 11 * 4 + 40 * 2 + 40 * 4


def test_a_topology_cannot_be_changed() -> None:
    offsets, columns = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.uint16)
    topology = Topology(offsets, columns, (1, 3))
    columns[0] = 9
    assert topology.columns.tolist() == [0]
    for name in ("offsets", "note", "_shape"):
        with pytest.raises(AttributeError, match=f"immutable, so '{name}' cannot be set"):
            setattr(topology, name, offsets)
    with pytest.raises(AttributeError, match="immutable, so 'shape' cannot be deleted"):
        del topology.shape


# ---- copies, devices, files, threads, modes

COPIES: dict[str, Callable[[Topology], Topology]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda topology: pickle.loads(pickle.dumps(topology)),
}


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("shape", [(5, 7), (2, 65_537), (3, 0)])
def test_copies(duplicate: str, shape: tuple[int, ...]) -> None:
    topology = random_topology(*shape)
    topology.transposed()
    twin = COPIES[duplicate](topology)
    assert type(twin) is Topology
    assert twin == topology
    assert twin.offsets.data_ptr() != topology.offsets.data_ptr()


def test_topologies_go_through_files() -> None:
    topology, file = random_topology(5, 7), io.BytesIO()
    torch.save({"topologies": [topology]}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["topologies"] == [topology]


def test_on_the_meta_device() -> None:
    topology = random_topology(4, 3, 3, 3)
    assert topology.to("cpu") is topology
    there = topology.to("meta")
    assert there.to("meta") is there
    assert Topology(there.offsets, there.columns, topology.shape).count() == topology.count()
    assert there == there
    assert there != topology
    assert there != copy.deepcopy(there)
    here = topology.transposed()
    for index, other in zip(there.transposed(), here, strict=True):
        assert (index.is_meta, index.dtype, index.shape) == (True, other.dtype, other.shape)
    values = there.gather(torch.empty(4, 3, 3, 3, device="meta"))
    assert there.scatter(values).shape == (4, 3, 3, 3)
    assert there.mask().shape == (4, 3, 3, 3)
    with torch.device("meta"):
        twin = copy.deepcopy(topology)
        assert twin.transposed().order.device.type == "cpu"
        assert twin.mask() == topology.mask()


def test_first_calls_in_many_threads() -> None:
    for _ in range(20):
        topology = random_topology(40, 50)
        expected = pp.reference.transpose_topology(topology.offsets, topology.columns, 50, 1)
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(topology.transposed) for _ in range(16)]
        for each in found:
            assert all(map(torch.equal, each.result(), expected))


def test_indices_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        topology = random_topology(6, 5)
        pp.spmm_grad_input(torch.randn(2, 6), torch.randn(topology.count()), topology)
        other, _ = topology.changed(torch.tensor([0]), torch.empty(0, dtype=torch.int64))
        loaded = Topology(topology.offsets, topology.columns, (6, 5))
    for each in (topology, other, loaded):
        values = torch.randn(each.count(), requires_grad=True)
        x = torch.randn(2, 5, requires_grad=True)
        pp.spmm(x, values, each).sum().backward()
        torch.testing.assert_close(x.grad, each.scatter(values).sum(0).expand(2, 5))


# ---- errors

OFFSETS = torch.tensor([0, 1, 3], dtype=torch.int32)
COLUMNS = torch.tensor([2, 0, 1], dtype=torch.uint16)
EYE = Topology.of(torch.eye(4))
NONE = torch.empty(0, dtype=torch.int64)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def indices(offsets: list[int], columns: list[int], shape: tuple[int, ...] = (2, 3)) -> Topology:
    dtype = torch.uint16 if math.prod(shape[1:]) <= 65_536 else torch.int32
    return Topology(
        torch.tensor(offsets, dtype=torch.int32), torch.tensor(columns, dtype=dtype), shape
    )


ERRORS = [
    (lambda: Topology(OFFSETS, COLUMNS, "23"), TypeError, "Topology: shape must be a number or"),
    (lambda: Topology(OFFSETS, COLUMNS, (2, 1.5)), TypeError, "Topology: shape must be a number"),
    (lambda: Topology(OFFSETS, COLUMNS, (2, -3)), ValueError, "Topology: shape must have no neg"),
    (lambda: Topology(OFFSETS, COLUMNS, (6,)), ValueError, "Topology: shape must have two dimen"),
    (
        lambda: Topology(OFFSETS, COLUMNS, (2, 1 << 31, 2)),
        ValueError,
        "Topology: the product of all sizes but the first must be at most 2^31, got 4294967296",
    ),
    (
        lambda: Topology(OFFSETS, COLUMNS, (1 << 20, 2, 1 << 6, 1 << 6)),
        ValueError,
        "Topology: the product of all sizes but the second must be at most 2^31, got 4294967296",
    ),
    (lambda: Topology([0], COLUMNS, (2, 3)), TypeError, "Topology: offsets must be a int32"),
    (lambda: Topology(OFFSETS.long(), COLUMNS, (2, 3)), TypeError, "Topology: offsets must be a"),
    (
        lambda: Topology(OFFSETS, COLUMNS.int(), (2, 3)),
        TypeError,
        "Topology: columns must be a uint16 tensor, got int32",
    ),
    (
        lambda: Topology(OFFSETS, COLUMNS, (2, 65_537)),
        TypeError,
        "Topology: columns must be a int32 tensor, got uint16",
    ),
    (
        lambda: Topology(OFFSETS, COLUMNS, (3, 3)),
        ValueError,
        "Topology: offsets must have shape (4,) and columns one dimension, got (3,) and (3,)",
    ),
    (lambda: Topology(OFFSETS, COLUMNS.view(1, 3), (2, 3)), ValueError, "Topology: offsets must"),
    (
        lambda: Topology(OFFSETS.to("meta"), COLUMNS, (2, 3)),
        ValueError,
        "Topology: offsets and columns must be on one device, got meta and cpu",
    ),
    (
        lambda: Topology(OFFSETS.to("meta"), COLUMNS[:1].to("meta").expand(1 << 31), (2, 3)),
        ValueError,
        "Topology: there can be 2^31 - 1 entries at most, got 2147483648",
    ),
    (lambda: indices([1, 1, 3], [2, 0, 1]), ValueError, "Topology: offsets must begin with 0, ne"),
    (lambda: indices([0, 1, 2], [2, 0, 1]), ValueError, "Topology: offsets must begin with 0, ne"),
    (lambda: indices([0, 4, 3], [2, 0, 1]), ValueError, "Topology: offsets must begin with 0, ne"),
    (lambda: indices([0, -1, 3], [2, 0, 1]), ValueError, "Topology: offsets must begin with 0, n"),
    (lambda: indices([0, 1, 3], [3, 0, 1]), ValueError, "Topology: columns must be >= 0 and < 3"),
    (
        lambda: indices([0, 1, 1], [-1], (2, 65_537)),
        ValueError,
        "Topology: columns must be >= 0 and < 65537",
    ),
    (lambda: indices([0, 1, 3], [2, 1, 1]), ValueError, "Topology: columns must ascend within e"),
    (lambda: indices([0, 2, 3], [2, 1, 1]), ValueError, "Topology: columns must ascend within e"),
    (lambda: indices([0, 1], [0], (1, 0)), ValueError, "Topology: columns must be >= 0 and < 0"),
    (lambda: Topology.of_mask(torch.eye(3)), TypeError, "Topology: mask must be a pp.BitMask, got"),
    (lambda: Topology.of_mask(BitMask.ones(3)), ValueError, "Topology: shape must have two dimens"),
    (
        lambda: Topology.of_mask(BitMask.ones((2, 3), device="meta")),
        ValueError,
        "Topology: mask is on the meta device, where tensors have no values",
    ),
    (lambda: Topology.of(torch.eye(3).int()), TypeError, "Topology: weight must be float32, floa"),
    (lambda: Topology.of([1.0]), TypeError, "Topology: weight must be a torch.Tensor, got list"),
    (lambda: EYE.gather([1.0]), TypeError, "Topology: weight must be a torch.Tensor, got list"),
    (
        lambda: EYE.gather(torch.zeros(2, 8)),
        ValueError,
        "Topology: weight must have shape (4, 4) and be on cpu, got (2, 8) on cpu",
    ),
    (
        lambda: EYE.scatter(torch.zeros(5)),
        ValueError,
        "Topology: values must have shape (4,), one for each entry of the topology, got (5,)",
    ),
    (
        lambda: EYE.changed(torch.zeros(3, dtype=torch.bool), NONE),
        ValueError,
        "Topology.changed: drop as bools must have shape (4,), one for each entry, on cpu, got",
    ),
    (lambda: EYE.changed([1], NONE), TypeError, "Topology.changed: drop must be a int64 tensor"),
    (
        lambda: EYE.changed(NONE, torch.zeros(1)),
        TypeError,
        "Topology.changed: grow must be a int64 tensor, got float32",
    ),
    (
        lambda: EYE.changed(NONE, numbers(1).view(1, 1)),
        ValueError,
        "Topology.changed: grow must have one dimension and be on cpu, got (1, 1) on cpu",
    ),
    (
        lambda: EYE.changed(numbers(3, 4), NONE),
        ValueError,
        "Topology.changed: drop must be positions of entries >= 0 and < 4, got 4",
    ),
    (
        lambda: EYE.changed(numbers(0, -1), NONE),
        ValueError,
        "Topology.changed: drop must be positions of entries >= 0 and < 4, got -1",
    ),
    (lambda: EYE.changed(numbers(2, 0, 2), NONE), ValueError, "Topology.changed: drop has 2 twice"),
    (
        lambda: EYE.changed(NONE, numbers(16)),
        ValueError,
        "Topology.changed: grow must be places >= 0 and < 16, got 16",
    ),
    (lambda: EYE.changed(NONE, numbers(2, 2)), ValueError, "Topology.changed: grow has 2 twice"),
    (
        lambda: EYE.changed(numbers(0), numbers(1, 5)),
        ValueError,
        "Topology.changed: grow has place 5, which is kept already",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=lambda value: str(value)[:70])
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
    assert Topology.of(torch.eye(4)) == EYE


@pytest.mark.skipif(
    pp.cpu_capability() == "reference", reason="the reference takes gigabytes to count 2^31 bits"
)
def test_a_mask_of_more_entries_than_offsets_can_count() -> None:
    mask = BitMask.ones((1 << 16, 1 << 15))
    with pytest.raises(ValueError, match=r"there can be 2\^31 - 1 entries at most, got 2147483648"):
        Topology.of_mask(mask)
    with pytest.raises(RuntimeError, match="a topology can have 2\\^31 - 1 entries, the mask has"):
        torch.ops.ppkernels.topology_of_mask(mask.words, *mask.shape)
