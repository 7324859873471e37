"""`pp.Topology`: which entries of a weight are kept, in compressed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppkernels._checks import check_floating, check_has_values
from ppkernels.ops._entries import places_of
from ppkernels.ops.bitmask import BitMask
from ppkernels.ops.topology.checks import (
    LIMIT,
    check_count,
    check_form,
    check_values,
    checked_drop,
    checked_list,
    checked_shape,
)
from ppkernels.ops.topology.op import (
    change_topology,
    gather_kept,
    mask_of_topology,
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
    the first. Entries are in row-major order, as the bits of a `pp.BitMask` are. ``a == b`` is a
    bool: whether shapes and entries are the same, on whatever devices (on the meta device, where
    indices have no values, a topology equals itself alone). Topologies have no hash. torch.save and
    torch.load take them as they are.

    Attributes:
        offsets: int32 [N + 1]: row n has the entries offsets[n] ... offsets[n + 1] − 1.
        columns: [E], uint16 where K ≤ 65536 and int32 above: the column of each entry, ascending
            within a row. Do not write to either.
        shape: the weight's shape, of two dimensions or more.

    Args:
        offsets, columns: as above; they are checked, wherever they come from, and copied.
        shape: as above; K and N·(the product of all sizes but the first two) are at most 2^31.

    Raises:
        TypeError: indices of another dtype, a shape of another kind.
        ValueError: indices that are no topology of the shape: offsets that do not begin with 0,
            descend, or do not end with E; columns that do not ascend within a row or lie outside;
            2^31 entries or more.

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
        sizes = checked_shape(shape)
        check_form(offsets, columns, sizes)
        # First the copy: what is checked is what is kept.
        offsets, columns = _copied(offsets), _copied(columns)
        check_values(offsets, columns, math.prod(sizes[1:]))
        self._set(offsets, columns, sizes)

    def _set(self, offsets: Tensor, columns: Tensor, shape: Sequence[int]) -> None:
        object.__setattr__(self, "_offsets", _normal(offsets))
        object.__setattr__(self, "_columns", _normal(columns))
        object.__setattr__(self, "_shape", torch.Size(shape))
        object.__setattr__(self, "_transposed", None)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Topology: topologies are immutable, so {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Topology: topologies are immutable, so {name!r} cannot be deleted")

    # ---- from and to masks and weights

    @classmethod
    def of_mask(cls, mask: BitMask) -> Topology:
        """The topology of a mask's set bits."""
        if not isinstance(mask, BitMask):
            raise TypeError(f"Topology: mask must be a pp.BitMask, got {type(mask).__name__}")
        sizes = checked_shape(mask.shape)
        check_has_values("Topology", "mask", mask.words)
        if mask.numel() >= LIMIT:
            check_count(mask.count())
        found = topology_of_mask(mask.words, sizes[0], math.prod(sizes[1:]))
        return _made(*found, sizes)

    @classmethod
    def of(cls, weight: Tensor) -> Topology:
        """The topology of a weight's entries that are not 0; NaN is kept."""
        check_floating("Topology", "weight", weight)
        check_has_values("Topology", "weight", weight)
        return cls.of_mask(BitMask.pack(weight.detach() != 0))

    def mask(self) -> BitMask:
        """The mask in which the entries are set."""
        words = mask_of_topology(self._offsets, self._columns, self.in_features)
        return BitMask(words, self._shape)

    def gather(self, weight: Tensor) -> Tensor:
        """The values of ``weight`` at the entries: [E]. Not differentiable.

        Args:
            weight: of this shape and device; any dtype of 1, 2, 4 or 8 bytes, any strides.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"Topology: weight must be a torch.Tensor, got {type(weight).__name__}")
        if weight.shape != self._shape or weight.device != self.device:
            raise ValueError(
                f"Topology: weight must have shape {tuple(self._shape)} and be on {self.device}, "
                f"got {tuple(weight.shape)} on {weight.device}"
            )
        return gather_kept(weight.detach(), self._offsets, self._columns)

    def scatter(self, values: Tensor) -> Tensor:
        """The weight of this shape with ``values`` [E] at the entries and 0 elsewhere.

        Not differentiable; contiguous, of the values' dtype.
        """
        self.check_values("Topology", values)
        rows = scatter_kept(values.detach(), self._offsets, self._columns, self.in_features)
        return rows.view(self._shape)

    def places(self) -> Tensor:
        """Where each entry stands in the flattened weight: int64 [E], ascending."""
        return places_of(self._offsets, self._columns, self.in_features)

    def transposed(self) -> Transposed:
        """The entries column by column, with a tap for each position of a convolution's kernel.

        Made by the first call and kept. Threads that call it at once may each make it; what they
        get is the same.
        """
        kept = self._transposed
        if kept is None:
            taps = math.prod(self._shape[2:])
            found = transpose_topology(self._offsets, self._columns, self.in_features, taps)
            kept = Transposed(*map(_normal, found))
            # A tracer's tensors stand for values that are not there yet: not for anyone else.
            if type(kept.offsets) is Tensor:
                object.__setattr__(self, "_transposed", kept)
        return kept

    # ---- another one, with some entries less and some more

    def changed(self, drop: Tensor, grow: Tensor) -> tuple[Topology, Tensor]:
        """The topology without the entries ``drop`` and with new ones at the places ``grow``.

        In work and memory proportional to the entries, never dense. This topology does not change.

        Args:
            drop: positions of entries, int64 [D] in any order, or a bool for each entry, [E].
            grow: places in the flattened weight, n·K + k for row n and column k, int64 [G] in any
                order: such as are not kept, or are dropped in this call.

        Returns:
            The new topology, of E' = E − D + G entries, and ``origin``, int64 [E']: where each of
            its entries stands among those of this one, −1 for the grown ones. These ascend by
            place: what belongs to grow[g] stands where ``grow.argsort()`` has g.

        Raises:
            TypeError: tensors of another dtype.
            ValueError: positions or places outside or twice, places that are kept already, tensors
                of another shape or device.

        Example::

            new, origin = topology.changed(drop, grow)
            momentum = momentum[origin].masked_fill(origin < 0, 0)
        """
        drop = checked_drop(drop, self._columns)
        grow = checked_list("grow", "places", grow, self.numel(), self.device)
        check_count(self.count() - drop.numel() + grow.numel())
        args = (self._offsets, self._columns, self.in_features, drop, grow)
        *indices, origin, refused = change_topology(*args)
        if not refused.is_meta and (place := int(refused)) >= 0:
            raise ValueError(f"Topology.changed: grow has place {place}, which is kept already")
        return _made(indices[0], indices[1], self._shape), origin

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
        on = "" if self.device.type == "cpu" else f", {self.device}"
        return f"Topology({size}, {self.count()} of {self.numel()} kept{on})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        if self is other or self._columns.is_meta or other._columns.is_meta:
            return self is other
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
        columns = self._columns
        # PyTorch's tensors of uint16 go into files, but not through pickle (2.14).
        if columns.dtype == torch.uint16:
            columns = columns.view(torch.int16)
        return _unpickled, (self._offsets, columns, tuple(self._shape))


def _made(offsets: Tensor, columns: Tensor, shape: Sequence[int]) -> Topology:
    """The topology of indices that are known to be right, without a copy."""
    topology = object.__new__(Topology)
    topology._set(offsets, columns, shape)
    return topology


def _unpickled(offsets: Tensor, columns: Tensor, shape: Sequence[int]) -> Topology:
    """What `Topology.__reduce__` has taken apart."""
    is_narrow = columns.dtype == torch.int16
    return Topology(offsets, columns.view(torch.uint16) if is_narrow else columns, shape)


def _copied(index: Tensor) -> Tensor:
    """A contiguous copy, without a gradient."""
    return index.detach().clone(memory_format=torch.contiguous_format)


def _normal(index: Tensor) -> Tensor:
    """``index`` as autograd can save it, also if it was made in inference mode."""
    if torch.compiler.is_compiling() or not index.is_inference():
        return index
    with torch.inference_mode(False):
        return index.clone()


# torch.load with weights_only=True, its default, makes objects of known classes alone.
torch.serialization.add_safe_globals([Topology, _unpickled])
