"""What the rest of the package knows of a layer with masks or a power, and which are alive.

Layers, optimizers and everything built on them meet here: a layer enrols itself when it is made, an
optimizer asks which layer a parameter belongs to. Neither side imports the other.

Every powered layer has masks; a plain layer with masks is one whose exponent would be 1, and whose
weight any optimizer may step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypeGuard
from weakref import ref

from torch import Tensor, nn

from ppkernels._checks import is_captured
from ppkernels.ops import BitMask, Topology

Stores = Literal["theta", "phi"]
Keep = Literal["theta", "phi"]

# What an optimizer's state calls the float32 copy of a half-precision weight.
MASTER = "master"


class MaskedLayer(Protocol):
    """A layer with masks, powered or plain.

    ``weight`` is the trained parameter. Where the bit of ``update_mask`` is 0 an entry is frozen;
    where the bit of ``mask`` is 0 the network sees 0 in its place.
    """

    weight: Tensor
    update_mask: BitMask | None
    mask: BitMask | None

    @property
    def theta(self) -> Tensor:
        """The weight that the network uses."""

    def set_theta(self, values: Tensor) -> None:
        """Overwrite the weight in place so that ``theta`` equals ``values``."""


class PoweredLayer(MaskedLayer, Protocol):
    """A layer whose weight is θ = φ·|φ|^(α−1).

    ``weight`` holds θ or φ, as ``stores`` says; ``alpha`` is a 0-dim float64 tensor that changes
    its value in place.
    """

    stores: Stores
    alpha: Tensor

    def set_alpha(self, alpha: float | Tensor, *, keep: Keep) -> None:
        """Change the exponent, with φ or θ kept."""


class SparseLayer(MaskedLayer, Protocol):
    """A layer that stores kept values alone: ``weight``, its masks and θ have the shape [E]."""

    bias: Tensor | None

    @property
    def topology(self) -> Topology:
        """Where the values stand in the weight of the dense layer, which has its shape."""

    def dense(self) -> Tensor:
        """θ as the dense layer's weight."""


class StepsTheta(Protocol):
    """An optimizer that takes the powered step for weights that hold θ; all others are refused."""

    steps_theta: bool


# From a layer's id to the layer; weak, so that it lives as long as its user wants and no longer.
# Not a WeakSet: a dict is copied in one go, whatever other threads add meanwhile.
_layers: dict[int, ref[nn.Module]] = {}
# Another object whenever a layer comes, goes, or changes its Parameter.
_generation = object()


class _Index(NamedTuple):
    """Which layers each parameter trains, read at one moment and never changed afterwards."""

    generation: object
    # From the id of a parameter; ids are compared with the object itself before they are believed.
    layers: dict[int, list[ref[nn.Module]]]
    # Each layer with the id of its weight.
    weights: list[tuple[ref[nn.Module], int]]


_index = _Index(_generation, {}, [])


def enrol(layer: nn.Module) -> None:
    """Note a layer that has come into being; it may still be under construction."""
    key = id(layer)
    # Bound here, because a layer may outlive the globals of this module.
    forget, changed = _layers.pop, weights_changed

    def is_gone(_: ref[nn.Module]) -> None:
        forget(key, None)
        changed()

    _layers[key] = ref(layer, is_gone)
    changed()


def dismiss(layer: nn.Module) -> None:
    """Forget a layer that has neither masks nor a power any more."""
    _layers.pop(id(layer), None)
    weights_changed()


def weights_changed() -> None:
    """Note that some layer's weight or update mask may be another one than before."""
    global _generation
    _generation = object()


def generation() -> object:
    """An object that is another one whenever `weights_changed`, or a layer has come or gone."""
    return _generation


def any_layers() -> bool:
    """Whether any layer with masks is alive, powered or plain."""
    return len(_layers) > 0


def is_masked(module: object) -> TypeGuard[MaskedLayer]:
    """Whether ``module`` is a layer with masks, powered or plain; set or not."""
    return id(module) in _layers


def is_powered(module: object) -> TypeGuard[PoweredLayer]:
    """Whether ``module`` is a powered layer."""
    # What a plain layer with masks lacks. The class is asked, for it changes with the layer.
    return id(module) in _layers and hasattr(type(module), "set_alpha")


def is_sparse(module: object) -> TypeGuard[SparseLayer]:
    """Whether ``module`` is a layer that stores kept values alone, powered or plain."""
    return id(module) in _layers and hasattr(type(module), "change_topology")


def entries_of(layer: MaskedLayer) -> int:
    """How many entries the weight has, those included that a sparse layer does not store."""
    return layer.topology.numel() if is_sparse(layer) else layer.weight.numel()


def masked_layers(module: nn.Module) -> dict[str, MaskedLayer]:
    """The layers with masks in ``module``, powered or plain; otherwise as `powered_layers`."""
    return {name: child for name, child in module.named_modules() if is_masked(child)}


def powered_layers(module: nn.Module) -> dict[str, PoweredLayer]:
    """The powered layers in ``module``, itself included, by name; a shared layer comes once."""
    return {name: child for name, child in module.named_modules() if is_powered(child)}


def alpha_of_stored(layer: object) -> Tensor | None:
    """α of the φ that ``layer`` stores; None where it stores θ, or has no power."""
    return layer.alpha if is_powered(layer) and layer.stores == "phi" else None


def weight_parameter(layer: MaskedLayer | nn.Module) -> nn.Parameter | None:
    """The Parameter registered as ``weight``, or None where something has replaced it."""
    parameters = layer.__dict__.get("_parameters", {})
    weight = parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def refresh() -> None:
    """Read every live layer's Parameters again.

    A sharding wrapper may exchange a Parameter behind the layer's back. Whoever sees an optimizer
    for the first time calls this; between such moments `weights_changed` is enough.
    """
    _read()


def notice_exchanges() -> None:
    """Find out whether a Parameter was exchanged behind a layer's back: 0.1 µs a live layer.

    For whoever would do harm with yesterday's answer.
    """
    for reference, known in _index.weights:
        layer = reference()
        if layer is not None and id(layer._parameters.get("weight")) != known:
            weights_changed()
            return


def _read() -> _Index:
    """A new index. It is built aside and assigned once, for other threads use the old one."""
    global _index
    # Taken first: what changes while the layers are read makes the index old again.
    index = _Index(_generation, {}, [])
    for reference in _layers.copy().values():
        layer = reference()
        # nn.Module's constructor makes _modules last.
        if layer is None or "_modules" not in layer.__dict__:
            continue  # gone, or still being constructed
        index.weights.append((reference, id(layer._parameters.get("weight"))))
        for parameter in trained(layer):
            index.layers.setdefault(id(parameter), []).append(reference)
    _index = index
    return index


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """The Parameters that the weight comes from: pruning and the like put others in its place."""
    weight = weight_parameter(layer)
    if weight is not None:
        return [weight]
    bias = layer._parameters.get("bias")
    # Copied in one go, for another thread may still be constructing the layer.
    parameters = [
        parameter for module in layer.modules() for parameter in module._parameters.copy().values()
    ]
    return [found for found in parameters if found is not None and found is not bias]


def masked_layers_of(parameter: Tensor) -> list[MaskedLayer]:
    """The live layers with masks, powered or plain, that ``parameter`` is the weight of.

    More than one if it is tied.
    """
    index = _index
    if index.generation is not _generation:
        index = _read()
    found = [reference() for reference in index.layers.get(id(parameter), ())]
    return [
        layer  # type: ignore[misc]
        for layer in found
        if layer is not None and any(own is parameter for own in trained(layer))
    ]


def powered_layers_of(parameter: Tensor) -> list[PoweredLayer]:
    """The live powered layers that ``parameter`` is the weight of; more than one if it is tied."""
    return [layer for layer in masked_layers_of(parameter) if is_powered(layer)]


def freezing_layer(parameter: Tensor) -> MaskedLayer | None:
    """A live layer that trains ``parameter`` and has an ``update_mask``, or None."""
    masked = (layer for layer in masked_layers_of(parameter) if layer.update_mask is not None)
    return next(masked, None)


def theta_layer(parameter: Tensor) -> PoweredLayer | None:
    """The live layer that stores θ in ``parameter``, or None.

    Raises:
        RuntimeError: ``parameter`` trains such a layer's weight through a parametrization or a
            pruning of torch.nn.utils, so that it is not θ itself.
    """
    for layer in powered_layers_of(parameter):
        if layer.stores != "theta":
            continue
        if weight_parameter(layer) is not parameter:
            raise RuntimeError(
                f"the weight of {layer} is no longer a Parameter of its own (torch.nn.utils.prune, "
                "parametrize or weight_norm has replaced it), so no optimizer can take the powered "
                "step on it; undo that, or store φ: pp.powerize(..., stores='phi') before it"
            )
        return layer
    return None


def update_mask_of(optimizer: str, parameter: Tensor) -> BitMask | None:
    """The mask under which ``optimizer`` has to step ``parameter``, or None.

    Raises:
        RuntimeError: a mask that says nothing of the entries of ``parameter``: it is another
            shape's, or torch.nn.utils has put something between the two.
    """
    layer = freezing_layer(parameter)
    if layer is None or (mask := layer.update_mask) is None:
        return None
    if weight_parameter(layer) is not parameter:
        raise RuntimeError(
            f"{optimizer}: {layer} has an update_mask, but its weight is no longer a Parameter of "
            "its own (torch.nn.utils.prune, parametrize or weight_norm has replaced it), so no "
            "entry of it can be frozen; undo that, or set the layer's update_mask to None"
        )
    if mask.shape != parameter.shape:
        raise RuntimeError(
            f"{optimizer}: the update_mask of {layer} has shape {tuple(mask.shape)}, and its "
            f"weight has shape {tuple(parameter.shape)}; give the layer a mask of the weight's "
            "shape, or None"
        )
    return mask


def check_one_update_mask(optimizer: str, parameter: Tensor) -> None:
    """The layers that share ``parameter`` have equal update masks, or one has; a GPU is waited for.

    Where a CUDA graph is being captured nothing can be asked.
    """
    layers = masked_layers_of(parameter)
    masks = [layer.update_mask for layer in layers if layer.update_mask is not None]
    if len(masks) < 2 or is_captured(parameter.device):
        return
    if any(mask != masks[0] for mask in masks[1:]):
        raise ValueError(
            f"{optimizer}: {' and '.join(map(str, layers))} share one weight, so their update "
            "masks have to be equal"
        )
