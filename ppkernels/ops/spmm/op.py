"""The products of a sparse weight as PyTorch ops: functions, schemas, shapes, kernels, autograd.

The CPU kernels register themselves from csrc/bindings/spmm.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ppkernels._checks import check_floating
from ppkernels.ops._entries import index_dtype
from ppkernels.ops._layout import as_rows
from ppkernels.ops._library import define, run
from ppkernels.ops._operands import (
    as_autocast_has_it,
    as_kernel,
    check_beside_values,
    check_bias,
    is_differentiated,
    sum_for_bias,
    uses_reference,
)
from ppkernels.ops.spmm import reference
from ppkernels.ops.topology import Topology, check_topology

# ---- public functions


def spmm(input: Tensor, values: Tensor, topology: Topology, bias: Tensor | None = None) -> Tensor:
    """The linear layer y = x·θᵀ + b of a sparse weight: work in proportion to what is kept.

    θ [N, K] has ``values`` at the entries of ``topology`` and 0 elsewhere. Differentiable with
    respect to ``input``, ``values`` and ``bias``, twice; the gradient of ``values`` is that of the
    entries alone. Under autocast ``input`` is cast as F.linear's would be, and ``values`` stay.

    Args:
        input: x, [..., K]; float32, float64, bfloat16 or float16.
        values: [E], of ``input``'s dtype or another; float64 goes with float64 only.
        topology: of shape [N, K]; of a weight with more dimensions K is the product of all sizes
            but the first.
        bias: b, [N], of any of the dtypes; None, no bias.

    Returns:
        y, [..., N], contiguous, of ``input``'s dtype.

    Exactness: products are added up in float32 at least. Where there are kernels (float32 and
    bfloat16 on the CPU) a result has the same bits on any number of threads, and a row of x has the
    same in any batch of two or more; alone it is added up in another order. There an entry that is
    not kept takes no part: NaN or an infinity in x comes into those outputs alone whose row has an
    entry there. The reference multiplies by a dense θ, whose zeros spread it to all outputs.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not go together.
    """
    check_topology("spmm", topology)
    check_floating("spmm", "input", input)
    topology.check_values("spmm", values)
    input = as_autocast_has_it(input)
    _check_operand("spmm", "input", input, values, topology.in_features)
    check_bias("spmm", bias, topology.rows, values)
    return Spmm.of(input, values, topology, bias)


def spmm_grad_input(grad_output: Tensor, values: Tensor, topology: Topology) -> Tensor:
    """The gradient of `spmm` with respect to its input: ∂L/∂x = ∂L/∂y·θ. Not differentiable.

    Args:
        grad_output: ∂L/∂y, [..., N], of the input's dtype.
        values, topology: as in `spmm`.

    Returns:
        ∂L/∂x, [..., K], contiguous, of ``grad_output``'s dtype.

    Raises:
        TypeError, ValueError: as `spmm`.
    """
    op = "spmm_grad_input"
    check_topology(op, topology)
    check_floating(op, "grad_output", grad_output)
    topology.check_values(op, values)
    _check_operand(op, "grad_output", grad_output, values, topology.rows)
    plain = uses_reference(grad_output, values)
    return run(op, plain, grad_output.detach(), values.detach(), *_transposed(topology))


def spmm_grad_values(
    grad_output: Tensor, input: Tensor, topology: Topology, dtype: torch.dtype | None = None
) -> Tensor:
    """The gradient of `spmm` with respect to its values, and to no other entry. Not differentiable.

    ∂L/∂values[e] = Σ_b ∂L/∂y[b, n]·x[b, k] for the entry e in row n and column k, b over all
    leading dimensions: as many products as there are entries, not as θ has.

    Args:
        grad_output: ∂L/∂y, [..., N], of ``input``'s dtype.
        input: x, [..., K], with the leading dimensions of ``grad_output``.
        topology: as in `spmm`.
        dtype: of the values; ``input``'s by default.

    Returns:
        ∂L/∂values, [E], of ``dtype``.

    Raises:
        TypeError, ValueError: as `spmm`.
    """
    op = "spmm_grad_values"
    check_topology(op, topology)
    check_floating(op, "grad_output", grad_output)
    check_floating(op, "input", input)
    values = input.new_empty(0, dtype=dtype)
    check_floating(op, "dtype", values)
    _check_operand(op, "grad_output", grad_output, values, topology.rows)
    _check_operand(op, "input", input, values, topology.in_features)
    if grad_output.shape[:-1] != input.shape[:-1] or grad_output.dtype != input.dtype:
        raise ValueError(
            f"{op}: grad_output and input must agree in dtype and in all dimensions but the last, "
            f"got {tuple(grad_output.shape)} {grad_output.dtype} and {tuple(input.shape)} "
            f"{input.dtype}"
        )
    indices = (topology.offsets, topology.columns)
    plain = uses_reference(input, values)
    return run(op, plain, grad_output.detach(), input.detach(), values, *indices)


def _check_operand(op: str, name: str, operand: Tensor, values: Tensor, features: int) -> None:
    """``operand`` has as many features as the weight expects, and goes with its values."""
    if operand.dim() == 0 or operand.shape[-1] != features:
        came = f"{operand.shape[-1]} features" if operand.dim() else "no dimension"
        raise ValueError(f"{op}: {name} has {came}, the topology expects {features}")
    check_beside_values(op, name, operand, values)


def _transposed(topology: Topology) -> tuple[Tensor, Tensor, Tensor]:
    """The entries column by column, as of the matrix [N, K]: with one tap, whatever the shape."""
    offsets, rows, order = topology.transposed()
    taps = math.prod(topology.shape[2:])
    if taps > 1:
        rows = (rows.long() // taps).to(index_dtype(topology.rows))
    return offsets, rows, order


# ---- schemas, shapes, and the kernels of every device but the CPU

_SCHEMAS = {
    "spmm": "(Tensor input, Tensor values, Tensor offsets, Tensor columns, Tensor? bias)",
    "spmm_grad_input": (
        "(Tensor grad_output, Tensor values, Tensor offsets, Tensor rows, Tensor order)"
    ),
    "spmm_grad_values": (
        "(Tensor grad_output, Tensor input, Tensor values, Tensor offsets, Tensor columns)"
    ),
}
_SHAPES: dict[str, Callable[..., Tensor]] = {
    "spmm": lambda input, values, offsets, columns, bias: input.new_empty(
        (*input.shape[:-1], offsets.numel() - 1)
    ),
    "spmm_grad_input": lambda grad_output, values, offsets, rows, order: grad_output.new_empty(
        (*grad_output.shape[:-1], offsets.numel() - 1)
    ),
    "spmm_grad_values": lambda grad_output, input, values, offsets, columns: values.new_empty(
        columns.numel()
    ),
}

for _name, _schema in _SCHEMAS.items():
    define(_name, f"{_schema} -> Tensor", _SHAPES[_name], as_kernel(getattr(reference, _name)))

# ---- autograd


class Spmm(torch.autograd.Function):
    """y = x·θᵀ + b for a sparse θ, and its gradients. `pp.spmm` is the checked way in.

    ``Spmm.of(input, values, topology, bias)``. Differentiable twice (through a dense θ); works in
    torch.compile(fullgraph=True) and under torch.func's transforms; forward-mode differentiation
    outside torch.func is refused with PyTorch's error.
    """

    @staticmethod
    def of(input: Tensor, values: Tensor, topology: Topology, bias: Tensor | None) -> Tensor:
        """As `pp.spmm`, arguments not checked."""
        offsets, columns = topology.offsets, topology.columns
        if torch._C._are_functorch_transforms_active():
            return run("spmm", True, input, values, offsets, columns, bias)
        trained = (input, values) if bias is None else (input, values, bias)
        needs_grad = torch.is_grad_enabled() and any(each.requires_grad for each in trained)
        # Forward-mode tangents want the Function too, which says that it has no rule for them.
        if not needs_grad and forward_ad._current_level < 0:
            plain = uses_reference(input, values)
            return run("spmm", plain, input, values, offsets, columns, bias)
        transposed = _transposed(topology) if input.requires_grad else (None, None, None)
        out: Tensor = Spmm.apply(input, values, bias, offsets, columns, *transposed)
        return out

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        columns: Tensor,
        *transposed: Tensor | None,
    ) -> Tensor:
        for_input, for_values, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            input if for_values else None,
            values if for_input else None,
            offsets,
            columns,
            *transposed,
        )
        ctx.dtype = values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return run("spmm", uses_reference(input, values), input, values, offsets, columns, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, values, offsets, columns, *transposed = ctx.saved_tensors
        for_input, for_values, for_bias, *_ = ctx.needs_input_grad
        grad_input = grad_values = grad_bias = None
        if for_input or for_values:
            # For its dtype; the values themselves may have moved on.
            like = grad_output.new_empty(0, dtype=ctx.dtype) if values is None else values
            plain = is_differentiated() or uses_reference(grad_output, like)
        if for_input:
            grad_input = run("spmm_grad_input", plain, grad_output, values, *transposed)
        if for_values:
            indices = (offsets, columns)
            grad_values = run("spmm_grad_values", plain, grad_output, input, like, *indices)
        if for_bias:
            grad_bias = sum_for_bias(as_rows(grad_output), (0,), ctx.bias_dtype)
        return grad_input, grad_values, grad_bias, None, None, None, None, None
