"""`Pruner`: prunes a model's weights when its schedule says so."""
# Longer than 350 lines: the docstring of the class shows the loops of all methods.

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppkernels import _powered
from ppkernels._checks import check_model, check_whole
from ppkernels._shares import check_share
from ppkernels.ops import BitMask
from ppkernels.sparsity.distributions import Distribution, Global
from ppkernels.sparsity.entries import Entries, Kept
from ppkernels.sparsity.layers import Select, unwrapped
from ppkernels.sparsity.schedules import Schedule
from ppkernels.sparsity.scores import Magnitude, NonFiniteGradient, Score, check_scores
from ppkernels.sparsity.types import Type, Unstructured
from ppkernels.sparsity.weights import Counts, Shares, Size


class Pruner:
    """Prunes the weights of a model when a schedule says so; the training loop stays yours.

    Four choices that know nothing of each other: what a weight is worth (``score``), when how much
    goes (``schedule``), how that is spread over the layers (``distribution``), in which pattern
    (``type``). The pruner counts steps, and prunes when it is time::

        pruner = Pruner(model, Cubic(kept=0.05, begin=1000, end=9000, every=100))
        for images, labels in loader:
            optimizer.zero_grad()
            loss_of(model(images), labels).backward()
            optimizer.step()
            pruner.step()

    The methods of the literature are such choices::

        # one-shot, after training
        Pruner(model, OneShot(0.05)).prune()
        # the same as Powerpropagation's authors do it
        Pruner(model, OneShot(0.05), distribution=Uniform({"output": 2})).prune()
        # gradual, in the loop above
        Pruner(model, Cubic(0.05, begin=1000, end=9000, every=100))
        # static random, before training
        Pruner(model, OneShot(0.05), score=Random(0), distribution=ERK()).prune()
        # SNIP, before training, after one backward
        Pruner(model, OneShot(0.05), score=Sensitivity()).prune()
        # 2:4, gradual, with the output layer left dense
        schedule = Cubic(0.5, begin=1000, end=9000, every=100)
        Pruner(model, schedule, distribution=Uniform({"output": 2}), type=NofM(2, 4))

    and lottery tickets, or any iterative pruning with rewinding::

        pruner = Pruner(model, Iterative(kept=0.05, rounds=10, every=5000, begin=500))
        optimizer = new_optimizer(model)
        for images, labels in itertools.islice(endless(loader), 500 + 11 * 5000):
            optimizer.zero_grad()
            loss_of(model(images), labels).backward()
            optimizer.step()
            is_pruned = pruner.step()
            if pruner.steps == 500:
                pruner.remember()        # for the weights of the start: before the loop, begin=0
            if is_pruned:
                pruner.rewind()
                optimizer = new_optimizer(model)  # its momentum and rate belong to other weights

    The distribution says what is kept in the end, of all layers together or of each, and the
    schedule's curve leads there: the curve of each layer to its own share.

    What pruning does: a pruned entry becomes 0 in the weight, and a 0 in the layer's
    ``update_mask`` keeps it there. The forward pass knows nothing of it, costs nothing more, and is
    not compiled again. Pruned entries stay pruned: each pruning chooses among those that are left.
    The optimizers of `pp.optim` leave a pruned entry's momentum as it was at that moment, and do
    not use it again. Every other torch optimizer keeps the entry at 0 too, on the weights that it
    may step (plain ones, and φ): its momentum decays as if the gradient were 0 (`pp.nn.Masked`).

    What may be pruned: entries that an ``update_mask`` of yours freezes, whenever you set it, are
    neither pruned nor freed, and so are those that ``mask`` hides from the network. Shares are of
    all other entries, pruned ones included. Weights that layers share are pruned once, and all
    these layers get the mask. What another pruner has pruned is frozen to this one, which counts
    the rest as its whole; load the first one's state to go on from there.

    Left out, unless ``select`` names them: weights that require no gradient (a frozen backbone).
    Always left out: biases, norms, embeddings, transposed convolutions, recurrent layers, the
    joint input projection of nn.MultiheadAttention, subclasses of the layers named below, layers
    that torch.nn.utils has parametrized, normalised or pruned, quantized ones. `kept` has a line
    for each layer that is not left out.

    Sparse layers (`pp.sparsify`) are refused, unless ``select`` leaves them out, and so is a call
    of a pruner whose layers became sparse: `pp.densify` the model to prune it further, with the
    same pruner or another one.

    Checkpoints: save ``model.state_dict()``, the optimizer's, and `state_dict`. To resume, load the
    model first, then the pruner, into new ones or the same: training goes on bit for bit as if
    nothing had happened. Loading restores masks that the model's checkpoint does not have. The
    average of an AveragedModel has the masks of the moment when it was copied; a pruner of its own,
    with the same choices, prunes it like the model::

        Pruner(average.module, schedule).load_state_dict(pruner.state_dict())

    Attributes:
        steps: calls of `step` so far.
        prunings: how often it has pruned, by `step` or by `prune`.

    Args:
        model: any module. Its plain layers become layers with masks, in place, as `pp.nn.add_masks`
            makes them; powered layers have masks. DistributedDataParallel, DataParallel and
            torch.compile around it are looked through, so that names and checkpoints are those of
            the model itself. Processes that have the same weights and gradients get the same masks.
        schedule: `OneShot`, `Cubic`, `Cosine`, `Iterative`.
        score: `Magnitude`, `Random`, `Gradient`, `Sensitivity`.
        distribution: `Global`, `Uniform`, `ERK`, `PerLayer`.
        type: `Unstructured`, `NofM`, `ConstantFanIn`.
        select: which layers: the names of some, or a function of name and layer, asked about those
            that can be pruned: powered ones, and nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d,
            without subclasses. By default all of them whose weight requires a gradient.

    Raises:
        TypeError: arguments of another kind; a weight of a subclass of Parameter (a sharded one); a
            lazy layer; a sparse one.
        ValueError: no layer to prune; choices that do not go together, or with these layers.
        RuntimeError: a weight that torch.nn.utils has parametrized or pruned.

    The model is as it was when an error is raised.

    Design after jaxpruner (Lee et al., 2023), whose algorithms are such choices too.
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
        check_model("Pruner", model)
        _check_choice("schedule", schedule, Schedule, "OneShot(0.05)")
        _check_choice("score", score, Score, "Magnitude()")
        _check_choice("distribution", distribution, Distribution, "Global()")
        _check_choice("type", type, Type, "Unstructured()")
        self.model = unwrapped(model)
        self.schedule, self.score = schedule, score
        self.distribution, self.type = distribution, type
        self.steps = 0
        self.prunings = 0
        self._is_late = False
        self._remembered: dict[str, Tensor] | None = None
        self._entries = Entries(self.model, select)
        # Checked before the model is changed, and as if nothing were frozen: masks from the
        # checkpoint of a pruned model may be there, the state of its pruner is loaded afterwards.
        sizes = self._entries.whole_sizes()
        type.check(sizes, self._shares(sizes, schedule.kept, lambda kept: schedule.share(0, kept)))
        type.check(sizes, self._shares(sizes, schedule.kept, lambda kept: kept))
        self._entries.convert()

    # ---- when

    def step(self) -> bool:
        """Count a step, and prune if the schedule says so; call it after each optimizer.step().

        It also looks whether pruned entries are still frozen zeros. Where an ``update_mask`` was
        assigned that trains them, or somebody other than a torch optimizer has written to a pruned
        weight (a checkpoint, an averaging wrapper such as Lookahead), they become so again, at the
        cost of a pass over the pruned weights. Not noticed are writes through ``.data``: those are
        undone by the next pruning, or by ``load_state_dict(state_dict())``.

        A score of gradients waits for gradients that are finite: where a GradScaler has found an
        overflow, a pruning that is due is done at the first step with finite ones.

        Returns:
            Whether it has pruned.

        Raises:
            RuntimeError: a schedule that begins at step 0, before the first step, without a call of
                `prune` there; see `prune` for all others. Nothing is pruned then, nor counted.
        """
        if self.prunings == 0 and self.schedule.is_due(0):
            raise RuntimeError(
                f"Pruner.step: {self.schedule} prunes at step 0; call prune() before the first step"
            )
        self._restore()
        step = self.steps + 1
        is_due = self._is_late or self.schedule.is_due(step)
        is_late = False
        if is_due:
            try:
                self._prune(
                    self.schedule.kept,
                    lambda kept: self.schedule.share(step, kept),
                    may_be_ahead=True,
                )
            except NonFiniteGradient:
                is_late = True
        self.steps, self._is_late = step, is_late
        return is_due and not is_late

    def prune(self, kept: float | None = None) -> None:
        """Prune now, whatever the schedule says, down to ``kept``.

        Args:
            kept: the share to keep, from 0 to 1, of all entries that are or may be pruned; by
                default what the schedule keeps in the end.

        Raises:
            ValueError: a share that is none, or above what is left; a NaN in a score, or a
                gradient that is not finite; what distribution or type do not take.
            TypeError: a score that gives back anything but a Weight for each weight.
            RuntimeError: a score of gradients where there are none; a weight that torch.nn.utils
                has parametrized or pruned. Nothing is pruned when an error is raised.
        """
        final = self.schedule.kept if kept is None else check_share("Pruner.prune", "kept", kept)
        self._restore()
        self._prune(final, lambda share: share, may_be_ahead=False)

    def _restore(self) -> None:
        if self._entries.is_undone():
            self._entries.enforce()

    def _prune(
        self, kept: float | None, part: Callable[[float], float], *, may_be_ahead: bool
    ) -> None:
        """Prune on the way to the share ``kept``, as far as ``part`` of a final share says."""
        entries = self._entries
        sizes = entries.sizes()
        counts = self.type.counts(sizes, self._shares(sizes, kept, part))
        counts = _at_most(counts, entries.left(), may_be_ahead)
        within = entries.within()
        ranked = check_scores(self.score, entries.ranked(), within)
        entries.keep(self.type.masks(ranked, counts, within))
        self.prunings += 1

    def _shares(
        self, sizes: Mapping[str, Size], kept: float | None, part: Callable[[float], float]
    ) -> Shares:
        """What ``part`` makes of the shares that the distribution gives in the end."""
        shares, of = self.distribution.shares(sizes, kept), type(self.distribution).__name__
        if not isinstance(shares, dict):
            return part(check_share(of, "shares", shares))
        if shares.keys() != sizes.keys():
            raise ValueError(
                f"Pruner: {self.distribution} must give a share for each of {list(sizes)}, got "
                f"{list(shares)}"
            )
        return {name: part(check_share(of, f"shares[{name!r}]", shares[name])) for name in sizes}

    # ---- rewinding

    def remember(self) -> None:
        """Take a copy of all parameters and buffers of the model, to `rewind` to.

        An earlier copy is forgotten. It goes into the state_dict.
        """
        self._remembered = {
            name: tensor.detach().clone() for name, tensor in _tensors(self.model).items()
        }

    def rewind(self) -> None:
        """Set the model back to what it was at `remember`, but for what is pruned or frozen.

        The whole network goes back, in place: weights, biases, norms with their running statistics,
        exponents. Entries whose bit in an ``update_mask`` is 0 stay as they are, so that pruned
        ones stay 0. The state of the optimizer is yours: after a rewinding it belongs to other
        weights, so make a new optimizer, or load the state that you saved at that step.

        Raises:
            RuntimeError: nothing was remembered, or the model has other tensors now. Nothing is
                changed then.
        """
        if self._remembered is None:
            raise RuntimeError("Pruner.rewind: nothing is remembered; call remember() before")
        tensors = _tensors(self.model)
        if _forms(tensors) != _forms(self._remembered):
            raise RuntimeError(
                "Pruner.rewind: the model has other parameters and buffers than at remember()"
            )
        frozen = {
            id(layer.weight): layer.update_mask
            for layer in _powered.masked_layers(self.model).values()
            if layer.update_mask is not None
        }
        with torch.no_grad():
            for name, tensor in tensors.items():
                values, mask = self._remembered[name].to(tensor), frozen.get(id(tensor))
                tensor.copy_(values if mask is None else values.where(mask.unpack(), tensor))
        self._entries.enforce()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Steps, masks and remembered tensors: numbers, strings and tensors alone."""
        return {
            "steps": self.steps,
            "prunings": self.prunings,
            "is_late": self._is_late,
            "kept": {name: mask.words for name, mask in self._entries.masks.items()},
            "remembered": None if self._remembered is None else dict(self._remembered),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. The model's own is loaded before it.

        Pruned entries become 0, and their bits in the ``update_mask``, whatever the model has.

        Raises:
            ValueError: a state that is not that of a pruner of such layers. Nothing is changed
                then.
        """
        wanted, op = list(self.state_dict()), "Pruner.load_state_dict"
        if not isinstance(state_dict, dict) or set(state_dict) != set(wanted):
            found = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"{op}: the keys must be {wanted}, got {found}")
        for name in ("steps", "prunings"):
            try:
                check_whole(op, name, state_dict[name], at_least=0)
            except TypeError as error:
                raise ValueError(str(error)) from None
        if not isinstance(state_dict["is_late"], bool):
            raise ValueError(f"{op}: is_late must be a bool, got {state_dict['is_late']!r}")
        remembered = state_dict["remembered"]
        if remembered is not None and _forms(remembered) != _forms(_tensors(self.model)):
            raise ValueError(
                f"{op}: remembered must be None, or tensors like the parameters and buffers of "
                "the model, by name"
            )
        self._entries.load(state_dict["kept"])
        self.steps, self.prunings = int(state_dict["steps"]), int(state_dict["prunings"])
        self._is_late = state_dict["is_late"]
        self._remembered = remembered

    # ---- what is left

    def masks(self) -> dict[str, BitMask]:
        """By layer, the entries that are not pruned, frozen and hidden ones included."""
        weights = self._entries.weights()
        return {name: self._entries.mask(name, weight) for name, weight in weights.items()}

    def kept(self) -> Kept:
        """How many weights are left, by layer and in all."""
        sizes = self._entries.sizes()
        return Kept(self._entries.left(), {name: size.entries for name, size in sizes.items()})


def _check_choice(name: str, choice: object, wanted: type[Any], example: str) -> None:
    if isinstance(choice, type) or not isinstance(choice, wanted):
        raise TypeError(
            f"Pruner: {name} must be a {wanted.__name__}, {example} for example, got {choice!r}"
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; one that is shared comes once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _forms(tensors: Any) -> dict[str, torch.Size] | None:
    """The shapes of several tensors by name; None of anything else."""
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        return None
    return {name: tensor.shape for name, tensor in tensors.items()}


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
