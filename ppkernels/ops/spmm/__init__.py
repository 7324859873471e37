"""The linear layer of a sparse weight: its three products."""

from ppkernels.ops.spmm.op import Spmm, spmm, spmm_grad_input, spmm_grad_values

__all__ = ["Spmm", "spmm", "spmm_grad_input", "spmm_grad_values"]
