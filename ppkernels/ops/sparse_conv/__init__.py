"""The convolution by a sparse weight: its three products."""

from ppkernels.ops.sparse_conv.op import (
    SparseConv2d,
    sparse_conv2d,
    sparse_conv2d_grad_input,
    sparse_conv2d_grad_values,
)

__all__ = [
    "SparseConv2d",
    "sparse_conv2d",
    "sparse_conv2d_grad_input",
    "sparse_conv2d_grad_values",
]
