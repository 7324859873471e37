"""The convolution by a sparse weight: its three products."""

from ppkernels.ops.sparse_conv.op import (
    Geometry,
    SparseConv2d,
    sparse_conv2d,
    sparse_conv2d_grad_input,
    sparse_conv2d_grad_values,
)

__all__ = [
    "Geometry",
    "SparseConv2d",
    "sparse_conv2d",
    "sparse_conv2d_grad_input",
    "sparse_conv2d_grad_values",
]
