"""What the rest of the package knows of a powered layer, and which layers are alive.

Layers, optimizers and everything built on them meet here: a layer enrols itself when it is made, an
optimizer asks which layer a parameter belongs to. Neither side imports the other.
"""

from __future__ import annotations

from typing import Literal, Protocol
from weakref import WeakSet, ref

from torch import Tensor, nn

Stores = Literal["theta", "phi"]
Keep = Literal["theta", "phi"]


class PoweredLayer(Protocol):
    """A layer whose weight is θ = φ·|φ|^(α−1).

    ``weight`` is the trained parameter and holds θ or φ, as ``stores`` says; ``alpha`` is a 0-dim
    float64 tensor that changes its value in place.
    """

    stores: Stores
    weight: Tensor
    alpha: Tensor

    @property
    def theta(self) -> Tensor:
        """The weight that the network uses."""

    def set_theta(self, values: Tensor) -> None:
        """Overwrite the weight in place so that ``theta`` equals ``values``."""

    def set_alpha(self, alpha: float | Tensor, *, keep: Keep) -> None:
        """Change the exponent, with φ or θ kept."""


class StepsTheta(Protocol):
    """An optimizer that takes the powered step for weights that hold θ; all others are refused."""

    steps_theta: bool


# Weak, so that a layer lives as long as its user wants and no longer.
_layers: WeakSet[nn.Module] = WeakSet()
# From the id of a parameter to the layers that it trains; ids are compared with the object itself
# before they are believed.
_index: dict[int, list[ref[nn.Module]]] = {}
_index_is_old = False
_generation = 0


def enrol(layer: nn.Module) -> None:
    """Note a layer that has come into being; it may still be under construction."""
    _layers.add(layer)
    weights_changed()


def dismiss(layer: nn.Module) -> None:
    """Forget a layer that is no longer powered."""
    _layers.discard(layer)
    weights_changed()


def weights_changed() -> None:
    """Note that some layer's weight may be another Parameter than before."""
    global _generation, _index_is_old
    _generation += 1
    _index_is_old = True


def generation() -> int:
    """A number that grows whenever a layer comes, goes, or changes its Parameter."""
    return _generation


def any_layers() -> bool:
    """Whether any powered layer is alive."""
    return len(_layers) > 0


def is_powered(module: nn.Module) -> bool:
    """Whether ``module`` is a powered layer."""
    return module in _layers


def powered_layers(module: nn.Module) -> dict[str, PoweredLayer]:
    """The powered layers in ``module``, itself included, by name; a shared layer comes once."""
    return {name: child for name, child in module.named_modules() if child in _layers}


def weight_parameter(layer: PoweredLayer | nn.Module) -> nn.Parameter | None:
    """The Parameter registered as ``weight``, or None where something has replaced it."""
    parameters = layer.__dict__.get("_parameters", {})
    weight = parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def refresh() -> None:
    """Read every live layer's Parameters again.

    A sharding wrapper may exchange a Parameter behind the layer's back. Whoever sees an optimizer
    for the first time calls this; between such moments `weights_changed` is enough.
    """
    global _index_is_old
    _index.clear()
    for layer in list(_layers):
        if "_parameters" not in layer.__dict__:
            continue  # still being constructed
        weight = weight_parameter(layer)
        # Pruning and parametrizations of torch.nn.utils put other Parameters in weight's place.
        bias = layer._parameters.get("bias")
        trained = [weight] if weight is not None else list(layer.parameters())
        for parameter in trained:
            if parameter is not bias:
                _index.setdefault(id(parameter), []).append(ref(layer))
    _index_is_old = False


def layers_of(parameter: Tensor) -> list[PoweredLayer]:
    """The live powered layers that ``parameter`` is the weight of; more than one if it is tied."""
    if _index_is_old:
        refresh()
    found = [reference() for reference in _index.get(id(parameter), ())]
    return [
        layer  # type: ignore[misc]
        for layer in found
        if layer is not None and any(own is parameter for own in layer.parameters())
    ]


def theta_layer(parameter: Tensor) -> PoweredLayer | None:
    """The live layer that stores θ in ``parameter``, or None.

    Raises:
        RuntimeError: ``parameter`` trains such a layer's weight through a parametrization or a
            pruning of torch.nn.utils, so that it is not θ itself.
    """
    for layer in layers_of(parameter):
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
