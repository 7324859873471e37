"""The convolution by a sparse weight as PyTorch ops: functions, schemas, shapes, autograd.
Longer than 350 lines: three ops, a third of it their docstrings.

The CPU kernels register themselves from csrc/bindings/sparse_conv.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppkernels._checks import check_floating, check_whole
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
from ppkernels.ops.sparse_conv import reference
from ppkernels.ops.topology import Topology, check_topology

Pair = int | tuple[int, int]


class Geometry(NamedTuple):
    """How the kernel moves over the image, each as (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls, op: str, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1
    ) -> Geometry:
        """From arguments that are checked here, each a number or a pair of them."""
        return cls(
            _pair(op, "kernel_size", kernel_size, 1),
            _pair(op, "stride", stride, 1),
            _pair(op, "padding", padding, 0),
            _pair(op, "dilation", dilation, 1),
        )

    def gives_output(self, size: Sequence[int]) -> bool:
        """Whether an image of (Y, X) has pixels, and gives some: what a call checks each time."""
        (height, width), _, (above, beside), (down, across) = self
        rows, columns = size
        return (
            min(rows, columns) > 0
            and rows + 2 * above > down * (height - 1)
            and columns + 2 * beside > across * (width - 1)
        )

    def output_size(self, size: Sequence[int]) -> list[int]:
        """(Y', X') of the output for (Y, X) of the input."""
        return [
            (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for extent, kernel, stride, padding, dilation in zip(size, *self, strict=True)
        ]


# ---- public functions


def sparse_conv2d(
    input: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
) -> Tensor:
    """The convolution of torch.nn.functional.conv2d by a sparse weight, with groups = 1.

    θ [N, C, H, W] has ``values`` at the entries of ``topology`` and 0 elsewhere. Differentiable
    with respect to ``input``, ``values`` and ``bias``, twice; the gradient of ``values`` is that of
    the entries alone. Under autocast ``input`` is cast as F.conv2d's would be, and ``values`` stay.

    Args:
        input: x, [B, C, Y, X] or [C, Y, X]; float32, float64, bfloat16 or float16.
        values: [E], of ``input``'s dtype or another; float64 goes with float64 only.
        topology: of shape [N, C, H, W], none of them 0.
        bias: b, [N], of any of the dtypes; None, no bias.
        stride, padding, dilation: as in F.conv2d, each a number or a pair of them.

    Returns:
        y, [B, N, Y', X'] or [N, Y', X'], contiguous, of ``input``'s dtype.

    Exactness: products are added up in float32 at least. Where there are kernels (float32 and
    bfloat16 on the CPU) a result has the same bits on any number of threads, and NaN or an infinity
    in x comes into those outputs alone that an entry connects with it.

    Raises:
        TypeError, ValueError: dtypes, shapes, sizes or devices that do not go together.
    """
    op = "sparse_conv2d"
    geometry = _checked(op, topology, stride, padding, dilation)
    check_floating(op, "input", input)
    topology.check_values(op, values)
    input = as_autocast_has_it(input)
    _check_operand(op, "input", input, values, topology.shape[1], (3, 4))
    _check_size(op, geometry, input.shape[-2:])
    check_bias(op, bias, topology.rows, values)
    if input.dim() == 3:
        return SparseConv2d.of(input.unsqueeze(0), values, topology, bias, geometry).squeeze(0)
    return SparseConv2d.of(input, values, topology, bias, geometry)


def sparse_conv2d_grad_input(
    grad_output: Tensor,
    values: Tensor,
    topology: Topology,
    input_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
) -> Tensor:
    """The gradient of `sparse_conv2d` with respect to its input. Not differentiable.

    Args:
        grad_output: ∂L/∂y, [B, N, Y', X'].
        values, topology, stride, padding, dilation: as in `sparse_conv2d`.
        input_size: (Y, X) of the input, which a stride leaves open; a number, if both are equal.

    Returns:
        ∂L/∂x, [B, C, Y, X], contiguous, of ``grad_output``'s dtype.

    Raises:
        TypeError, ValueError: as `sparse_conv2d`.
    """
    op = "sparse_conv2d_grad_input"
    geometry = _checked(op, topology, stride, padding, dilation)
    check_floating(op, "grad_output", grad_output)
    topology.check_values(op, values)
    _check_operand(op, "grad_output", grad_output, values, topology.rows, (4,))
    size = _pair(op, "input_size", input_size, 1)
    _check_output(op, grad_output, geometry, size)
    args = (grad_output.detach(), values.detach(), *topology.transposed(), size)
    return run(op, uses_reference(grad_output, values), *args, *geometry)


def sparse_conv2d_grad_values(
    grad_output: Tensor,
    input: Tensor,
    topology: Topology,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of `sparse_conv2d` with respect to its values alone. Not differentiable.

    Args:
        grad_output: ∂L/∂y, [B, N, Y', X'], of ``input``'s dtype.
        input: x, [B, C, Y, X].
        topology, stride, padding, dilation: as in `sparse_conv2d`.
        dtype: of the values; ``input``'s by default.

    Returns:
        ∂L/∂values, [E], of ``dtype``. With NaN or an infinity in a channel of x or of ∂L/∂y, the
        gradients of all entries of that channel and of those in front of it may be NaN.

    Raises:
        TypeError, ValueError: as `sparse_conv2d`.
    """
    op = "sparse_conv2d_grad_values"
    geometry = _checked(op, topology, stride, padding, dilation)
    check_floating(op, "grad_output", grad_output)
    check_floating(op, "input", input)
    values = input.new_empty(0, dtype=dtype)
    check_floating(op, "dtype", values)
    _check_operand(op, "grad_output", grad_output, values, topology.rows, (4,))
    _check_operand(op, "input", input, values, topology.shape[1], (4,))
    _check_output(op, grad_output, geometry, input.shape[-2:])
    if grad_output.shape[0] != input.shape[0] or grad_output.dtype != input.dtype:
        raise ValueError(
            f"{op}: grad_output and input must agree in dtype and in the number of images, got "
            f"{tuple(grad_output.shape)} {grad_output.dtype} and {tuple(input.shape)} {input.dtype}"
        )
    args = (grad_output.detach(), input.detach(), values, topology.offsets, topology.columns)
    return run(op, uses_reference(input, values), *args, *geometry)


def _checked(op: str, topology: Topology, stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    check_topology(op, topology)
    if len(topology.shape) != 4 or min(topology.shape) == 0:
        raise ValueError(
            f"{op}: the topology must have shape [N, C, H, W], none of them 0, got "
            f"{tuple(topology.shape)}"
        )
    height, width = topology.shape[2:]
    return Geometry.of(op, (height, width), stride, padding, dilation)


def _pair(op: str, name: str, value: Pair, at_least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{op}: {name} must be one number or two, got {value!r}")
    vertical, horizontal = (check_whole(op, name, each, at_least=at_least) for each in pair)
    return vertical, horizontal


def _check_operand(
    op: str, name: str, operand: Tensor, values: Tensor, channels: int, dims: tuple[int, ...]
) -> None:
    """``operand`` is images with as many channels as the weight expects, beside its values."""
    if operand.dim() not in dims or operand.shape[-3] != channels:
        raise ValueError(
            f"{op}: {name} must be images of {channels} channels in "
            f"{' or '.join(map(str, dims))} dimensions, got shape {tuple(operand.shape)}"
        )
    check_beside_values(op, name, operand, values)


def _check_size(op: str, geometry: Geometry, size: Sequence[int]) -> None:
    """An input of ``size`` has pixels, and gives some."""
    if min(*size, *geometry.output_size(size)) < 1:
        raise ValueError(
            f"{op}: an input of size {tuple(size)} is too small for the kernel "
            f"{geometry.kernel_size} with padding {geometry.padding} and dilation "
            f"{geometry.dilation}"
        )


def _check_output(op: str, output: Tensor, geometry: Geometry, size: Sequence[int]) -> None:
    _check_size(op, geometry, size)
    if list(output.shape[-2:]) != geometry.output_size(size):
        raise ValueError(
            f"{op}: for an input of size {tuple(size)}, grad_output must have size "
            f"{tuple(geometry.output_size(size))}, got {tuple(output.shape[-2:])}"
        )


# ---- schemas, shapes, and the kernels of every device but the CPU

_GEOMETRY = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_SCHEMAS = {
    "sparse_conv2d": (
        f"(Tensor input, Tensor values, Tensor offsets, Tensor columns, Tensor? bias, {_GEOMETRY})"
    ),
    "sparse_conv2d_grad_input": (
        "(Tensor grad_output, Tensor values, Tensor offsets, Tensor rows, Tensor order, "
        f"SymInt[] input_size, {_GEOMETRY})"
    ),
    "sparse_conv2d_grad_values": (
        "(Tensor grad_output, Tensor input, Tensor values, Tensor offsets, Tensor columns, "
        f"{_GEOMETRY})"
    ),
}


def _output_shape(
    input: Tensor,
    values: Tensor,
    offsets: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    *geometry: Any,
) -> Tensor:
    size = Geometry(*geometry).output_size(input.shape[-2:])
    return input.new_empty((input.shape[0], offsets.numel() - 1, *size))


def _input_shape(
    grad_output: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    order: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    *others: Any,
) -> Tensor:
    channels = (offsets.numel() - 1) // math.prod(kernel_size)
    return grad_output.new_empty((grad_output.shape[0], channels, *input_size))


def _values_shape(
    grad_output: Tensor, input: Tensor, values: Tensor, offsets: Tensor, columns: Tensor, *_: Any
) -> Tensor:
    return values.new_empty(columns.numel())


_SHAPES: dict[str, Callable[..., Tensor]] = {
    "sparse_conv2d": _output_shape,
    "sparse_conv2d_grad_input": _input_shape,
    "sparse_conv2d_grad_values": _values_shape,
}

for _name, _schema in _SCHEMAS.items():
    define(_name, f"{_schema} -> Tensor", _SHAPES[_name], as_kernel(getattr(reference, _name)))

# ---- autograd


class SparseConv2d(torch.autograd.Function):
    """y = x ∗ θ + b for a sparse θ, and its gradients. `pp.sparse_conv2d` is the checked way in.

    ``SparseConv2d.of(input, values, topology, bias, geometry)``. Differentiable twice (through a
    dense θ); works in torch.compile(fullgraph=True) and under torch.func's transforms;
    forward-mode differentiation outside torch.func is refused with PyTorch's error.
    """

    @staticmethod
    def of(
        input: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """As `pp.sparse_conv2d` on [B, C, Y, X], arguments not checked."""
        offsets, columns = topology.offsets, topology.columns
        if torch._C._are_functorch_transforms_active():
            return run("sparse_conv2d", True, input, values, offsets, columns, bias, *geometry)
        needs_input = input.requires_grad and torch.is_grad_enabled()
        transposed = topology.transposed() if needs_input else (None, None, None)
        out: Tensor = SparseConv2d.apply(
            input, values, bias, geometry, offsets, columns, *transposed
        )
        return out

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
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
        ctx.geometry, ctx.size = geometry, tuple(input.shape[2:])
        ctx.dtype, ctx.bias_dtype = values.dtype, None if bias is None else bias.dtype
        args = (input, values, offsets, columns, bias, *geometry)
        return run("sparse_conv2d", uses_reference(input, values), *args)

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
            args = (grad_output, values, *transposed, ctx.size)
            grad_input = run("sparse_conv2d_grad_input", plain, *args, *ctx.geometry)
        if for_values:
            args = (grad_output, input, like, offsets, columns)
            grad_values = run("sparse_conv2d_grad_values", plain, *args, *ctx.geometry)
        if for_bias:
            grad_bias = sum_for_bias(grad_output, (0, 2, 3), ctx.bias_dtype)
        return grad_input, grad_values, grad_bias, *(None,) * 6
