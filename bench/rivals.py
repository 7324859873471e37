"""Rivals of sparse layers that not every machine has, and why one cannot take part here.

torch's own CSR tensors need MKL; sparselab and sparseprop come from PyPI; dense products in
bfloat16 are worth a comparison where the processor multiplies them in tiles (AMX).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.machine import has_amx
from bench.models import Prepare

CSR, BFLOAT16, SPARSELAB, SPARSEPROP = "torch CSR", "dense bfloat16", "sparselab", "sparseprop"


@cache
def absent() -> dict[str, str]:
    """The rivals that cannot take part on this machine, each with a sentence that says why."""
    missing = {
        name: f"{name} takes no part: it is not installed (pip install {name})"
        for name in (SPARSELAB, SPARSEPROP)
        if find_spec(name) is None
    }
    if not torch.backends.mkl.is_available():
        missing[CSR] = f"{CSR} takes no part: this torch has no MKL, which does its products"
    if not has_amx():
        missing[BFLOAT16] = f"{BFLOAT16} takes no part: this processor has no AMX"
    return missing


# ---- torch's CSR tensors


class CsrLinear:
    """A linear layer by torch's CSR tensors, in the orientation and by the calls that measure best.

    That is θ·xᵀ with x already transposed and contiguous and the result left transposed, the bias
    within the call (addmm), and addmv for a single sample; README.md has the others' times. Indices
    are int32: MKL takes no others, and torch would convert int64 ones at every call. The gradients
    are written out, since torch's own backward of these products takes several times as long; θᵀ is
    made beforehand, as if θ never changed.
    """

    def __init__(self, plain: nn.Linear) -> None:
        weight = plain.weight.detach()
        self.theta, self.transposed = _csr(weight), _csr(weight.t())
        self.places = _csr(weight)
        self.places.values().zero_()
        self.bias = plain.bias.detach()

    def forward(self, columns: Tensor) -> Tensor:
        """y [N, B] from x [K, B]."""
        if columns.shape[1] == 1:
            return torch.addmv(self.bias, self.theta, columns[:, 0]).unsqueeze(1)
        return torch.addmm(self.bias.unsqueeze(1), self.theta, columns)

    def backward(self, grad_columns: Tensor, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x [K, B], of the kept values (a CSR tensor) and of the bias.

        Args:
            grad_columns: ∂L/∂y, [N, B].
            input: x, [B, K].
        """
        if len(input) == 1:
            grad_input = (self.transposed @ grad_columns[:, 0]).unsqueeze(1)
        else:
            grad_input = self.transposed @ grad_columns
        grad_values = torch.sparse.sampled_addmm(self.places, grad_columns, input, beta=0)
        return grad_input, grad_values, grad_columns.sum(1)


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = weight.to_sparse_csr()
        indices = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=False)


# ---- layers from PyPI


@contextmanager
def own_openmp() -> Iterator[None]:
    """Load a library that brings its own OpenMP runtime, which reads its settings as it is loaded.

    It gets torch's number of threads, and they sleep when a call is done: waiting in a loop, they
    would take the cores of the contender whose turn is next.
    """
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sparselab_linear(plain: nn.Module) -> nn.Module:
    """sparselab's layer with the places and values of a plain one, without room for more."""
    with own_openmp():
        import sparselab
    # Transposed weights are kept by id(), which a new weight may have of one that is gone.
    sparselab.ops._clear_transpose_cache()
    size = plain.in_features, plain.out_features
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        layer = sparselab.SparseLinear(*size, sparsity=0.99)
        # It makes layers at random places only.
        layer._csr = sparselab.PaddedCSR.from_dense(plain.weight.detach(), padding_ratio=0.0)
    layer._values = nn.Parameter(torch.from_numpy(layer._csr.values))
    layer.bias = nn.Parameter(plain.bias.detach().clone())
    return layer


def sparseprop_linear(plain: nn.Module) -> nn.Module:
    """sparseprop's layer with the places and values of a plain one."""
    with own_openmp():
        from sparseprop.modules.linear import SparseLinear
    return SparseLinear.from_dense(plain)


def sparseprop_conv(plain: nn.Module) -> nn.Module:
    """The same for a convolution, by the way of its two that is vectorised over the batch."""
    with own_openmp():
        from sparseprop.modules.conv2d import SparseConv2d
    return SparseConv2d.from_dense(plain)


LINEAR: dict[str, Prepare] = {SPARSELAB: sparselab_linear, SPARSEPROP: sparseprop_linear}
CONV: dict[str, Prepare] = {SPARSEPROP: sparseprop_conv}
