"""Turns the layers of a model into powered ones or gives them masks, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from ppkernels._checks import check_model
from ppkernels._powered import (
    MaskedLayer,
    Stores,
    enrol,
    is_masked,
    is_powered,
    masked_layers,
    masked_layers_of,
    weight_parameter,
)
from ppkernels.nn.choice import (
    ADD_MASKS,
    MASKED,
    POWERED,
    Alphas,
    Select,
    called,
    chosen_layers,
    selected_layers,
)
from ppkernels.nn.masks import Masked
from ppkernels.nn.powered import Powered, check_stores
from ppkernels.nn.sharing import (
    check_no_readers,
    check_one_mask,
    check_powered_already,
    check_ties,
)

ModelT = TypeVar("ModelT", bound=nn.Module)
LayerT = TypeVar("LayerT", bound=MaskedLayer)


def powerize(
    model: ModelT,
    alpha: Alphas,
    stores: Stores = "theta",
    *,
    select: Select | None = None,
) -> ModelT:
    """Turn the linear and convolution layers of ``model`` into powered ones, in place.

    The modules and Parameters stay the same objects: hooks, tied weights and an optimizer's
    references hold. Outputs stay too: bit for bit with ``stores="theta"``; with ``stores="phi"`` θ
    is within α+1 ULP of what it was (float32, compiled CPU kernels). Nothing is changed when an
    error is raised.

    Powered are modules of exactly these types: nn.Linear (the output projection inside
    nn.MultiheadAttention included), nn.Conv1d, nn.Conv2d, nn.Conv3d, and the layers of this
    package that have their masks or are sparse. All others are left alone:
    transposed convolutions, embeddings, nn.Bilinear, recurrent layers, the input projection of
    nn.MultiheadAttention, subclasses, lazy layers that have seen no batch yet, layers whose weight
    torch.nn.utils has parametrized or pruned. Asking for one of them by name is an error.

    A layer that is powered already stays as it is, provided it has the exponent and ``stores``
    asked for; else it is an error, for `set_alpha` says what is to be kept. A layer of `add_masks`
    keeps its masks.

    ``stores="phi"`` is refused where somebody else in ``model`` reads the weight: a module that the
    weight is tied to and that is not powered along (an embedding, say), and those known to read
    their children's weights: nn.MultiheadAttention, nn.TransformerEncoderLayer,
    nn.LinearCrossEntropyLoss, the shifted-window attentions of torchvision. Not noticed are other
    modules that read a child's ``.weight``, which have to read ``.theta``, plain modules outside
    ``model`` that share a weight with it, and a layer that stores φ and that you assign into one of
    these readers yourself.

    With ``stores="phi"`` the weights' ``.grad`` is dropped, for it belongs to θ. An optimizer's
    state is left as it is.

    Args:
        model: any module; a layer itself is changed and returned.
        alpha: α ≥ 1 for all layers; or a mapping from names (of ``model.named_modules()``) to α,
            which also chooses the layers; or a function of name and layer.
        stores: ``"theta"``: the weight is θ, to be stepped by an optimizer of `pp.optim`;
            ``"phi"``: the weight is φ, for any optimizer.
        select: which layers: the names of some, or a function of name and layer, asked about those
            that can be powered. All of them by default.

    Returns:
        ``model``.

    Raises:
        TypeError: a module that was named, or is ``model`` itself, and cannot be powered; arguments
            of another kind.
        ValueError: no such module, or none to power; exponents that are none, or that differ
            between tied weights; a weight that cannot hold φ, or that a powered layer outside
            ``model`` has made φ already.

    Example::

        model = pp.powerize(torchvision.models.resnet18(), 1.5, select=lambda name, _: name != "fc")
    """
    check_stores("powerize", stores)
    chosen = chosen_layers(model, alpha, select)
    check_powered_already(chosen, stores)
    if stores == "phi":
        check_no_readers(model, chosen)
    check_ties(model, chosen, stores)
    plain = [(layer, value) for layer, value in chosen.values() if not is_powered(layer)]
    for layer, value in plain:
        _become(layer, POWERED[type(layer)])
        cast(Powered, layer).give_alpha(value, stores)
    if stores == "phi":
        for powered in _one_per_weight(cast(Powered, layer) for layer, _ in plain):
            powered.set_theta(powered.weight)
            # It is ∂L/∂θ, and the weight is φ now.
            powered.weight.grad = None
    return model


def add_masks(model: ModelT, *, select: Select | None = None) -> ModelT:
    """Give the linear and convolution layers of ``model`` their two masks, in place.

    The layers become a `MaskedLinear`, `MaskedConv1d`, `MaskedConv2d` or `MaskedConv3d`, with an
    ``update_mask`` (which entries are trained) and a ``mask`` (which the network sees), both None.
    The modules and Parameters stay the same objects, outputs and their cost stay as they are, and
    any optimizer may step them. Powered layers have masks already and stay as they are, and so do
    the layers of an earlier call.

    Changed are modules of the types that `powerize` takes, and none that it leaves alone. Modules
    that read a layer's ``weight`` themselves do not see its ``mask`` (`Masked` names some).

    Args:
        model: any module; a layer itself is changed and returned.
        select: which layers: the names of some (of ``model.named_modules()``), or a function of
            name and layer, asked about those that can have masks. All of them by default.

    Returns:
        ``model``.

    Raises:
        TypeError: a module that was named, or is ``model`` itself, and cannot have masks; a
            ``select`` of another kind; no module.
        ValueError: no such module, or none to give masks to.

    Nothing is changed when an error is raised. `fold` is the way back.

    Example::

        model = pp.nn.add_masks(torchvision.models.resnet18())
        model.fc.update_mask = pp.BitMask.pack(model.fc.weight.abs() > 0.01)
    """
    for layer in selected_layers(ADD_MASKS, model, select).values():
        if not is_masked(layer):
            _become(layer, MASKED[type(layer)])
            enrol(layer)
    return model


def fold(model: ModelT) -> ModelT:
    """Turn the powered and masked layers of ``model`` back into plain ones, in place.

    The opposite of `powerize` and `add_masks`: the same modules and Parameters, each layer of the
    class it was made from (nn.Linear, nn.Conv2d, ...), its weight θ, with no exponent. Outputs stay
    bit for bit the same: where a layer has a ``mask``, the weight is 0 where it hides, and the
    values hidden there are lost. Not so for a module that reads such a layer's ``weight`` itself:
    it has not seen the mask until now. The masks are dropped, and so is the ``.grad`` of weights
    that held φ.

    Sparse layers, powered or plain, become layers for inference, a `FoldedSparseLinear` or
    `FoldedSparseConv2d`: the same modules, without Parameters; values and indices are buffers,
    which torch.compile and torch.export take. Kept values that are 0, hidden ones too, are dropped;
    the outputs of such a layer are the same up to the rounding of sums, and it shares its values
    with no other.

    Args:
        model: any module; a powered or masked layer itself is changed and returned.

    Returns:
        ``model``.

    Raises:
        TypeError: a subclass of a powered or masked layer, which has no plain class; no module.
        RuntimeError: a weight that torch.nn.utils has parametrized or pruned.
        ValueError: φ is stored in a weight, or a ``mask`` hides a part of one, that a powered or
            masked layer outside ``model`` shares; a ``mask`` on a weight that others in ``model``
            use unmasked.
    """
    check_model("fold", model)
    layers = masked_layers(model)
    for name, layer in layers.items():
        _check_may_fold(name, cast(Masked, layer), layers)
    check_one_mask(model, layers)
    for layer in _one_per_weight(layers.values()):
        holds_phi = _holds_phi(layer)
        if holds_phi or layer.mask is not None:
            with torch.no_grad():
                layer.weight.copy_(layer.theta)
        if holds_phi:
            layer.weight.grad = None  # it is ∂L/∂φ
    for layer in layers.values():
        cast(Masked, layer).become_plain()
    return model


def _check_may_fold(name: str, layer: Masked, layers: Mapping[str, MaskedLayer]) -> None:
    """``layer`` by itself can be folded along with ``layers``."""
    weight = weight_parameter(layer)
    if weight is None:
        raise RuntimeError(
            f"fold: the weight of {called(name, layer)} is no longer a Parameter of its own "
            "(torch.nn.utils.prune, parametrize or weight_norm has replaced it); undo that "
            "first"
        )
    if type(layer) not in (*POWERED, *POWERED.values()):
        kind = "powered" if is_powered(layer) else "masked"
        raise TypeError(
            f"fold: {called(name, layer)} is a subclass of a {kind} layer, and nobody but "
            "you can say which plain class it folds to"
        )
    tied = [other for other in masked_layers_of(weight) if other not in layers.values()]
    if tied and (_holds_phi(layer) or layer.mask is not None):
        why = "which holds phi" if _holds_phi(layer) else "which a mask hides in part"
        raise ValueError(
            f"fold: {called(name, layer)} shares its weight, {why}, with {tied[0]} outside the "
            "model; fold a module that contains both"
        )


def _holds_phi(layer: object) -> bool:
    return is_powered(layer) and layer.stores == "phi"


# ---- the change itself


def _become(layer: nn.Module, masked_class: type[Masked]) -> None:
    """Make ``layer`` one of a class with masks; it knows which plain class it came from."""
    plain_class = layer.plain_class if isinstance(layer, Masked) else type(layer)
    layer.__class__ = masked_class
    if plain_class is not masked_class.plain_class:
        layer.__dict__["plain_class"] = plain_class


def _one_per_weight(layers: Iterable[LayerT]) -> Iterable[LayerT]:
    return {id(layer.weight): layer for layer in layers}.values()
