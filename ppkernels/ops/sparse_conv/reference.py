"""The convolution by a sparse weight in pure PyTorch: the specification of all implementations.

The weight θ [N, C, H, W] is the matrix [N, K] of its rows, K = C·H·W, with ``values`` at the
entries of a topology and 0 elsewhere (`ppkernels.ops._entries`). ``kernel_size`` is (H, W). Half
types are multiplied and added up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ppkernels.ops._entries import dense_of, places_of, wide_dtype


def sparse_conv2d(
    input: Tensor,
    values: Tensor,
    offsets: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """y = x ∗ θ + b: [B, C, Y, X] → [B, N, Y', X'], of the input's dtype."""
    wide = wide_dtype(input, values)
    in_features = input.shape[1] * math.prod(kernel_size)
    theta = dense_of(values.to(wide), offsets, columns, in_features)
    weight = theta.view(-1, input.shape[1], *kernel_size)
    wide_bias = None if bias is None else bias.to(wide)
    return F.conv2d(
        input.to(wide), weight, wide_bias, list(stride), list(padding), list(dilation)
    ).to(input.dtype)


def sparse_conv2d_grad_input(
    grad_output: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    order: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """∂L/∂x: [B, N, Y', X'] → [B, C, Y, X] with (Y, X) = ``input_size``.

    Of θ its transpose is given, of as many taps as ``kernel_size`` has.
    """
    wide = wide_dtype(grad_output, values)
    taps, channels = math.prod(kernel_size), grad_output.shape[1]
    in_order = values.to(wide)[order.long()]
    outer = torch.div(rows.long(), taps, rounding_mode="floor")
    transposed = dense_of(in_order, offsets, outer, channels)  # [K, N]
    weight = transposed.t().reshape(channels, -1, *kernel_size)
    size = (grad_output.shape[0], weight.shape[1], *input_size)
    grad: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
        size,
        weight,
        grad_output.to(wide),
        stride=list(stride),
        padding=list(padding),
        dilation=list(dilation),
    )
    return grad.to(grad_output.dtype)


def sparse_conv2d_grad_values(
    grad_output: Tensor,
    input: Tensor,
    values: Tensor,
    offsets: Tensor,
    columns: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """∂L/∂values [E]: what the dense ∂L/∂θ has at the entries. ``values`` gives the dtype."""
    wide = wide_dtype(input, values)
    size = (grad_output.shape[1], input.shape[1], *kernel_size)
    grad: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        input.to(wide),
        size,
        grad_output.to(wide),
        stride=list(stride),
        padding=list(padding),
        dilation=list(dilation),
    )
    places = places_of(offsets, columns, math.prod(size[1:]))
    return grad.reshape(-1)[places].to(values.dtype)
