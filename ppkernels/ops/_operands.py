"""What goes beside the values of a sparse weight: questions and checks of its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def is_differentiated() -> bool:
    """Whether a backward pass is to be differentiated in turn: then the reference makes it, whose
    operations have gradients themselves."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def as_kernel(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``reference`` as an op has it: a contiguous result, and products of the dtypes it names.

    Its caller has cast what autocast casts; autocast would round the operands once more.
    """

    def kernel(*args: Any) -> Tensor:
        device = args[0].device.type
        if not torch.amp.is_autocast_available(device):
            return reference(*args).contiguous()
        with torch.autocast(device, enabled=False):
            return reference(*args).contiguous()

    return kernel


def as_autocast_has_it(input: Tensor) -> Tensor:
    """``input`` as autocast gives it to a layer."""
    device = input.device.type
    if input.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return input
    is_on = torch.is_autocast_enabled(device)
    return input.to(torch.get_autocast_dtype(device)) if is_on else input


def sum_for_bias(grad_output: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """∂L/∂b, of the bias' ``dtype``: added up in that or in the wider one of ``grad_output``."""
    wide = torch.promote_types(grad_output.dtype, dtype)
    return grad_output.sum(dims, dtype=wide).to(dtype)


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
