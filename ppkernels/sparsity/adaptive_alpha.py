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
from ppkernels._powered import Keep
from ppkernels.nn import set_alpha
from ppkernels.sparsity.momentum import check_follows, follow_alpha
from ppkernels.sparsity.phases import Entries, Phase, phases_of, sparsity_of

Decision = Literal["rise", "fall", "hold"]


@dataclass(frozen=True)
class AlphaRecord:
    """What the controller saw at one moment, of the model or of one layer.

    Attributes:
        epoch: how many epochs had been trained.
        layer: the layer's name; ``"model"`` for all layers together.
        alpha: α in the last of these epochs.
        sparsity: the share of entries with |θ| < ε that they ended with.
        decision: ``"rise"``, ``"fall"``, or ``"hold"`` at the bound; None where none was due.
        next_alpha: α from here on.
        next_sparsity: the share of entries with |θ| < ε right after the change, with no training.
    """

    epoch: int
    layer: str
    alpha: float
    sparsity: float
    decision: Decision | None
    next_alpha: float
    next_sparsity: float


class AdaptiveAlpha:
    """Adapts the exponent of a model's powered layers to how sparse training makes them.

    Every ``period`` epochs the sparsity s(α), the share of entries with |θ| < ε after training with
    α, is compared with s(α_old), that measured at the decision before::

        s(α) ≥ s(α_old), or the first decision:   α ← 1 + cr·(α − 1)   in the initial phase
                                                  α ← α + cd            after it
        s(α) < s(α_old):                          α ← 1 + (α − 1)/cr    and the initial phase ends

    and then α ← min(α, alpha_max). Where α = α_old, at the bound, the condition holds without a
    look: two measurements of one α differ by chance. So α may fall at the first decision after it
    has reached the bound, and stays there otherwise.

    Call `step` *before* each epoch::

        adaptive = pp.AdaptiveAlpha(model)
        for epoch in range(18):
            adaptive.step()
            train_one_epoch(model, optimizer)
        adaptive.measure()  # the last point of the history

    The first call finds no epoch trained, and each change is followed by at least one epoch. A
    change after the last one would leave a network that nobody has trained.

    With ``keep="phi"``, as in the report, θ jumps to sign(θ)·|θ|^(α'/α): each rise by itself makes
    the weights below 1 smaller and more of them less than ε, and training brings back those that
    matter; each fall does the opposite. So a rise is mostly followed by another one, which is what
    the bound is for, and a fall by further ones, towards α = 1. The records tell the jump
    (``next_sparsity``) from the training after it. With ``keep="theta"`` the network stays as it
    is, and only its further training changes.

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
        alpha_max: the bound; math.inf for none. A rate of learning that serves α = 3 may diverge
            above it: on MNIST (784-256-10, SGD of rate 0.1, momentum 0.9, φ kept) the virtual rule
            did at α = 3.8; the chain rule lost accuracy from 5.3 on, and at 10.6 it diverged.
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
        alpha_max: float = 3.0,
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
        self._phases = phases_of(model, per_layer)
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
        sparsity = sparsity_of(self._phases, self.epsilon, self.entries)
        return [
            AlphaRecord(self.epoch, name, alpha, sparsity[name], None, alpha, sparsity[name])
            for name, phase in self._phases.items()
            for alpha in [self._alpha(name, phase)]
        ]

    def _act(self) -> list[AlphaRecord]:
        sparsity = sparsity_of(self._phases, self.epsilon, self.entries)
        alphas = {name: self._alpha(name, phase) for name, phase in self._phases.items()}
        decisions, changed = {}, {}
        for name, phase in self._phases.items():
            decisions[name], changed[name] = self._decide(phase, alphas[name], sparsity[name])
            self._check(phase)
        for name, phase in self._phases.items():
            self._change(phase, alphas[name], changed[name])
            phase.init = phase.init and decisions[name] != "fall"
            phase.old_alpha, phase.old_sparsity = alphas[name], sparsity[name]
        after = sparsity_of(self._phases, self.epsilon, self.entries)
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

    def _decide(self, phase: Phase, alpha: float, sparsity: float) -> tuple[Decision, float]:
        """The algorithm: what is decided, and the next α."""
        is_new = phase.old_alpha is not None and phase.old_alpha != alpha
        if is_new and sparsity < phase.old_sparsity:
            return "fall", min(1 + (alpha - 1) / self.cr, self.alpha_max)
        risen = 1 + self.cr * (alpha - 1) if phase.init else alpha + self.cd
        chosen = min(risen, self.alpha_max)
        return "rise" if chosen > alpha else "hold", chosen

    def _check(self, phase: Phase) -> None:
        """Raise if an optimizer's state could not follow a change."""
        for layer in phase.layers.values():
            for optimizer in self._optimizers:
                check_follows(optimizer, layer)

    def _change(self, phase: Phase, before: float, after: float) -> None:
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

    def _alpha(self, name: str, phase: Phase) -> float:
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

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Epoch, phases and history, in plain numbers; the exponents are in the model's."""
        return {
            "epoch": self.epoch,
            "epsilon": self.epsilon,
            "entries": self.entries,
            "phases": {
                name: {
                    "init": phase.init,
                    "old_alpha": phase.old_alpha,
                    "old_sparsity": phase.old_sparsity,
                }
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
            saved = state["phases"][name]
            phase.init = saved["init"]
            phase.old_alpha, phase.old_sparsity = saved["old_alpha"], saved["old_sparsity"]
        self.history = [AlphaRecord(**record) for record in state["history"]]

    # ---- the picture

    def plot(self, path: str | Path) -> None:
        """Draw α and the sparsity over the epochs to the file ``path``; needs matplotlib."""
        from ppkernels.sparsity.plots import alpha_history

        alpha_history(self.history, self.epsilon, path)


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
