"""The convolutions: with masks, and powered."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppkernels._powered import Stores
from ppkernels.autograd import Power
from ppkernels.nn.masks import Masked
from ppkernels.nn.powered import Powered


class _MaskedConv(Masked):
    """What the three convolutions with masks share: the forward."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight
        if self._mask is not None:
            theta = self._hide(theta)
        return self._conv_forward(input, theta, self.bias)  # type: ignore[operator,no-any-return]


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with an ``update_mask`` and a ``mask``, as in `MaskedLinear`."""

    plain_class: type[nn.Module] = nn.Conv1d
    __init__ = nn.Conv1d.__init__


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with an ``update_mask`` and a ``mask``, as in `MaskedLinear`."""

    plain_class: type[nn.Module] = nn.Conv2d
    __init__ = nn.Conv2d.__init__


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with an ``update_mask`` and a ``mask``, as in `MaskedLinear`."""

    plain_class: type[nn.Module] = nn.Conv3d
    __init__ = nn.Conv3d.__init__


class _PowerConv(Powered):
    """What the three convolutions share: torch's constructor with the exponent, and the forward."""

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Tensor,
        stores: Stores = "theta",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.give_alpha(alpha, stores)
        if stores == "phi":
            self.set_theta(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight
        if self.stores == "phi":
            theta = Power.apply(theta, self.alpha, self._words(theta))
        elif self._mask is not None:
            theta = self._hide(theta)
        return self._conv_forward(input, theta, self.bias)  # type: ignore[operator,no-any-return]


class PowerConv1d(_PowerConv, nn.Conv1d):
    """`torch.nn.Conv1d` whose weight is θ = φ·|φ|^(α−1).

    Arguments, shapes and semantics are torch.nn.Conv1d's, with ``alpha`` and ``stores`` as in
    `PowerLinear`.
    """

    plain_class: type[nn.Module] = nn.Conv1d


class PowerConv2d(_PowerConv, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight is θ = φ·|φ|^(α−1).

    Arguments, shapes and semantics are torch.nn.Conv2d's, with ``alpha`` and ``stores`` as in
    `PowerLinear`.
    """

    plain_class: type[nn.Module] = nn.Conv2d


class PowerConv3d(_PowerConv, nn.Conv3d):
    """`torch.nn.Conv3d` whose weight is θ = φ·|φ|^(α−1).

    Arguments, shapes and semantics are torch.nn.Conv3d's, with ``alpha`` and ``stores`` as in
    `PowerLinear`.
    """

    plain_class: type[nn.Module] = nn.Conv3d
