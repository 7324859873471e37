"""Makes pruned layers of a model sparse where that is faster, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ppkernels._checks import check_model, check_number
from ppkernels._extension import cpu_capability
from ppkernels._optimizers import optimizers_of, state_tensors
from ppkernels._powered import is_sparse
from ppkernels.nn.calls import Call, Measure, calls_of, timed
from ppkernels.nn.candidates import Candidate, candidates, selected
from ppkernels.nn.choice import Select, called
from ppkernels.nn.convert import add_masks
from ppkernels.nn.exchange import become
from ppkernels.nn.masks import Masked
from ppkernels.nn.plan import Choice, PlannedLayer, SparsifyPlan
from ppkernels.nn.powered import Powered
from ppkernels.nn.replay import replayed, without_masks
from ppkernels.nn.sparse import Sparse
from ppkernels.nn.sparse_kept import KERNEL_DTYPES

ModelT = TypeVar("ModelT", bound=nn.Module)
Optimizers = Optimizer | Iterable[Optimizer]


def sparsify(
    model: nn.Module,
    sample_input: Any = None,
    *,
    training: bool = True,
    at_least: float = 1.0,
    select: Select | None = None,
    optimizer: Optimizers | None = None,
    plan: SparsifyPlan | None = None,
    measure: Measure = timed,
) -> SparsifyPlan:
    """Make each pruned layer of ``model`` sparse that is faster so, in place.

    A layer is pruned where entries of θ are 0 and, if an ``update_mask`` is set, stay so: the
    `Pruner` leaves such layers, and so do masks of your own and plain layers with zeros. Sparse, it
    stores the entries that are left alone (`pp.nn.SparseLinear`, `SparseConv2d`), and so does the
    optimizer; forward, backward and step cost what is left. Outputs and gradients are those of the
    masked dense layer to rounding; but the dense gradient is not 0 where nothing is kept, so that
    clipping by norm clips more there (`pp.nn.Sparse`). What is not kept stays 0 from then on, also
    in a plain layer without masks, whose zeros a step would have moved. An entry that ``mask``
    hides and that no step trains is not kept.

    One forward of the model on ``sample_input`` finds the shapes that its layers are called with.
    Each pruned layer is then timed as it is and sparse, in turns, on random inputs of these shapes
    and with torch's threads as they are, some hundredths of a second a layer. The model is left as
    it is by that: modes, buffers (statistics of norms), gradients, random numbers. What a forward
    writes elsewhere, into attributes of its own, it writes.

    The modules stay the same objects, and so do their Parameters (which have another shape then):
    hooks and an optimizer's references hold. Do this before the model is wrapped or compiled.

    Left dense, with the reason in the plan: layers of other kinds than nn.Linear and nn.Conv2d,
    powered or with masks or plain; subclasses; what `pp.nn.SparseConv2d` does not have; weights
    that others share, that torch.nn.utils has put something in place of, or that a module such as
    nn.MultiheadAttention reads itself; layers that ``sample_input`` does not reach.

    Args:
        model: any module; a layer itself is changed.
        sample_input: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments; of the batch size that is to be fast.
        training: forward and backward are to be fast together; False, the forward alone.
        at_least: how many times faster a sparse layer has to be.
        select: which layers: the names of some (of ``model.named_modules()``), or a function of
            name and layer. All of them by default.
        optimizer: the optimizer that trains the model, or several: momentum, averages of gradients
            and master weights of what is kept are kept. One that has taken a step and is not given
            here has a state of another shape than the weights, and its next step is an error.
        plan: instead of ``sample_input``: the plan of another copy of the model. Nothing is
            measured, and the same layers become sparse; plain ones get masks where they had some.
            So a new model can load a checkpoint. A layer that is not pruned here keeps as many
            entries as the plan says, the largest. Layers that were powered have to be so before.
        measure: who says how long a layer takes, by default the clock: called with the layer, its
            sparse counterpart, the calls of one forward and ``training``, it gives both in seconds.

    Returns:
        What was chosen for each linear and convolution layer, and why: ``print(plan)``,
        ``plan.save(path)``. The given ``plan``, if there was one.

    Raises:
        TypeError: arguments of another kind; not one of ``sample_input`` and ``plan``.
        ValueError: a model without such layers, or that is wrapped; a name that there is not; a
            plan of another model.
        RuntimeError: an optimizer's state that is not known to follow.

    Nothing is changed when an error is raised. `densify` is the way back.

    Example::

        pruner.prune()
        plan = pp.sparsify(model, images, optimizer=optimizer)
        print(plan)
        plan.save("plan.json")

        # elsewhere
        model = Net()
        pp.sparsify(model, plan=pp.SparsifyPlan.load("plan.json"))
        model.load_state_dict(torch.load("model.pt"))
    """
    check_model("sparsify", model)
    _check_bare("sparsify", model)
    if (sample_input is None) == (plan is None):
        raise TypeError("sparsify: give sample_input, or plan, and not both")
    optimizers = optimizers_of("sparsify", optimizer)
    found = candidates(model)
    if not found:
        raise ValueError(f"sparsify: {type(model).__name__} holds no linear or convolution layer")
    made: dict[str, Sparse] = {}
    plain: list[str] = []
    if plan is not None:
        if not isinstance(plan, SparsifyPlan) or select is not None:
            raise TypeError(
                "sparsify: plan must be a pp.SparsifyPlan, without a select beside it, got "
                f"{type(plan).__name__} and select={select!r}"
            )
        made = replayed(model, found, plan)
        plain = without_masks(found, plan)
    else:
        least = check_number("sparsify", "at_least", at_least)
        if not least >= 0:
            raise ValueError(f"sparsify: at_least must be a number >= 0, got {at_least}")
        wanted = selected(model, found, select)
        settled = {each.name: _settled(each, wanted) for each in found}
        able = {each.name: each.layer for each in found if settled[each.name] is None}
        calls = calls_of(model, able, sample_input, training)
        rows = []
        for each in found:
            row, sparse = settled[each.name], None
            if row is None:
                row, sparse = _measured(each, calls[each.name], training, least, measure)
            if sparse is not None:
                made[each.name] = sparse
            rows.append(row)
        plan = SparsifyPlan(tuple(rows), training, least, torch.get_num_threads(), cpu_capability())
    _become_sparse(model, made, plain, optimizers)
    return plan


def densify(model: ModelT, *, optimizer: Optimizers | None = None) -> ModelT:
    """Turn the sparse layers of ``model`` into dense ones again, in place: `sparsify` undone.

    A layer is of the class that it had before `sparsify`; one that was made sparse becomes a
    `MaskedLinear` or `MaskedConv2d`, powered ones a `PowerLinear` or `PowerConv2d`. Weights and
    biases have the bits that they had sparse, and are 0 where nothing was kept. What may have masks
    has an ``update_mask`` of the kept entries, so that it trains as the sparse layer did; a plain
    layer has none, and its zeros may be trained again. Modules and Parameters stay the same
    objects.

    Args:
        model: any module; a sparse layer itself is changed and returned. One without sparse layers
            is returned as it is.
        optimizer: as in `sparsify`; the state of what was not kept is 0.

    Returns:
        ``model``.

    Raises:
        TypeError: no module; an optimizer of another kind.
        ValueError: a model that is wrapped or compiled.
        RuntimeError: an optimizer's state that is not known to follow; a weight that torch.nn.utils
            has parametrized or pruned, or that is sharded (DTensor).

    Nothing is changed when an error is raised.
    """
    check_model("densify", model)
    _check_bare("densify", model)
    optimizers = optimizers_of("densify", optimizer)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Sparse)}
    states = {
        name: state_tensors("densify", optimizers, name, layer.weight)
        for name, layer in layers.items()
    }
    made = {name: layer.to_dense() for name, layer in layers.items()}
    for name, layer in layers.items():
        topology, grad, dense = layer.topology, layer.weight.grad, made[name]
        was_plain = not issubclass(layer.__dict__.get("_dense_class", Masked), Masked)
        if was_plain and not isinstance(dense, Powered):
            dense.become_plain()
        become(layer, dense)
        layer.weight.grad = None if grad is None else topology.scatter(grad)
        for tensor in states[name]:
            tensor.replace(topology.scatter)
    return model


def _check_bare(op: str, model: nn.Module) -> None:
    """No wrapper around ``model`` has copied, hooked or compiled what is going to change."""
    for name, module in model.named_modules():
        is_compiled = "_orig_mod" in module._modules
        if is_compiled or isinstance(module, (DataParallel, DistributedDataParallel)):
            raise ValueError(
                f"{op}: {called(name, module)} wraps a model whose layers are to change; do this "
                "to the model itself, before it is wrapped"
            )


# ---- what is chosen


def _settled(each: Candidate, wanted: set[str]) -> PlannedLayer | None:
    """The row of a layer of which nothing has to be measured; None of the others."""
    if is_sparse(each.layer):
        return _row(each, "sparse", "it is already")
    if each.name not in wanted:
        return _row(each, "dense", "not selected")
    reason = each.obstacle or each.unpruned()
    device = None if reason else cast(Tensor, each.layer.weight).device
    if device is not None and device.type != "cpu":
        reason = f"on {device}, where sparse products have no kernels"
    return _row(each, "dense", reason) if reason else None


def _measured(
    each: Candidate, calls: list[Call] | None, training: bool, at_least: float, measure: Measure
) -> tuple[PlannedLayer, Sparse | None]:
    """The row of a pruned layer, and its sparse counterpart where that is chosen."""
    if not calls:
        why = "not reached by the sample input" if calls is not None else "called with no tensor"
        return _row(each, "dense", why), None
    for call in calls:
        if call.dtype not in KERNEL_DTYPES:
            dtype = str(call.dtype).removeprefix("torch.")
            return _row(each, "dense", f"input dtype {dtype} has no kernel", calls), None
    counterpart = each.as_sparse()
    dense_ms, sparse_ms = (1e3 * t for t in measure(each.layer, counterpart, calls, training))
    first, second = sorted((dense_ms, sparse_ms))
    reason = (
        f"{'dense' if dense_ms < sparse_ms else 'sparse'} is faster: {first:.3g} ms against "
        f"{second:.3g} ms"
    )
    if at_least != 1:
        reason += f"; {at_least:g} times are asked for"
    is_chosen = dense_ms >= at_least * sparse_ms
    choice: Choice = "sparse" if is_chosen else "dense"
    row = _row(each, choice, reason, calls, (dense_ms, sparse_ms))
    return row, counterpart if is_chosen else None


def _row(
    each: Candidate,
    choice: Choice,
    reason: str,
    calls: Sequence[Call] = (),
    times: tuple[float | None, float | None] = (None, None),
) -> PlannedLayer:
    return PlannedLayer(
        name=each.name,
        kind=each.kind,
        shape=each.shape,
        kept=each.kept,
        inputs=tuple(dict.fromkeys(call.shape for call in calls)),
        calls=sum(call.times for call in calls),
        dense_ms=times[0],
        sparse_ms=times[1],
        choice=choice,
        reason=reason,
    )


# ---- the change itself


def _become_sparse(
    model: nn.Module,
    made: Mapping[str, Sparse],
    plain: Sequence[str],
    optimizers: Sequence[Optimizer],
) -> None:
    """Give the layers their sparse counterparts' insides, and the optimizers' states with them.

    Those of ``plain`` get masks.
    """
    layers = {name: model.get_submodule(name) for name in made}
    weights = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
    states = {
        name: state_tensors("sparsify", optimizers, name, weight)
        for name, weight in weights.items()
    }
    if plain:
        add_masks(model, select=plain)
    for name, layer in layers.items():
        weight, topology = weights[name], made[name].topology
        grad, dense_class = weight.grad, type(layer)
        become(layer, made[name])
        layer.__dict__["_dense_class"] = dense_class
        weight.grad = None if grad is None else topology.gather(grad)
        for tensor in states[name]:
            tensor.replace(topology.gather)
