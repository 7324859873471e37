"""Types of sparsity: which patterns of kept entries there may be, and the best one by the scores.

A type is a frozen dataclass. Of equal scores the entry with the lower index is kept, so the masks
are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ppkernels._checks import check_whole
from ppkernels._shares import entries_of
from ppkernels.ops import BitMask, topk_mask
from ppkernels.sparsity.weights import Counts, Shares, Size, Weight

# How far a share may be off a whole number of a group: 0.333333 is meant as 1/3.
_NEAR = 1e-6

Within = Mapping[str, BitMask | None]


@runtime_checkable
class Type(Protocol):
    """What a `Pruner` asks of a type of sparsity."""

    def check(self, sizes: Mapping[str, Size], shares: Shares) -> None:
        """Raise unless weights of these sizes can end at these shares."""

    def counts(self, sizes: Mapping[str, Size], shares: Shares) -> Counts:
        """How many entries are kept, of all together or of each; a smaller share, no more."""

    def masks(
        self, ranked: Mapping[str, Weight], counts: Counts, within: Within
    ) -> dict[str, BitMask]:
        """The masks with these counts, of entries whose bit in ``within`` is 1 alone."""


@dataclass(frozen=True)
class Unstructured:
    """Any entry may be kept or pruned: of N the ⌊share · N⌋ with the largest scores are kept."""

    def check(self, sizes: Mapping[str, Size], shares: Shares) -> None:
        """Nothing is wrong with any size or share."""

    def counts(self, sizes: Mapping[str, Size], shares: Shares) -> Counts:
        """⌊share · N⌋, as the share was meant (`entries_of`)."""
        if isinstance(shares, dict):
            return {name: entries_of(shares[name], size.entries) for name, size in sizes.items()}
        return entries_of(shares, sum(size.entries for size in sizes.values()))

    def masks(
        self, ranked: Mapping[str, Weight], counts: Counts, within: Within
    ) -> dict[str, BitMask]:
        """One selection over all weights."""
        return topk_mask(
            {name: weight.stored for name, weight in ranked.items()},
            counts,
            {name: weight.alpha for name, weight in ranked.items()},
            within=within,
        )


@dataclass(frozen=True)
class NofM:
    """N:M sparsity: n of each m consecutive weights along the input dimension.

    The input dimension is that of the layer's input features or channels, dimension 1 of the
    weight; a group of a convolution stays at one place of the kernel. It wants a distribution that
    gives each layer a share, `Uniform` or `PerLayer`, and the share n/m in the end, or a larger
    one that is a whole number of each m, give or take 1e-6: 1 leaves a layer dense. On the way of a
    gradual schedule each group keeps the smallest whole number that is no less than its share: with
    2 of 4 and Cubic, first 4 of 4, then 3 of 4, and 2 of 4 at the end.

    Args:
        n: ≥ 1 and ≤ m.
        m: the size of a group. A layer that is not left dense needs a multiple of it as inputs.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_whole("NofM", "m", self.m, at_least=1)
        check_whole("NofM", "n", self.n, at_least=0)
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NofM: n must be from 1 to m, got n={self.n}, m={self.m}")

    def check(self, sizes: Mapping[str, Size], shares: Shares) -> None:
        """Each share is a whole number of each m; each layer has a multiple of m inputs."""
        for name, share in _of_each(self, shares).items():
            if abs(self._of_group(share) - share * self.m) > _NEAR * self.m:
                raise ValueError(
                    f"{self}: {name!r} would keep {share:g}, which is no whole number of each "
                    f"{self.m}; Uniform with {self.n}/{self.m} for the schedule's share fits, "
                    "and so does PerLayer"
                )
        self.counts(sizes, shares)

    def counts(self, sizes: Mapping[str, Size], shares: Shares) -> Counts:
        """Groups times entries of a group."""
        counts = {}
        for name, share in _of_each(self, shares).items():
            size, kept = sizes[name], self._of_group(share)
            if kept < self.n:
                raise ValueError(
                    f"{self}: {name!r} would keep {share:g}, and the least is {self.n}/{self.m}"
                )
            if kept < self.m:
                _check_whole_weight(self, name, size)
                if size.shape[1] % self.m:
                    raise ValueError(
                        f"{self}: {name!r} has {size.shape[1]} inputs, and a multiple of {self.m} "
                        "is wanted; leave it out with select, or give it the share 1"
                    )
            counts[name] = size.entries // self.m * kept if kept < self.m else size.entries
        return counts

    def masks(
        self, ranked: Mapping[str, Weight], counts: Counts, within: Within
    ) -> dict[str, BitMask]:
        """The largest of each group."""

        def groups_of(keys: Tensor) -> Tensor:
            return keys.movedim(1, -1).reshape(-1, self.m)

        def in_place(kept: Tensor, shape: torch.Size) -> Tensor:
            outputs, inputs, *kernel = shape
            return kept.view(outputs, *kernel, inputs).movedim(-1, 1)

        return _masks_by_row(self, ranked, counts, within, groups_of, in_place)

    def _of_group(self, share: float) -> int:
        """The smallest number of m entries that is no less than the share, a millionth aside."""
        return math.ceil(max(share - _NEAR, 0) * self.m)


@dataclass(frozen=True)
class ConstantFanIn:
    """Each output keeps the same number of inputs: ⌊share · fan_in⌋ in each row of the weight.

    A row is ``weight[i]``, of a convolution with all places of the kernel. It wants a distribution
    that gives each layer a share: `Uniform`, `ERK` or `PerLayer`. Totals, which `ERK` has exact,
    are rounded down to whole numbers a row.
    """

    def check(self, sizes: Mapping[str, Size], shares: Shares) -> None:
        """There is a share for each layer, and no entry is frozen or hidden."""
        self.counts(sizes, shares)

    def counts(self, sizes: Mapping[str, Size], shares: Shares) -> Counts:
        """Rows times entries of a row."""
        counts = {}
        for name, share in _of_each(self, shares).items():
            size = sizes[name]
            counts[name] = size.entries
            if share < 1 and size.entries:
                _check_whole_weight(self, name, size)
                rows = size.shape[0]
                counts[name] = rows * entries_of(share, size.entries // rows)
        return counts

    def masks(
        self, ranked: Mapping[str, Weight], counts: Counts, within: Within
    ) -> dict[str, BitMask]:
        """The largest of each row."""
        return _masks_by_row(
            self,
            ranked,
            counts,
            within,
            lambda keys: keys.flatten(1),
            lambda kept, at: kept.view(at),
        )


def _of_each(wanting: Type, shares: Shares) -> dict[str, float]:
    if not isinstance(shares, dict):
        raise ValueError(
            f"{wanting}: it wants a share for each layer, and the distribution has one for all "
            "together; use Uniform or PerLayer"
        )
    return shares


def _check_whole_weight(wanting: Type, name: str, size: Size) -> None:
    if size.entries != size.shape.numel():
        raise ValueError(
            f"{wanting}: {name!r} has {size.shape.numel() - size.entries} entries that are frozen "
            "by an update_mask or hidden by a mask, which a pattern cannot go around; leave it out "
            "with select, set the masks to None, or, if a pruner has pruned them, load its state"
        )


def _masks_by_row(
    wanting: Type,
    ranked: Mapping[str, Weight],
    counts: Counts,
    within: Within,
    rows_of: Callable[[Tensor], Tensor],
    in_place: Callable[[Tensor, torch.Size], Tensor],
) -> dict[str, BitMask]:
    """The masks that keep as many of the largest in each row of a weight.

    ``rows_of`` makes rows [R, C] of a weight, and ``in_place`` of such rows a tensor of its shape.
    """
    assert isinstance(counts, dict)
    masks = {}
    for name, (stored, _) in ranked.items():
        if all_of_it := _all(stored, counts[name], within[name]):
            masks[name] = all_of_it
            continue
        rows = rows_of(_candidates(wanting, name, stored, within[name]))
        kept = _largest(wanting, name, rows, counts[name] // rows.shape[0])
        masks[name] = BitMask.pack(in_place(kept, stored.shape))
    return masks


def _all(stored: Tensor, count: int, within: BitMask | None) -> BitMask | None:
    """The mask of all entries that may be kept, if ``count`` is their number."""
    within = BitMask.ones(stored.shape, stored.device) if within is None else within
    return within if within.count() == count else None


def _candidates(wanting: Type, name: str, stored: Tensor, within: BitMask | None) -> Tensor:
    """|x|, and −1 where an entry may not be kept."""
    magnitude = stored.detach().abs()
    if within is not None:
        magnitude = magnitude.where(within.unpack(), -1)
    if bool(magnitude.isnan().any()):
        raise ValueError(f"{wanting}: there is a NaN in the scores of {name!r}")
    return magnitude


def _largest(wanting: Type, name: str, keys: Tensor, count: int) -> Tensor:
    """Which ``count`` entries of each row are largest, the earlier of equal ones: bool [R, C]."""
    fewest = int((keys >= 0).sum(1).min()) if keys.numel() else count
    if fewest < count:
        raise ValueError(
            f"{wanting}: {count} of each {keys.shape[1]} entries of {name!r} are to be kept, and "
            f"somewhere {fewest} are left, for it was pruned in another pattern; leave it out with "
            "select"
        )
    order = keys.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, order, True)
