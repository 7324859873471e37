"""What layers of this package read in a checkpoint, and what they refuse there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppkernels._checks import check_alpha
from ppkernels.ops import BitMask, Topology

MASKS = ("update_mask", "mask")
INDICES = ("offsets", "columns")


def taken_masks(
    state_dict: dict[str, Any], prefix: str, shape: torch.Size, error_msgs: list[str]
) -> dict[str, BitMask | None]:
    """Takes the masks out of a checkpoint; returns what is to be set, nothing after an error.

    One that has a mask or an exponent comes from a layer that could have both masks: those that it
    lacks are None. Any other may be a plain layer's and says nothing about masks.
    """
    saved = {name: state_dict.pop(prefix + name) for name in MASKS if prefix + name in state_dict}
    tells = bool(saved) or prefix + "alpha" in state_dict
    taken: dict[str, BitMask | None] = dict.fromkeys(MASKS) if tells else {}
    errors = []
    for name, words in saved.items():
        try:
            taken[name] = BitMask(words, shape)
        except (TypeError, ValueError) as error:
            errors.append(f'"{prefix}{name}": {error}')
    error_msgs.extend(errors)
    return {} if errors else taken


def drop_no_power(state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Takes an exponent of 1 out of a checkpoint, for a layer that has none; refuses φ."""
    alpha = state_dict.get(prefix + "alpha")
    if isinstance(alpha, Tensor):
        alpha = alpha.item() if alpha.numel() == 1 else alpha.tolist()
    if alpha == 1:
        del state_dict[prefix + "alpha"]
        state_dict.pop(prefix + "stores_phi", None)
    elif state_dict.pop(prefix + "stores_phi", False):
        # Where it holds θ, the loader says that the exponent is unexpected, as for a plain layer.
        error_msgs.append(
            f'"{prefix}weight": the checkpoint holds phi, under an exponent of {alpha}, and the '
            "layer is not powered; pp.powerize the model before it loads, or pp.fold the one that "
            "is saved"
        )


def saved_alpha(saved: Any, own: Tensor, prefix: str, error_msgs: list[str]) -> float:
    """The exponent of a checkpoint; the layer's ``own`` for a plain layer's checkpoint.

    ``saved`` is what the checkpoint has under ``alpha``: a float64 tensor, a number, or None. What
    is wrong with it is added to ``error_msgs``, and the layer's own holds.
    """
    if saved is None:
        return float(own)
    value: Any = saved
    if isinstance(saved, Tensor):
        value = saved.item() if saved.numel() == 1 else saved.tolist()
        if saved.dtype != torch.float64:
            # A checkpoint cast as a whole, say to bfloat16: the rounded exponent is another one.
            if value == own.to(saved.dtype).item():
                return float(own)
            error_msgs.append(
                f'"{prefix}alpha" must be float64, got {saved.dtype} (value {value}); a rounded '
                "exponent is another exponent, so save it in float64, or leave the key out and "
                "give the layer its alpha"
            )
            return float(own)
    try:
        return check_alpha(f'"{prefix}alpha"', value)
    except (TypeError, ValueError) as error:
        error_msgs.append(str(error))
        return float(own)


def refuse_to_convert(
    state_dict: dict[str, Any], prefix: str, saved_phi: bool, error_msgs: list[str]
) -> None:
    """Add an error if the checkpoint has what a replaced weight comes from, of the other kind."""
    replaced = tuple(prefix + name for name in ("weight_", "parametrizations.weight."))
    if not any(key.startswith(replaced) for key in state_dict):
        return
    saved, stored = ("phi", "theta") if saved_phi else ("theta", "phi")
    error_msgs.append(
        f'"{prefix}weight": the checkpoint holds {saved} and the layer stores {stored}, which is '
        "converted only where the weight is a Parameter of its own; here torch.nn.utils.prune, "
        "parametrize or weight_norm has replaced it: undo that, load, and do it again"
    )


# ---- sparse weights: their indices stand under ``offsets`` and ``columns``


def taken_topology(state_dict: dict[str, Any], prefix: str, own: Topology) -> Topology | None:
    """Takes the topology of a sparse weight out of a checkpoint; None where it says nothing of one.

    A dense weight goes with the topology that the layer has, ``own``: it and its masks are
    exchanged for what they have at the entries.

    Raises:
        TypeError, ValueError: what is wrong, for the loader's list of errors: indices that are no
            topology of the layer's shape, or of another number of entries than the weight; a dense
            weight that is not 0 where the layer has no entry.
    """
    found = {name: state_dict.pop(prefix + name) for name in INDICES if prefix + name in state_dict}
    weight = state_dict.get(prefix + "weight")
    if not found:
        is_dense = isinstance(weight, Tensor) and weight.shape == own.shape
        if not is_dense or own.device.type == "meta":
            return None
        _take_dense(state_dict, prefix, weight, own)
        return own
    if len(found) < len(INDICES):
        raise ValueError(f"the checkpoint has {next(iter(found))}, and not both of {INDICES}")
    topology = Topology(found["offsets"], found["columns"], own.shape)
    if isinstance(weight, Tensor) and weight.shape != topology.columns.shape:
        raise ValueError(
            f"the topology has {topology.count()} entries, and the weight beside it has shape "
            f"{tuple(weight.shape)}"
        )
    if own.device.type == "meta":
        return topology  # to be assigned
    topology = topology.to(own.device)
    return own if topology == own else topology


def _take_dense(state_dict: dict[str, Any], prefix: str, weight: Any, own: Topology) -> None:
    topology = own.to(weight.device)
    values = topology.gather(weight)
    lost = int(weight.count_nonzero()) - int(values.count_nonzero())
    if lost:
        raise ValueError(
            f"the checkpoint's weight is dense, and {lost} of its entries that are not 0 stand "
            "where this layer has none; load it into the dense layer, and make that one sparse"
        )
    state_dict[prefix + "weight"] = values
    for name in MASKS:
        if (words := state_dict.get(prefix + name)) is not None:
            bits = BitMask(words, own.shape).unpack().view(-1)
            state_dict[prefix + name] = BitMask.pack(bits[own.places().to(bits.device)]).words


def refuse_sparse(state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """For a layer that is not sparse: adds an error if the checkpoint is a sparse layer's."""
    found = [state_dict.pop(prefix + name, None) for name in INDICES]
    if any(indices is not None for indices in found):
        error_msgs.append(
            f'"{prefix}weight": the checkpoint holds the kept values of a sparse layer, and this '
            "one is dense; load it into a sparse layer, whose to_dense() gives the dense one"
        )
