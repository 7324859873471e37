"""The products of a sparse weight in pure PyTorch: the specification of every other implementation.

The weight θ [N, K] has ``values`` at the entries of a topology and 0 elsewhere
(`ppkernels.ops._entries`). Half types are multiplied and added up in float32.
"""

from __future__ import annotations

from torch import Tensor

from ppkernels.ops._entries import dense_of, rows_of, wide_dtype
from ppkernels.ops._layout import as_rows


def spmm(
    input: Tensor, values: Tensor, offsets: Tensor, columns: Tensor, bias: Tensor | None
) -> Tensor:
    """y = x·θᵀ + b: [..., K] → [..., N], of the input's dtype."""
    wide = wide_dtype(input, values)
    theta = dense_of(values.to(wide), offsets, columns, input.shape[-1])
    out = input.to(wide) @ theta.t()
    return (out if bias is None else out + bias.to(wide)).to(input.dtype)


def spmm_grad_input(
    grad_output: Tensor, values: Tensor, offsets: Tensor, rows: Tensor, order: Tensor
) -> Tensor:
    """∂L/∂x = g·θ: [..., N] → [..., K]; of θ its transpose is given, with taps of 1."""
    wide = wide_dtype(grad_output, values)
    in_order = values.to(wide)[order.long()]
    transposed = dense_of(in_order, offsets, rows, grad_output.shape[-1])  # [K, N]
    return (grad_output.to(wide) @ transposed.t()).to(grad_output.dtype)


def spmm_grad_values(
    grad_output: Tensor, input: Tensor, values: Tensor, offsets: Tensor, columns: Tensor
) -> Tensor:
    """∂L/∂values[e] = Σ_b g[b, n]·x[b, k] for the entry e in row n and column k: [E].

    ``values`` gives the dtype.
    """
    wide = wide_dtype(input, values)
    g, x = as_rows(grad_output).to(wide), as_rows(input).to(wide)  # [B, N], [B, K]
    grad = g.t() @ x  # [N, K]
    return grad[rows_of(offsets, columns.numel()), columns.long()].to(values.dtype)
