"""What goes beside the values of a sparse weight: questions and checks of its products."""

from __future__ import annotations

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import check_floating

# The dtypes that the CPU kernels have; the others take the reference there too.
_IN_KERNELS = (torch.float32, torch.bfloat16)


def uses_reference(operand: Tensor, values: Tensor) -> bool:
    """Whether a product of these is the reference's, whatever their device."""
    return (
        _backend.uses_reference()
        or operand.dtype not in _IN_KERNELS
        or values.dtype not in _IN_KERNELS
    )


def as_autocast_has_it(input: Tensor) -> Tensor:
    """``input`` as autocast gives it to a layer."""
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(device))


def check_beside_values(op: str, name: str, operand: Tensor, values: Tensor) -> None:
    """Dtype and device of ``operand`` go with those of ``values``."""
    if operand.dtype != values.dtype and torch.float64 in (operand.dtype, values.dtype):
        raise TypeError(
            f"{op}: {name} must be float64 where the values are, and only there, got "
            f"{operand.dtype} beside {values.dtype}"
        )
    if operand.device != values.device:
        raise ValueError(
            f"{op}: {name} must be on the device of the values, {values.device}, got "
            f"{operand.device}"
        )


def check_bias(op: str, bias: Tensor | None, rows: int, values: Tensor) -> None:
    """``bias`` has one number for each row, beside the values; or it is None."""
    if bias is None:
        return
    check_floating(op, "bias", bias)
    if bias.shape != (rows,) or bias.device != values.device:
        raise ValueError(
            f"{op}: bias must have shape ({rows},) on {values.device}, got "
            f"{tuple(bias.shape)} on {bias.device}"
        )
