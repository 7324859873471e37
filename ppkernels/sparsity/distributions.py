"""Distributions: how the share that is kept is spread over the layers.

A distribution is a frozen dataclass with one method ``shares``: of the sizes of the weights and the
share to keep in all it makes one share for all weights together, or one for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from typing import Protocol, runtime_checkable

from ppkernels._shares import check_share, entries_of
from ppkernels.sparsity.weights import Shares, Size


@runtime_checkable
class Distribution(Protocol):
    """What a `Pruner` asks of a distribution."""

    def shares(self, sizes: Mapping[str, Size], kept: float | None) -> Shares:
        """The share to keep of all weights together, or of each by itself."""


@dataclass(frozen=True)
class Global:
    """All weights are ranked together: exactly ⌊kept · N⌋ of the N of all layers are kept."""

    def shares(self, sizes: Mapping[str, Size], kept: float | None) -> Shares:
        """``kept`` itself."""
        return _given("Global", kept)


@dataclass(frozen=True)
class Uniform:
    """Every layer keeps the same share: ⌊kept · n⌋ of its n weights.

    Args:
        factors: by the names of layers: such a layer keeps min(1, factor · kept) instead. The
            recipe of Powerpropagation's authors has the output layer keep min(1, 2 · kept):
            ``Uniform({"output": 2})``.
    """

    factors: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.factors, Mapping):
            raise TypeError(
                "Uniform: factors must be a mapping from names of layers to numbers, got "
                f"{type(self.factors).__name__}"
            )
        for name, factor in self.factors.items():
            if not isinstance(factor, Real) or isinstance(factor, bool):
                raise TypeError(f"Uniform: the factor of {name!r} must be a number, got {factor!r}")
            if not 0 < factor < math.inf:
                raise ValueError(
                    f"Uniform: the factor of {name!r} must be finite and above 0, got {factor}"
                )

    def shares(self, sizes: Mapping[str, Size], kept: float | None) -> Shares:
        """``kept``, or min(1, factor · kept), for each."""
        share = _given("Uniform", kept)
        factors = _by_weight("Uniform", self.factors, sizes)
        return {name: min(1.0, float(factors.get(name, 1)) * share) for name in sizes}


@dataclass(frozen=True)
class ERK:
    """Erdős–Rényi-Kernel: layers with few weights for their width keep a larger share.

    A layer of shape s keeps min(1, ε·Σs / Πs), for a linear layer min(1, ε·(in + out) / (in·out)),
    with one ε for all, such that exactly ⌊kept · N⌋ weights are kept in all at the end of the
    schedule. What is left over after rounding down goes, one weight a layer, where most was rounded
    off.

    Source: Evci et al., "Rigging the lottery: making all tickets winners", 2020, section 3.
    """

    def shares(self, sizes: Mapping[str, Size], kept: float | None) -> Shares:
        """Each layer's count, as a share of it."""
        total = sum(size.entries for size in sizes.values())
        counts = _spread(
            {name: size.entries for name, size in sizes.items()},
            {name: _erk_weight(size) for name, size in sizes.items()},
            entries_of(_given("ERK", kept), total),
        )
        return {
            name: counts[name] / size.entries if size.entries else 1.0
            for name, size in sizes.items()
        }


@dataclass(frozen=True)
class PerLayer:
    """Each layer keeps its own share: ⌊kept[name] · n⌋ of its n weights.

    So the schedule has none: ``Pruner(model, OneShot(None), distribution=PerLayer({...}))``; in a
    gradual one each layer goes the curve to its own share.

    Args:
        kept: by the names of all layers that are pruned, shares from 0 to 1.
    """

    kept: Mapping[str, float] = field(hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kept, Mapping):
            raise TypeError(
                "PerLayer: kept must be a mapping from names of layers to shares, got "
                f"{type(self.kept).__name__}"
            )
        for name, share in self.kept.items():
            check_share("PerLayer", f"kept[{name!r}]", share)

    def shares(self, sizes: Mapping[str, Size], kept: float | None) -> Shares:
        """The shares given."""
        if kept is not None:
            raise ValueError(
                "PerLayer: it has the shares itself, so that of the schedule, or of prune(), must "
                f"be None, got {kept}"
            )
        kept_of = _by_weight("PerLayer", self.kept, sizes)
        missing = [name for name in sizes if name not in kept_of]
        if missing:
            raise ValueError(
                f"PerLayer: there is no share for {missing[0]!r}; name it too (1 keeps all), or "
                "leave the layer out with select"
            )
        return {name: check_share("PerLayer", f"kept[{name!r}]", kept_of[name]) for name in sizes}


def _erk_weight(size: Size) -> Fraction:
    """What a layer's number of kept weights is proportional to, until it keeps all: exact."""
    if size.entries == 0:
        return Fraction(0)
    return Fraction(size.entries * sum(size.shape), math.prod(size.shape))


def _spread(
    sizes: Mapping[str, int], weights: Mapping[str, Fraction], total: int
) -> dict[str, int]:
    """Numbers that add up to ``total``, proportional to ``weights`` but at most ``sizes``."""
    open_names = [name for name, size in sizes.items() if size > 0]
    counts = dict.fromkeys(sizes, 0)
    while open_names:
        left = total - sum(counts.values())
        scale = left / sum((weights[name] for name in open_names), Fraction(0))
        full = [name for name in open_names if scale * weights[name] >= sizes[name]]
        if not full:
            break
        for name in full:
            counts[name] = sizes[name]
        open_names = [name for name in open_names if name not in full]
    wanted = {name: scale * weights[name] for name in open_names}
    for name, number in wanted.items():
        counts[name] = math.floor(number)
    # The largest remainder first; of equal ones the earlier layer.
    by_remainder = sorted(open_names, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _given(distribution: str, kept: float | None) -> float:
    if kept is None:
        raise ValueError(
            f"{distribution}: the share to keep must be a number from 0 to 1, got None; only "
            "PerLayer has the shares itself"
        )
    return check_share(distribution, "kept", kept)


def _by_weight(
    distribution: str, given: Mapping[str, float], sizes: Mapping[str, Size]
) -> dict[str, float]:
    """``given`` by the first names of weights; layers that share one must agree."""
    first = {also: name for name, size in sizes.items() for also in size.also}
    found: dict[str, float] = {}
    for name, value in given.items():
        weight = first.get(name, name)
        if weight not in sizes:
            raise ValueError(
                f"{distribution}: {name!r} is none of the layers to prune, which are "
                f"{', '.join(map(repr, [*sizes, *first]))}"
            )
        if found.setdefault(weight, value) != value:
            raise ValueError(
                f"{distribution}: {name!r} shares its weight with other layers, the first of which "
                f"is {weight!r}, so they need the same number; got {value} and {found[weight]}"
            )
    return found
