"""The linear layers: with masks, and powered."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppkernels._powered import Stores
from ppkernels.autograd import Power
from ppkernels.nn.masks import Masked
from ppkernels.nn.powered import Powered
from ppkernels.ops import power_linear


class MaskedLinear(Masked, nn.Linear):
    """`torch.nn.Linear` with an ``update_mask`` and a ``mask``: y = x·θᵀ + b.

    θ is ``weight``, but 0 where ``mask`` hides it. Arguments, shapes and semantics are
    torch.nn.Linear's; `Masked` says what the masks and the checkpoints are. Without ``mask`` the
    forward is nn.Linear's own.
    """

    plain_class: type[nn.Module] = nn.Linear

    # Here too, because inspect and editors would show the arguments of Masked.__new__.
    __init__ = nn.Linear.__init__

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight
        if self._mask is not None:
            theta = self._hide(theta)
        return F.linear(input, theta, self.bias)


class PowerLinear(Powered, nn.Linear):
    """`torch.nn.Linear` whose weight is θ = φ·|φ|^(α−1): y = x·θᵀ + b.

    With ``stores="theta"`` (the default) ``weight`` is θ, forward and backward are nn.Linear's own,
    and an optimizer of `pp.optim` takes the powered step; other optimizers are refused. With
    ``stores="phi"`` ``weight`` is φ, θ is computed in each forward (on a GPU by `pp.power_linear`,
    which does not keep it for the backward), and any optimizer will do. The bias is never powered.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        alpha: α ≥ 1, a float or a 0-dim float64 tensor whose value is copied; it must be named.
        stores: ``"theta"`` or ``"phi"``.

    θ starts as nn.Linear's weight does, whatever α. `Powered` says what the attributes and the
    checkpoints are.

    Raises:
        TypeError, ValueError: α below 1 or not a finite number, another word in ``stores``.

    Source: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", 2021.
    """

    plain_class: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Tensor,
        stores: Stores = "theta",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.give_alpha(alpha, stores)
        if stores == "phi":
            self.set_theta(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        # `theta` spelled out: a property, and a buffer looked up as an attribute, are dear here.
        theta = self.weight
        if self.stores == "phi":
            alpha: Any = self._buffers["alpha"]
            words = None if self._mask is None else self._words(theta)
            if theta.is_cuda and not input.is_nested:
                return power_linear(input, theta, alpha, self.bias, words=words)
            # The backward pass wants θ too, and another power costs more than the memory.
            theta = Power.apply(theta, alpha, words)
        elif self._mask is not None:
            theta = self._hide(theta)
        return F.linear(input, theta, self.bias)
