"""`Pruner`: prunes a model's weights when its schedule says so."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ppkernels import _powered
from ppkernels._powered import PoweredLayer
from ppkernels._shares import check_share
from ppkernels.ops import BitMask, apply_mask
from ppkernels.sparsity.distributions import Distribution, Global
from ppkernels.sparsity.schedules import Schedule
from ppkernels.sparsity.scores import Magnitude, Score
from ppkernels.sparsity.types import Type, Unstructured
from ppkernels.sparsity.weights import Counts, Size, Weight

Select = Callable[[str, nn.Module], bool] | Iterable[str]


@dataclass(frozen=True)
class Kept:
    """How many weights of a model are left. Frozen and hidden entries are not counted.

    Attributes:
        counts: by layer, the entries that are not pruned.
        entries: by layer, the entries that are or may be pruned.
    """

    counts: dict[str, int]
    entries: dict[str, int]

    @property
    def count(self) -> int:
        """The entries of all layers that are not pruned."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Their share; 1 of no entries."""
        return _share(self.count, sum(self.entries.values()))

    @property
    def shares(self) -> dict[str, float]:
        """The share of each layer."""
        return {name: _share(count, self.entries[name]) for name, count in self.counts.items()}

    def __str__(self) -> str:
        rows = [
            f"{name}: {count} of {self.entries[name]} ({self.shares[name]:.2%})"
            for name, count in self.counts.items()
        ]
        total = f"{self.count} of {sum(self.entries.values())} ({self.share:.2%}) kept"
        return "\n".join([*rows, total])


def _share(count: int, entries: int) -> float:
    return count / entries if entries else 1.0


class Pruner:
    """Prunes the weights of a model when a schedule says so; the training loop stays yours.

    Four choices that do not know each other: what a weight is worth (``score``), when how much goes
    (``schedule``), how that is spread over the layers (``distribution``), in which pattern
    (``type``). ::

        pruner = pp.sparsity.Pruner(model, Cubic(kept=0.05, begin=1000, end=9000, every=100))
        for images, labels in loader:
            optimizer.zero_grad()
            loss_of(model(images), labels).backward()
            optimizer.step()
            pruner.step()

    A pruned entry is a 0 in the weight, and in the layer's ``update_mask`` a 0 that keeps it there:
    the forward pass knows nothing of it and costs nothing more. Pruned entries stay pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        score: Score = Magnitude(),
        distribution: Distribution = Global(),
        type: Type = Unstructured(),
        select: Select | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Pruner: model must be a torch.nn.Module, got {model.__class__.__name__}"
            )
        self.model = _unwrapped(model)
        self.schedule, self.score = schedule, score
        self.distribution, self.type = distribution, type
        self.steps = 0
        self.prunings = 0
        self._layers = _chosen(self.model, select)
        # The entries of each weight that are not pruned; none of a weight that is whole.
        self._kept: dict[str, BitMask] = {}
        sizes = self._sizes(self._weights())
        self.type.check(sizes, self.distribution.shares(sizes, schedule.kept))

    # ---- when

    def step(self) -> bool:
        """Count a step, and prune if the schedule says so; call it after each optimizer.step().

        Returns:
            Whether it has pruned.

        Raises:
            RuntimeError: a schedule that begins at step 0, before the first step, without a call of
                `prune` there; see `prune` for all others. Nothing is changed then, nor counted.
        """
        if self.prunings == 0 and self.schedule.is_due(0):
            raise RuntimeError(
                f"Pruner.step: {self.schedule} prunes at step 0; call prune() before the first step"
            )
        step = self.steps + 1
        is_due = self.schedule.is_due(step)
        if is_due:
            self._prune(
                self.schedule.kept, lambda kept: self.schedule.share(step, kept), may_be_ahead=True
            )
        self.steps = step
        return is_due

    def prune(self, kept: float | None = None) -> None:
        """Prune now, whatever the schedule says, down to ``kept``.

        Args:
            kept: the share to keep, from 0 to 1, of all entries that are or may be pruned; by
                default what the schedule keeps in the end.

        Raises:
            ValueError: a share that is none, or above what is left; a NaN in a score; what
                distribution or type do not take.
            RuntimeError: a score of gradients where there are none; a weight that torch.nn.utils
                has parametrized or pruned. Nothing is changed when an error is raised.
        """
        final = self.schedule.kept if kept is None else check_share("Pruner.prune", "kept", kept)
        self._prune(final, lambda share: share, may_be_ahead=False)

    def _prune(
        self, kept: float | None, part: Callable[[float], float], *, may_be_ahead: bool
    ) -> None:
        weights = self._weights()
        within = {name: self._within(name, weight) for name, weight in weights.items()}
        sizes = self._sizes(weights)
        shares = self.distribution.shares(sizes, kept)
        if isinstance(shares, dict):
            shares = {name: part(share) for name, share in shares.items()}
        else:
            shares = part(shares)
        left = {
            name: weight.numel() if (mask := within[name]) is None else mask.count()
            for name, weight in weights.items()
        }
        counts = _at_most(self.type.counts(sizes, shares), left, may_be_ahead)
        ranked = self.score.of({name: self._ranked(name) for name in weights})
        masks = self.type.masks(ranked, counts, within)
        for name, mask in masks.items():
            self._apply(name, weights[name], mask, within[name])
        self.prunings += 1

    def _apply(
        self, name: str, weight: nn.Parameter, mask: BitMask, within: BitMask | None
    ) -> None:
        """Prune the entries of ``within`` that are not in ``mask``."""
        kept = mask if within is None else mask | (self._kept_of(name, weight) - within)
        self._kept[name] = kept
        self._freeze(weight, kept)

    def _freeze(self, weight: nn.Parameter, kept: BitMask) -> None:
        """Set the entries that are not kept to 0, and see that they stay so."""
        if kept.count() == kept.numel():
            return
        with torch.no_grad():
            weight.copy_(apply_mask(weight.detach(), kept.words))
        for layer in _powered.layers_of(weight):
            layer.update_mask = kept if layer.update_mask is None else layer.update_mask & kept

    # ---- what is left

    def kept(self) -> Kept:
        """How many weights are left, by layer and in all."""
        weights = self._weights()
        entries = {name: size.entries for name, size in self._sizes(weights).items()}
        counts = {}
        for name, weight in weights.items():
            mask = self._within(name, weight)
            counts[name] = weight.numel() if mask is None else mask.count()
        return Kept(counts, entries)

    # ---- the weights

    def _weights(self) -> dict[str, nn.Parameter]:
        """The weights to prune by the name of their layer; one that layers share comes once."""
        weights: dict[str, nn.Parameter] = {}
        seen = set()
        for name, layer in self._layers.items():
            weight = _powered.weight_parameter(layer)
            if weight is None:
                raise RuntimeError(
                    f"Pruner: the weight of {name!r} is no longer a Parameter of its own "
                    "(torch.nn.utils.prune, parametrize or weight_norm has replaced it)"
                )
            if id(weight) not in seen:
                seen.add(id(weight))
                weights[name] = weight
        return weights

    def _ranked(self, name: str) -> Weight:
        layer = self._layers[name]
        return Weight(layer.weight, layer.alpha if layer.stores == "phi" else None)

    def _kept_of(self, name: str, weight: nn.Parameter) -> BitMask:
        kept = self._kept.get(name)
        return BitMask.ones(weight.shape, weight.device) if kept is None else kept.to(weight.device)

    def _within(self, name: str, weight: nn.Parameter) -> BitMask | None:
        """The entries that may be pruned: not pruned yet, trained, and seen; None, all of them."""
        masks = [self._kept_of(name, weight)] if name in self._kept else []
        layers = _powered.layers_of(weight)
        masks += [layer.update_mask for layer in layers if layer.update_mask is not None]
        seen = [layer.mask for layer in layers if layer.mask is not None]
        if seen and len(seen) == len(layers):
            masks.append(functools.reduce(operator.or_, seen))
        return functools.reduce(operator.and_, masks) if masks else None

    def _sizes(self, weights: dict[str, nn.Parameter]) -> dict[str, Size]:
        sizes = {}
        for name, weight in weights.items():
            within = self._within(name, weight)
            entries = weight.numel()
            if within is not None:
                pruned = ~self._kept_of(name, weight)
                entries = (within | pruned).count()
            sizes[name] = Size(weight.shape, entries)
        return sizes


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # the class would have to be imported with the compiler
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def _chosen(model: nn.Module, select: Select | None) -> dict[str, PoweredLayer]:
    layers = _powered.powered_layers(model)
    if callable(select):
        layers = {
            name: layer for name, layer in layers.items() if select(name, cast(nn.Module, layer))
        }
    elif select is not None:
        layers = {name: layers[name] for name in select}
    if not layers:
        raise ValueError(f"Pruner: {type(model).__name__} holds no layer to prune")
    return layers


def _at_most(counts: Counts, left: dict[str, int], may_be_ahead: bool) -> Counts:
    """``counts``, but no more than what is left; an error where there may not be less."""
    if isinstance(counts, int):
        total = sum(left.values())
        return _clipped(counts, total, "all layers together", may_be_ahead)
    return {
        name: _clipped(count, left[name], repr(name), may_be_ahead)
        for name, count in counts.items()
    }


def _clipped(count: int, left: int, name: str, may_be_ahead: bool) -> int:
    if count > left and not may_be_ahead:
        raise ValueError(
            f"Pruner.prune: {count} weights of {name} are to be kept, and {left} are left; pruned "
            "weights stay pruned"
        )
    return min(count, left)
