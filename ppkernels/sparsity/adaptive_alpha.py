"""`pp.AdaptiveAlpha`: raises and lowers α by the share of small weights that training reaches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn
from torch.optim import Optimizer

from ppkernels._checks import check_word
from ppkernels._powered import Keep, PoweredLayer, powered_layers, weight_parameter
from ppkernels.nn import set_alpha
from ppkernels.ops import statistics
from ppkernels.sparsity.momentum import check_follows, follow_alpha

Entries = Literal["all", "trained"]

# What a record calls all powered layers together.
MODEL = "model"


@dataclass(frozen=True)
class AlphaRecord:
    """What the controller saw at one moment, of the model or of one layer.

    Attributes:
        epoch: how many epochs had been trained.
        layer: the layer's name; ``"model"`` for all layers together.
        alpha: α in the last of these epochs.
        sparsity: the share of entries with |θ| < ε that they ended with.
        decision: ``"rise"`` or ``"fall"``; None in an epoch without decision.
        next_alpha: α from here on; that of before where nothing was decided, or at a bound.
        next_sparsity: the share of entries with |θ| < ε right after the change, with no training.
    """

    epoch: int
    layer: str
    alpha: float
    sparsity: float
    decision: Literal["rise", "fall"] | None
    next_alpha: float
    next_sparsity: float


@dataclass
class _Phase:
    """Where the algorithm stands, for the model or for one layer."""

    layers: dict[str, PoweredLayer]
    old_sparsity: float | None = None
    init: bool = True


class AdaptiveAlpha:
    """Adapts the exponent of a model's powered layers to how sparse training makes them.

    Every ``period`` epochs the sparsity s, the share of entries with |θ| < ε, is compared with
    s_old, that of the decision before::

        s ≥ s_old, or the first decision:   α ← 1 + cr·(α − 1)     in the initial phase
                                            α ← α + cd              after it
        s < s_old:                          α ← 1 + (α − 1)/cr      and the initial phase is over

    and then α ← min(α, alpha_max). s is measured after the epochs that were trained with α, before
    α changes. At the bound α stays as it is until s falls.

    Call `step` *before* each epoch::

        adaptive = pp.AdaptiveAlpha(model)
        for epoch in range(18):
            adaptive.step()
            train_one_epoch(model, optimizer)
        adaptive.measure()  # the last point of the history

    The first call finds no epoch trained, and each change is followed by at least one epoch. A
    change after the last one would leave a network that nobody has trained.

    With ``keep="phi"``, as in the report, θ jumps to sign(θ)·|θ|^(α'/α): each rise by itself makes
    the weights below 1 smaller, and more of them less than ε, which training then corrects; each
    fall does the opposite, so that after the first one s is often below s_old again, and α goes on
    falling towards 1. The records tell the jump (``next_sparsity``) from the training after it.
    With ``keep="theta"`` the network stays as it is, and only its further training changes.

    α changes in place: no new graph under torch.compile, the same Parameters for the optimizer. All
    processes of a distributed training measure the same weights and decide alike.

    Args:
        model: any module with powered layers; layers that share a weight count once. It may be
            compiled or wrapped.
        epsilon: ε > 0.
        period: epochs between decisions.
        cr: the factor of a geometric change of α − 1, > 1.
        cd: the step of an additive rise, > 0.
        keep: ``"phi"`` or ``"theta"``, as in `pp.set_alpha`.
        alpha_max: the bound; math.inf for none. The default is 4: there float16 has 0 for the θ of
            |φ| < 0.013 already, and learning rates that serve smaller exponents may diverge.
        per_layer: adapt each layer by its own sparsity. Otherwise all have one α.
        entries: which entries are counted: ``"all"``, those that ``mask`` hides as 0; or
            ``"trained"``, those whose bits in ``mask`` and ``update_mask`` are not 0, so that
            pruning does not count as the merit of α.
        optimizer: needed with ``keep="theta"``, one or several: φ becomes another one, and averages
            of ∂L/∂φ (the momentum of the chain rule, of a stored φ under any rule) are scaled to
            it; where θ = 0 and α falls they begin anew. Known are the states of SGD and Adam, those
            of `pp.optim` included. With ``keep="phi"`` nothing is scaled.

    A change of α with ``keep="phi"`` moves frozen entries of θ too: where they hold other tasks,
    keep θ.

    Attributes:
        history: an `AlphaRecord` for each call of `step` or `measure`, or one for each layer.
        epoch: how many epochs have been begun.

    Raises:
        TypeError, ValueError: numbers out of range; no powered layer; layers of different α without
            ``per_layer``; α = 1, where a geometric rise begins and never leaves; α above
            ``alpha_max``.
        RuntimeError: a weight that torch.nn.utils has parametrized or pruned; an optimizer's state
            of unknown meaning.

    Source: A. Jain, V. Raj, V. Asgaonkar, "Powerpropagation", 2022, section 5.
    """

    def __init__(
        self,
        model: nn.Module,
        epsilon: float = 1e-3,
        *,
        period: int = 3,
        cr: float = 1.5,
        cd: float = 0.1,
        keep: Keep = "phi",
        alpha_max: float = 4.0,
        per_layer: bool = False,
        entries: Entries = "all",
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ) -> None:
        self.epsilon = _number("epsilon", epsilon, above=0)
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise ValueError(f"AdaptiveAlpha: period must be a whole number >= 1, got {period!r}")
        self.period = period
        self.cr = _number("cr", cr, above=1)
        self.cd = _number("cd", cd, above=0)
        self.alpha_max = _number("alpha_max", alpha_max, above=1, or_inf=True)
        check_word("AdaptiveAlpha", "keep", keep, "phi", "theta")
        check_word("AdaptiveAlpha", "entries", entries, "all", "trained")
        self.keep, self.entries, self.per_layer = keep, entries, per_layer
        self._optimizers = _several(optimizer)
        if keep == "theta" and not self._optimizers:
            raise TypeError(
                "AdaptiveAlpha: keep='theta' makes phi another one, and an optimizer's averages of "
                "its gradients have to follow; pass optimizer=..."
            )
        self._phases = _phases(model, per_layer)
        self.epoch = 0
        self.history: list[AlphaRecord] = []
        for name, phase in self._phases.items():
            alpha = self._alpha(name, phase)
            if alpha > self.alpha_max:
                raise ValueError(
                    f"AdaptiveAlpha: {name!r} begins with alpha {alpha}, above alpha_max "
                    f"{self.alpha_max}"
                )

    # ---- for the training loop

    def step(self) -> list[AlphaRecord]:
        """Before an epoch: measure, record, and every ``period`` epochs change α.

        Returns:
            the new records: one, or one for each layer.

        Raises:
            ValueError: a NaN among the weights; layers that somebody gave different exponents; an
                exponent set to 1 in the initial phase; no entry to count.
        """
        decides = self.epoch > 0 and self.epoch % self.period == 0
        records = self._act() if decides else self._look()
        self.epoch += 1
        return self._note(records)

    def measure(self) -> list[AlphaRecord]:
        """Measure and record as `step` does, but change nothing: for the end of the training."""
        return self._note(self._look())

    def _look(self) -> list[AlphaRecord]:
        sparsity = self._sparsity()
        return [
            AlphaRecord(self.epoch, name, alpha, sparsity[name], None, alpha, sparsity[name])
            for name, phase in self._phases.items()
            for alpha in [self._alpha(name, phase)]
        ]

    def _act(self) -> list[AlphaRecord]:
        sparsity = self._sparsity()
        alphas = {name: self._alpha(name, phase) for name, phase in self._phases.items()}
        for layer in self._layers().values():
            for optimizer in self._optimizers:
                check_follows(optimizer, layer)
        decisions: dict[str, Literal["rise", "fall"]] = {}
        changed = {}
        for name, phase in self._phases.items():
            old = phase.old_sparsity
            decisions[name] = "rise" if old is None or sparsity[name] >= old else "fall"
            phase.old_sparsity = sparsity[name]
            phase.init = phase.init and decisions[name] == "rise"
            changed[name] = self._next_alpha(alphas[name], decisions[name], phase.init)
            self._change(phase, alphas[name], changed[name])
        after = self._sparsity()
        return [
            AlphaRecord(
                self.epoch,
                name,
                alphas[name],
                sparsity[name],
                decisions[name],
                changed[name],
                after[name],
            )
            for name in self._phases
        ]

    def _next_alpha(self, alpha: float, decision: Literal["rise", "fall"], init: bool) -> float:
        if decision == "fall":
            chosen = 1 + (alpha - 1) / self.cr
        else:
            chosen = 1 + self.cr * (alpha - 1) if init else alpha + self.cd
        return min(chosen, self.alpha_max)

    def _change(self, phase: _Phase, before: float, after: float) -> None:
        if after == before:
            return
        layers = phase.layers.values()
        set_alpha(nn.ModuleList(cast(nn.Module, layer) for layer in layers), after, keep=self.keep)
        if self.keep == "theta":
            for layer in layers:
                for optimizer in self._optimizers:
                    follow_alpha(optimizer, layer, before, after)

    def _note(self, records: list[AlphaRecord]) -> list[AlphaRecord]:
        # `measure` and a `step` after it see the same epoch; the later one knows more.
        if self.history and self.history[-1].epoch == records[0].epoch:
            del self.history[-len(records) :]
        self.history += records
        return records

    # ---- what is measured

    def _layers(self) -> dict[str, PoweredLayer]:
        return {
            name: layer for phase in self._phases.values() for name, layer in phase.layers.items()
        }

    def _alpha(self, name: str, phase: _Phase) -> float:
        alphas = {layer: float(powered.alpha) for layer, powered in phase.layers.items()}
        alpha = next(iter(alphas.values()))
        if any(other != alpha for other in alphas.values()):
            raise ValueError(
                f"AdaptiveAlpha: the layers have different exponents, {alphas}; give them one with "
                "pp.set_alpha, or adapt each by itself with per_layer=True"
            )
        if alpha == 1 and phase.init:
            raise ValueError(
                f"AdaptiveAlpha: {name!r} has alpha 1, which the geometric rise 1 + cr*(alpha - 1) "
                "never leaves; begin above it, with 1.25 say"
            )
        return alpha

    def _sparsity(self) -> dict[str, float]:
        """The share of small entries of each phase: one pass over the weights."""
        layers = self._layers()
        masks = {name: layer.mask for name, layer in layers.items()}
        if self.entries == "trained":
            masks = {name: _both(mask, layers[name].update_mask) for name, mask in masks.items()}
        found = statistics(
            {name: layer.weight.detach() for name, layer in layers.items()},
            [self.epsilon],
            {
                name: layer.alpha if layer.stores == "phi" else None
                for name, layer in layers.items()
            },
            within=masks,
        )
        shares = {}
        for name, phase in self._phases.items():
            below = sum(found[layer].below[self.epsilon] for layer in phase.layers)
            count = seen = sum(found[layer].count for layer in phase.layers)
            if self.entries == "all":
                count = sum(layer.weight.numel() for layer in phase.layers.values())
            if count == 0:
                raise ValueError(f"AdaptiveAlpha: {name!r} has no entries to count")
            # What a mask hides is 0 to the network.
            shares[name] = (below + count - seen) / count
        return shares

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Epoch, phases and history, in plain numbers; the exponents are in the model's."""
        return {
            "epoch": self.epoch,
            "epsilon": self.epsilon,
            "entries": self.entries,
            "phases": {
                name: {"old_sparsity": phase.old_sparsity, "init": phase.init}
                for name, phase in self._phases.items()
            },
            "history": [asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; the model's own state_dict brings the exponents.

        Raises:
            ValueError: a state of other layers, or of sparsity measured otherwise.
        """
        if list(state["phases"]) != list(self._phases):
            raise ValueError(
                f"AdaptiveAlpha: the state is of {list(state['phases'])}, and this controller is "
                f"of {list(self._phases)}"
            )
        for name, own in (("epsilon", self.epsilon), ("entries", self.entries)):
            if state[name] != own:
                raise ValueError(
                    f"AdaptiveAlpha: the state was measured with {name} {state[name]!r}, and this "
                    f"controller has {own!r}"
                )
        self.epoch = state["epoch"]
        for name, phase in self._phases.items():
            phase.old_sparsity = state["phases"][name]["old_sparsity"]
            phase.init = state["phases"][name]["init"]
        self.history = [AlphaRecord(**record) for record in state["history"]]

    # ---- the picture

    def plot(self, path: str | Path) -> None:
        """Draw α and the sparsity over the epochs to the file ``path``; needs matplotlib."""
        from ppkernels.sparsity.plots import alpha_history

        alpha_history(self.history, self.epsilon, path)


def _phases(model: nn.Module, per_layer: bool) -> dict[str, _Phase]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"AdaptiveAlpha: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    layers: dict[int, tuple[str, PoweredLayer]] = {}
    for name, layer in powered_layers(model).items():
        weight = weight_parameter(layer)
        if weight is None:
            raise RuntimeError(
                f"AdaptiveAlpha: the weight of {name!r} is no longer a Parameter of its own "
                "(torch.nn.utils.prune, parametrize or weight_norm has replaced it)"
            )
        # The wrapper that torch.compile makes would give the same layer another name.
        layers.setdefault(id(weight), (name.removeprefix("_orig_mod."), layer))
    if not layers:
        raise ValueError(
            f"AdaptiveAlpha: {type(model).__name__} holds no powered layer; pp.powerize makes them"
        )
    named = dict(layers.values())
    if per_layer:
        return {name: _Phase({name: layer}) for name, layer in named.items()}
    return {MODEL: _Phase(named)}


def _both(first: Any, second: Any) -> Any:
    """The mask of what both masks have; None is one that has all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _several(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for other in optimizers:
        if not isinstance(other, Optimizer):
            raise TypeError(
                "AdaptiveAlpha: optimizer must be a torch.optim.Optimizer or several, got "
                f"{type(other).__name__}"
            )
    return optimizers


def _number(name: str, value: Any, *, above: float, or_inf: bool = False) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"AdaptiveAlpha: {name} must be a number, got {value!r}")
    number = float(value)
    if not (number > above and (or_inf or math.isfinite(number))):
        raise ValueError(f"AdaptiveAlpha: {name} must be a number > {above}, got {value}")
    return number
