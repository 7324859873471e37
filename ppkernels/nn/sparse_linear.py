"""The sparse linear layers: plain and powered."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ppkernels._powered import Stores, is_powered
from ppkernels.autograd import Spmm
from ppkernels.nn.linear import MaskedLinear, PowerLinear
from ppkernels.nn.sparse import PowerSparse, Sparse, without_weight
from ppkernels.nn.sparse_folded import FoldedSparse
from ppkernels.nn.sparse_kept import Kept, check_no_obstacle, obstacle, topology_of
from ppkernels.ops import Topology, spmm


def _product(input: Tensor, theta: Tensor, topology: Topology, bias: Tensor | None) -> Tensor:
    # Whatever is out of the ordinary takes the checked way: autocast, two dtypes, errors.
    if (
        input.dtype is theta.dtype
        and input.shape[-1:] == topology.shape[1:]
        and theta.shape == topology.columns.shape
        and not torch._C._is_any_autocast_enabled()
    ):
        return Spmm.of(input, theta, topology, bias)
    return spmm(input, theta, topology, bias)


class FoldedSparseLinear(FoldedSparse):
    """A sparse linear layer for inference: y = x·θᵀ + b. `FoldedSparse` says what it holds.

    `pp.fold` makes it of a `SparseLinear` or a `PowerSparseLinear`.

    Args:
        topology: a `pp.Topology` of shape [N, K].
        weight: the kept values θ, [E].
        bias: b, [N], or None.

    Raises:
        TypeError, ValueError: tensors that do not go together.

    Example::

        layer = pp.fold(pp.nn.SparseLinear(784, 300, kept=0.1)).to(torch.bfloat16)
        with torch.no_grad():
            y = layer(torch.randn(1, 784, dtype=torch.bfloat16))
    """

    def __init__(self, topology: Topology, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(topology.shape) != 2:
            raise ValueError(
                f"FoldedSparseLinear: the topology must have shape [N, K], got "
                f"{tuple(topology.shape)}"
            )
        self.hold(topology, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        return _product(input, self.weight, self.topology, self.bias)

    def extra_repr(self) -> str:
        rows, in_features = self.shape
        return (
            f"in_features={in_features}, out_features={rows}, "
            f"bias={self.bias is not None}{self._described()}"
        )


class SparseLinear(Sparse):
    """`torch.nn.Linear` of a weight that is mostly 0: only what is kept is stored and multiplied.

    y = x·θᵀ + b, where θ [N, K] has ``weight`` [E] at the entries of ``topology`` and 0 elsewhere.
    Forward and backward do work in proportion to E, and weight, gradient and optimizer state have
    E numbers each. Outputs and gradients are the dense layer's, up to the rounding of sums.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        kept: which entries: a share in (0, 1], for ⌊kept·N·K⌋ of them at random (drawn by torch's
            generator of the CPU); or a `pp.Topology` or a `pp.BitMask` of shape [N, K].

    The kernels have float32 and bfloat16, on CPUs; other dtypes and devices take the reference,
    which is dense and slow. θ starts as nn.Linear's weight does at these entries, but is never 0.
    `Sparse` says what the attributes, the masks and the checkpoints are. It is trained by
    PowerSGD and PowerAdamW, as a plain layer, and by others that treat each weight by itself, as
    torch's SGD and AdamW do.

    Raises:
        TypeError, ValueError: ``kept`` of another kind or shape.

    Example::

        layer = pp.nn.SparseLinear(784, 300, kept=0.1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        layer(torch.randn(32, 784)).square().mean().backward()
        optimizer.step()
    """

    in_features: int
    out_features: int
    plain_class: type[nn.Module] = FoldedSparseLinear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kept: Kept,
    ) -> None:
        super().__init__()
        topology = topology_of(type(self).__name__, kept, (out_features, in_features))
        self.in_features, self.out_features = in_features, out_features
        self._begin(topology, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def _product(self, input: Tensor, theta: Tensor) -> Tensor:
        return _product(input, theta, self._topology, self.bias)

    @classmethod
    def from_linear(cls, layer: nn.Module, kept: Kept | None = None) -> SparseLinear:
        """The sparse layer of an nn.Linear, MaskedLinear or PowerLinear.

        Kept is where θ is not 0, and where an ``update_mask`` that is set trains it. Entries that
        are kept and not trained get an ``update_mask`` of the sparse layer, and those that are
        kept and hidden by ``mask`` get a ``mask``. What is hidden and not kept is lost.

        Args:
            layer: it stays as it is; the sparse layer has the same Parameter as its bias, and one
                of its own, with the same ``requires_grad``, for its weight.
            kept: keep these entries instead, whatever they are, as the constructor's; all others
                are lost.

        Returns:
            A `PowerSparseLinear` with the exponent and ``stores`` of a powered layer, else a
            `SparseLinear`; in ``layer``'s mode, training or not.

        Raises:
            TypeError: a layer of another class (a subclass too), dtype or device, or one whose
                weight torch.nn.utils has parametrized or pruned.
            TypeError, ValueError: ``kept`` of another kind or shape.

        Example::

            dense = pp.nn.PowerLinear(784, 300, alpha=2.0)
            dense.update_mask = pp.BitMask.pack(dense.weight.abs() > 0.03)
            dense.set_theta(pp.apply_mask(dense.weight, dense.update_mask.words))
            sparse = pp.nn.SparseLinear.from_linear(dense)
        """
        check_no_obstacle("SparseLinear.from_linear", layer, linear_obstacle(layer))
        dense = cast(nn.Linear, layer)
        sparse = without_weight(PowerSparseLinear if is_powered(layer) else SparseLinear)
        sparse.in_features, sparse.out_features = dense.in_features, dense.out_features
        topology = None
        if kept is not None:
            topology = topology_of("SparseLinear.from_linear", kept, tuple(dense.weight.shape))
        sparse._take(dense, topology)
        return sparse

    def _dense_layer(self, **options: Any) -> nn.Module:
        dense_class = PowerLinear if is_powered(self) else MaskedLinear
        return dense_class(self.in_features, self.out_features, **options)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{self._described()}"
        )


class PowerSparseLinear(PowerSparse, SparseLinear):
    """`SparseLinear` whose kept values are powered: θ = φ·|φ|^(α−1).

    Args:
        in_features, out_features, bias, device, dtype, kept: as in `SparseLinear`.
        alpha, stores: as in `PowerLinear`.

    Trained as `PowerLinear` is: with ``stores="theta"`` by the optimizers of `pp.optim`, which take
    the powered step in one pass over the kept values; with ``stores="phi"`` by those that
    `SparseLinear` says.

    Raises:
        TypeError, ValueError: as `SparseLinear` and `PowerLinear`.

    Source: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", 2021.

    Example::

        layer = pp.nn.PowerSparseLinear(784, 300, kept=0.1, alpha=2.0)
        optimizer = pp.optim.PowerSGD(layer.parameters(), lr=0.1, momentum=0.9)
        layer(torch.randn(32, 784)).square().mean().backward()
        optimizer.step()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kept: Kept,
        alpha: float | Tensor,
        stores: Stores = "theta",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, kept=kept)
        self.give_alpha(alpha, stores)
        if stores == "phi":
            self.set_theta(self.weight)


_DENSE = (nn.Linear, MaskedLinear, PowerLinear)


def linear_obstacle(layer: nn.Module) -> str | None:
    """Why `SparseLinear.from_linear` does not take ``layer``; None if it does."""
    return obstacle(layer, _DENSE)
