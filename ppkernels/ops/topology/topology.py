"""`pp.Topology`: which entries of a weight are kept, in compressed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppkernels._checks import check_floating, check_tensor
from ppkernels.ops._entries import index_dtype, places_of
from ppkernels.ops.bitmask import BitMask
from ppkernels.ops.topology.op import (
    gather_kept,
    scatter_kept,
    topology_of_mask,
    transpose_topology,
)


class Transposed(NamedTuple):
    """The entries of a topology column by column, as `transpose_topology` gives them."""

    offsets: Tensor
    rows: Tensor
    order: Tensor


class Topology:
    """Which entries of a weight are kept, immutable: the indices beside the kept values.

    The weight [N, ...] is taken as the matrix [N, K] of its rows, K = the product of all sizes but
    the first. Entries are in row-major order, as the bits of a `pp.BitMask` are.

    Attributes:
        offsets: int32 [N + 1]: row n has the entries offsets[n] ... offsets[n + 1] − 1.
        columns: [E], uint16 where K ≤ 65536 and int32 above: the column of each entry, ascending
            within a row. Do not write to either.
        shape: the weight's shape, of two dimensions or more.

    Args:
        offsets, columns: as above; they are checked, and copied.
        shape: as above.

    Raises:
        TypeError: indices of another dtype, a shape of another kind.
        ValueError: indices that are no topology of the shape: offsets that do not begin with 0,
            descend, or do not end with E; columns that do not ascend within a row or lie outside.

    Example::

        topology = pp.Topology.of(layer.weight)     # where it is not 0
        values = topology.gather(layer.weight)      # [E]
        y = pp.spmm(x, values, topology, layer.bias)
    """

    __slots__ = ("_columns", "_offsets", "_shape", "_transposed")
    __hash__ = None  # type: ignore[assignment]

    _shape: torch.Size
    _offsets: Tensor
    _columns: Tensor
    _transposed: Transposed | None

    def __init__(self, offsets: Tensor, columns: Tensor, shape: Sequence[int]) -> None:
        sizes = _checked_shape(shape)
        _check_indices(offsets, columns, sizes)
        self._set(offsets.detach().clone(), columns.detach().clone(), sizes)

    def _set(self, offsets: Tensor, columns: Tensor, shape: Sequence[int]) -> None:
        self._offsets, self._columns = _savable(offsets), _savable(columns)
        self._shape = torch.Size(shape)
        self._transposed = None

    # ---- from and to masks and weights

    @classmethod
    def of_mask(cls, mask: BitMask) -> Topology:
        """The topology of a mask's set bits."""
        if not isinstance(mask, BitMask):
            raise TypeError(f"Topology: mask must be a pp.BitMask, got {type(mask).__name__}")
        sizes = _checked_shape(mask.shape)
        found = topology_of_mask(mask.words, sizes[0], math.prod(sizes[1:]))
        return _made(*found, sizes)

    @classmethod
    def of(cls, weight: Tensor) -> Topology:
        """The topology of a weight's entries that are not 0; NaN is kept."""
        check_floating("Topology", "weight", weight)
        return cls.of_mask(BitMask.pack(weight.detach() != 0))

    def mask(self) -> BitMask:
        """The mask in which the entries are set."""
        bits = torch.zeros(math.prod(self._shape), dtype=torch.bool, device=self.device)
        bits[self.places()] = True
        return BitMask.pack(bits.view(self._shape))

    def gather(self, weight: Tensor) -> Tensor:
        """The values of ``weight``, of this shape, at the entries: [E]. Not differentiable."""
        if weight.shape != self._shape:
            raise ValueError(
                f"Topology: weight must have shape {tuple(self._shape)}, got {tuple(weight.shape)}"
            )
        rows = weight.detach().reshape(self.rows, self.in_features)
        return gather_kept(rows, self._offsets, self._columns)

    def scatter(self, values: Tensor) -> Tensor:
        """The weight of this shape with ``values`` [E] at the entries and 0 elsewhere."""
        self.check_values("Topology", values)
        rows = scatter_kept(values.detach(), self._offsets, self._columns, self.in_features)
        return rows.view(self._shape)

    def places(self) -> Tensor:
        """Where each entry stands in the flattened weight: int64 [E], ascending."""
        return places_of(self._offsets, self._columns, self.in_features)

    def transposed(self) -> Transposed:
        """The entries column by column, with a tap for each position of a convolution's kernel.

        Made by the first call and kept.
        """
        if self._transposed is None:
            taps = math.prod(self._shape[2:])
            found = transpose_topology(self._offsets, self._columns, self.in_features, taps)
            transposed = Transposed(*map(_savable, found))
            if type(transposed.offsets) is not Tensor:
                return transposed  # a tracer's, which has no values
            self._transposed = transposed
        return self._transposed

    # ---- what it is

    @property
    def offsets(self) -> Tensor:
        return self._offsets

    @property
    def columns(self) -> Tensor:
        return self._columns

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def rows(self) -> int:
        """N."""
        return self._shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return math.prod(self._shape[1:])

    @property
    def device(self) -> torch.device:
        return self._columns.device

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors; the transposed indices count once they are made."""
        tensors = (self._offsets, self._columns, *(self._transposed or ()))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def count(self) -> int:
        """How many entries there are: E."""
        return self._columns.numel()

    def numel(self) -> int:
        """How many entries the weight has, kept or not."""
        return math.prod(self._shape)

    def check_values(self, op: str, values: Tensor) -> None:
        """``values`` are those of the entries: floating, [E], on the same device."""
        check_floating(op, "values", values)
        if values.shape != self._columns.shape:
            raise ValueError(
                f"{op}: values must have shape ({self.count()},), one for each entry of the "
                f"topology, got {tuple(values.shape)}"
            )
        if values.device != self.device:
            raise ValueError(
                f"{op}: values must be on the device of the topology, {self.device}, got "
                f"{values.device}"
            )

    def __repr__(self) -> str:
        size = "x".join(map(str, self._shape))
        on = "" if self.device.type in ("cpu", "meta") else f", {self.device}"
        return f"Topology({size}, {self.count()} of {self.numel()} kept{on})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        return (
            self._shape == other._shape
            and torch.equal(self._offsets, other._offsets.to(self.device))
            and torch.equal(self._columns, other._columns.to(self.device))
        )

    # ---- devices and copies

    def to(self, device: torch.device | str | int) -> Topology:
        """The topology on another device; itself if it is there already."""
        moved = [index.to(torch.device(device)) for index in (self._offsets, self._columns)]
        if moved[1] is self._columns:
            return self
        return _made(moved[0], moved[1], self._shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Topology:
        return _made(self._offsets.clone(), self._columns.clone(), self._shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Topology, (self._offsets, self._columns, tuple(self._shape))


def _made(offsets: Tensor, columns: Tensor, shape: Sequence[int]) -> Topology:
    """The topology of indices that are known to be right, without a copy."""
    topology = object.__new__(Topology)
    topology._set(offsets, columns, shape)
    return topology


def _savable(index: Tensor) -> Tensor:
    """``index``, or a copy if it was made in inference mode: autograd saves no such tensor."""
    if torch.compiler.is_compiling() or not index.is_inference():
        return index
    with torch.inference_mode(False):
        return index.clone()


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if len(sizes) < 2 or any(size < 0 for size in sizes):
        raise ValueError(f"Topology: shape must have two dimensions or more, got {sizes}")
    return sizes


def _check_indices(offsets: Tensor, columns: Tensor, shape: tuple[int, ...]) -> None:
    """The indices are those of a topology of ``shape``: kernels read memory by them."""
    rows, in_features = shape[0], math.prod(shape[1:])
    check_tensor("Topology", "offsets", offsets, torch.int32)
    check_tensor("Topology", "columns", columns, index_dtype(in_features))
    if offsets.shape != (rows + 1,) or columns.dim() != 1:
        raise ValueError(
            f"Topology: offsets must have shape ({rows + 1},) and columns one dimension, got "
            f"{tuple(offsets.shape)} and {tuple(columns.shape)}"
        )
    if offsets.device != columns.device:
        raise ValueError(
            f"Topology: offsets and columns must be on one device, got {offsets.device} and "
            f"{columns.device}"
        )
    ends = offsets.long()
    if ends[0] != 0 or ends[-1] != columns.numel() or (ends.diff() < 0).any():
        raise ValueError(
            "Topology: offsets must begin with 0, never descend, and end with the number of "
            f"columns, {columns.numel()}"
        )
    if columns.numel() == 0:
        return
    wide = columns.long()
    if wide.min() < 0 or wide.max() >= in_features:
        raise ValueError(f"Topology: columns must be in 0 ... {in_features - 1}")
    if (places_of(offsets, columns, in_features).diff() <= 0).any():
        raise ValueError("Topology: columns must ascend within each row")


def check_topology(op: str, topology: Topology) -> None:
    """``topology`` is one."""
    if not isinstance(topology, Topology):
        raise TypeError(f"{op}: topology must be a pp.Topology, got {type(topology).__name__}")


# torch.load with weights_only=True, its default, makes objects of known classes alone.
torch.serialization.add_safe_globals([Topology])
