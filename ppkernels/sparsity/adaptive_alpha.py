"""`pp.AdaptiveAlpha`: raises and lowers α by the share of small weights that training reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from ppkernels._checks import check_model
from ppkernels._optimizers import optimizers_of
from ppkernels._powered import Keep
from ppkernels.nn import set_alpha
from ppkernels.sparsity.layers import Select, unwrapped
from ppkernels.sparsity.momentum import check_follows, follow_alpha
from ppkernels.sparsity.phases import (
    Decision,
    Entries,
    Memory,
    Options,
    Phase,
    check_fits,
    layers_of,
    phases_of,
    sparsity_of,
)


@dataclass(frozen=True)
class AlphaRecord:
    """What the controller saw at one moment, of the model or of one layer.

    Attributes:
        epoch: how many epochs had been trained.
        layer: the layer's name; ``"model"`` for all layers together.
        alpha: α in the last of these epochs.
        sparsity: the share of entries with |θ| < ε that they ended with; NaN where no entry counts.
        decision: ``"rise"``, ``"fall"``, or ``"hold"`` at the bound, or where no entry counts; None
            where none was due.
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
    (``next_sparsity``) from the training after it. In float16 a rise also makes weights 0 that fall
    below 6e-8, and they stay 0. With ``keep="theta"`` the network stays as it is, and only its
    further training changes.

    α changes in place: no new graph under torch.compile, the same Parameters for the optimizer. All
    processes of a distributed training measure the same weights and decide alike.

    Args:
        model: any module with powered layers; layers that share a weight count once.
            DistributedDataParallel, DataParallel and torch.compile around it are looked through.
        epsilon: ε > 0.
        period: epochs between decisions.
        cr: the factor of a geometric change of α − 1, > 1.
        cd: the step of an additive rise, > 0.
        keep: ``"phi"`` or ``"theta"``, as in `pp.set_alpha`.
        alpha_max: the bound; math.inf for none. A learning rate that serves α = 3 may diverge above
            it: on MNIST (784-256-10, SGD of rate 0.1, momentum 0.9, φ kept, one seed) the virtual
            rule did at α = 3.8; the chain rule lost accuracy from 5.3 on and diverged at 10.6.
        per_layer: adapt each layer by its own sparsity. Otherwise all have one α.
        entries: which entries are counted: ``"all"``, those that ``mask`` hides or a sparse layer
            does not store as 0; or ``"trained"``, those whose bits in ``mask`` and ``update_mask``
            are not 0, so that pruning does not count as the merit of α. A layer without such
            entries keeps its α.
        select: which powered layers: the names of some, or a function of name and layer. By default
            those whose weight requires a gradient at this moment. All others keep their α, unless
            they share a weight with one of these.
        optimizer: needed with ``keep="theta"``, one or several: φ becomes another one, and averages
            of ∂L/∂φ (the momentum of the chain rule, of a stored φ under any rule) are scaled to
            it; where θ = 0 and α falls they begin anew. Known are the states of SGD and Adam, those
            of `pp.optim` included. With ``keep="phi"`` nothing is scaled.

    A change of α with ``keep="phi"`` moves all of a layer's θ: entries that an ``update_mask``
    freezes, and a weight without ``requires_grad`` that you select, or freeze later. Where these
    hold other tasks or a pretrained backbone, keep θ or leave the layer out.

    Attributes:
        options: the numbers and words above, as they were given.
        history: an `AlphaRecord` for each call of `step` or `measure`, or one for each layer.
        epoch: how many epochs have been begun.

    Raises:
        TypeError, ValueError: numbers out of range; no powered layer; layers of different α without
            ``per_layer``; α = 1, where a geometric rise begins and never leaves; α above
            ``alpha_max``; a sharded weight (DTensor); with ``keep="theta"`` no optimizer that holds
            one of the weights.
        RuntimeError: a weight that torch.nn.utils has parametrized or pruned; an optimizer's state
            of unknown meaning, with ``keep="theta"``.

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
        select: Select | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ) -> None:
        self.options = Options(epsilon, period, cr, cd, keep, alpha_max, per_layer, entries)
        self._optimizers = optimizers_of("AdaptiveAlpha", optimizer)
        if keep == "theta" and not self._optimizers:
            raise TypeError(
                "AdaptiveAlpha: keep='theta' makes phi another one, and an optimizer's averages of "
                "its gradients have to follow; pass optimizer=..."
            )
        check_model("AdaptiveAlpha", model)
        self._model = unwrapped(model)
        self._phases = phases_of(self._model, per_layer, select)
        self.epoch = 0
        self.history: list[AlphaRecord] = []
        self._is_loaded = False
        self._alphas()
        self._check_optimizers()

    # ---- for the training loop

    def step(self) -> list[AlphaRecord]:
        """Before an epoch: measure, record, and every ``period`` epochs change α.

        Returns:
            the new records: one, or one for each layer.

        Raises:
            ValueError: NaN or infinity among the weights, or infinity after a rise; layers that
                somebody gave different exponents, one above the bound, or 1 in the initial phase;
                after `load_state_dict`, a model with exponents that are not those of the state; no
                entry to count.
            RuntimeError: a layer that was folded or exchanged; an optimizer's state of unknown
                meaning, with ``keep="theta"``.

        Nothing is changed nor counted when an error is raised.
        """
        decides = self.epoch > 0 and self.epoch % self.options.period == 0
        records = self._act() if decides else self._look()
        self.epoch += 1
        return self._note(records)

    def measure(self) -> list[AlphaRecord]:
        """Measure and record as `step` does, but change nothing: for the end of the training."""
        return self._note(self._look())

    def _look(self) -> list[AlphaRecord]:
        sparsity, alphas = self._sparsity(), self._alphas()
        return [
            AlphaRecord(self.epoch, name, alpha, sparsity[name], None, alpha, sparsity[name])
            for name, alpha in alphas.items()
        ]

    def _act(self) -> list[AlphaRecord]:
        sparsity, alphas = self._sparsity(), self._alphas()
        decided = {
            name: phase.decide(self.options, alphas[name], sparsity[name])
            for name, phase in self._phases.items()
        }
        # Whatever may go wrong does so before anything changes.
        self._check_optimizers()
        for name, phase in self._phases.items():
            for layer_name, layer in phase.layers.items():
                if self.options.keep == "phi" and decided[name][1] > alphas[name]:
                    check_fits(layer_name, layer, decided[name][1])
        for name, phase in self._phases.items():
            decision, alpha = decided[name]
            self._change(phase, alphas[name], alpha)
            phase.remember(decision, alphas[name], sparsity[name])
        after = self._sparsity()
        return [
            AlphaRecord(self.epoch, name, alphas[name], sparsity[name], *decided[name], after[name])
            for name in self._phases
        ]

    def _sparsity(self) -> dict[str, float]:
        return sparsity_of(self._model, self._phases, self.options)

    def _check_optimizers(self) -> None:
        """Raise if an optimizer's state could not follow a change."""
        if self.options.keep == "theta":
            check_follows(self._optimizers, layers_of(self._model, self._phases))

    def _change(self, phase: Phase, before: float, after: float) -> None:
        if after == before:
            return
        layers, keep = phase.layers.values(), self.options.keep
        set_alpha(nn.ModuleList(cast(nn.Module, layer) for layer in layers), after, keep=keep)
        if keep == "theta":
            for layer in layers:
                for optimizer in self._optimizers:
                    follow_alpha(optimizer, layer, before, after)

    def _note(self, records: list[AlphaRecord]) -> list[AlphaRecord]:
        # `measure` and a `step` after it see the same epoch; the later one knows more.
        if self.history and self.history[-1].epoch == records[0].epoch:
            del self.history[-len(records) :]
        self.history += records
        return records

    def _alphas(self) -> dict[str, float]:
        """The exponent of each phase."""
        alphas = {name: self._alpha(name, phase) for name, phase in self._phases.items()}
        if self._is_loaded and self.history:
            saved = {record.layer: record.next_alpha for record in self.history}
            for name, alpha in alphas.items():
                if saved[name] != alpha:
                    raise ValueError(
                        f"AdaptiveAlpha: the state that was loaded left {name!r} with alpha "
                        f"{saved[name]}, and the model has {alpha}; load the model's state_dict too"
                    )
        self._is_loaded = False
        return alphas

    def _alpha(self, name: str, phase: Phase) -> float:
        alphas = {layer: float(powered.alpha) for layer, powered in phase.layers.items()}
        alpha = next(iter(alphas.values()))
        if any(other != alpha for other in alphas.values()):
            raise ValueError(
                f"AdaptiveAlpha: the layers have different exponents, {alphas}; give them one with "
                "pp.set_alpha, or adapt each by itself with per_layer=True"
            )
        if alpha > self.options.alpha_max:
            raise ValueError(
                f"AdaptiveAlpha: {name!r} has alpha {alpha}, above alpha_max "
                f"{self.options.alpha_max}"
            )
        if alpha == 1 and phase.memory.init:
            raise ValueError(
                f"AdaptiveAlpha: {name!r} has alpha 1, which the geometric rise 1 + cr*(alpha - 1) "
                "never leaves; begin above it, with 1.25 say"
            )
        return alpha

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Epoch, options, layers, phases and history, in plain numbers and words.

        The exponents are in the model's state_dict.
        """
        return {
            "epoch": self.epoch,
            "options": asdict(self.options),
            "layers": {name: list(phase.layers) for name, phase in self._phases.items()},
            "phases": {name: asdict(phase.memory) for name, phase in self._phases.items()},
            "history": [asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; the model's own state_dict brings the exponents.

        Load both, in any order: the next `step` or `measure` compares them.

        Raises:
            ValueError: a state of other layers, with other options, or that is none. Nothing is
                changed then.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or set(state) != set(own):
            came = list(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"{_LOADING}: the keys must be {list(own)}, got {came}")
        options = state["options"] if isinstance(state["options"], Mapping) else {}
        for name, option in own["options"].items():
            saved = options.get(name)
            if saved != option:
                raise ValueError(
                    f"{_LOADING}: the state was taken with {name} {saved!r}, and this controller "
                    f"has {option!r}"
                )
        if state["layers"] != own["layers"]:
            raise ValueError(
                f"{_LOADING}: the state is of {state['layers']}, and this controller is of "
                f"{own['layers']}"
            )
        try:
            memories = {name: Memory(**state["phases"][name]) for name in self._phases}
            history = [AlphaRecord(**record) for record in state["history"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{_LOADING}: phases or history are incomplete: {error!r}") from error
        for name, memory in memories.items():
            self._phases[name].memory = memory
        self.epoch, self.history, self._is_loaded = state["epoch"], history, True

    # ---- the picture

    def plot(self, path: str | Path) -> None:
        """Draw α and the sparsity over the epochs to the file ``path``; needs matplotlib."""
        from ppkernels.sparsity.plots import alpha_history

        alpha_history(self.history, self.options.epsilon, path)


_LOADING = "AdaptiveAlpha.load_state_dict"
