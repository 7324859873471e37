"""The sparse convolutions: plain and powered."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ppkernels import autograd
from ppkernels._powered import Stores, is_powered
from ppkernels.nn.conv import MaskedConv2d, PowerConv2d
from ppkernels.nn.sparse import PowerSparse, Sparse, without_weight
from ppkernels.nn.sparse_folded import FoldedSparse
from ppkernels.nn.sparse_kept import Kept, check_no_obstacle, obstacle, topology_of
from ppkernels.ops import Geometry, Topology, sparse_conv2d

Pair = int | tuple[int, int]


def _product(
    input: Tensor, theta: Tensor, topology: Topology, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    # Whatever is out of the ordinary takes the checked way: autocast, one image, errors.
    if (
        input.dtype is theta.dtype
        and input.dim() == 4
        and input.shape[1] == topology.shape[1]
        and geometry.gives_output(input.shape[2:])
        and theta.shape == topology.columns.shape
        and not torch._C._is_any_autocast_enabled()
    ):
        return autograd.SparseConv2d.of(input, theta, topology, bias, geometry)
    _, stride, padding, dilation = geometry
    return sparse_conv2d(input, theta, topology, bias, stride, padding, dilation)


def _described(geometry: Geometry, padding: str | None, has_bias: bool) -> str:
    """The part of a repr that says how the kernel moves; what is torch's default is left out."""
    kernel_size, stride, around, dilation = geometry
    parts = [f"kernel_size={kernel_size}, stride={stride}"]
    if padding is not None or around != (0, 0):
        parts.append(f"padding={padding or around}")
    if dilation != (1, 1):
        parts.append(f"dilation={dilation}")
    if not has_bias:
        parts.append("bias=False")
    return ", ".join(parts)


class FoldedSparseConv2d(FoldedSparse):
    """A sparse convolution for inference: y = x ∗ θ + b. `FoldedSparse` says what it holds.

    `pp.fold` makes it of a `SparseConv2d` or a `PowerSparseConv2d`.

    Args:
        topology: a `pp.Topology` of shape [N, C, H, W].
        weight: the kept values θ, [E].
        bias: b, [N], or None.
        stride, padding, dilation: as in `SparseConv2d`, as numbers.

    Raises:
        TypeError, ValueError: tensors or sizes that do not go together.

    Example::

        layer = pp.fold(pp.nn.SparseConv2d(64, 64, 3, padding=1, kept=0.1))
        with torch.no_grad():
            y = layer(torch.randn(8, 64, 14, 14))
    """

    def __init__(
        self,
        topology: Topology,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
    ) -> None:
        super().__init__()
        if len(topology.shape) != 4:
            raise ValueError(
                f"FoldedSparseConv2d: the topology must have shape [N, C, H, W], got "
                f"{tuple(topology.shape)}"
            )
        height, width = topology.shape[2:]
        args = ("FoldedSparseConv2d", (height, width), stride, padding, dilation)
        self._geometry = Geometry.of(*args)
        self.hold(topology, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        return _product(input, self.weight, self.topology, self.bias, self._geometry)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.shape[:2]
        sizes = _described(self._geometry, None, self.bias is not None)
        return f"{in_channels}, {out_channels}, {sizes}{self._described()}"


class SparseConv2d(Sparse):
    """`torch.nn.Conv2d` of a weight that is mostly 0: only what is kept is stored and multiplied.

    y = x ∗ θ + b, where θ [N, C, H, W] has ``weight`` [E] at the entries of ``topology`` and 0
    elsewhere; otherwise as `SparseLinear`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, bias, device, dtype: as in
            torch.nn.Conv2d. There are no groups, and what is around an image is 0.
        padding: as in torch.nn.Conv2d; ``"same"`` for kernels that take as much on both sides.
        kept: as in `SparseLinear`, of shape [N, C, H, W].

    Raises:
        TypeError, ValueError: ``kept`` of another kind or shape, sizes that are none.

    Example::

        layer = pp.nn.SparseConv2d(64, 64, 3, padding=1, kept=0.1)
        y = layer(torch.randn(8, 64, 14, 14))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    plain_class: type[nn.Module] = FoldedSparseConv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kept: Kept,
    ) -> None:
        super().__init__()
        self._set_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation)
        shape = (out_channels, in_channels, *self.kernel_size)
        topology = topology_of(type(self).__name__, kept, shape)
        self._begin(topology, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def _set_geometry(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: str | Pair,
        dilation: Pair,
    ) -> None:
        op, around = type(self).__name__, padding
        if isinstance(around, str):
            kernel = Geometry.of(op, kernel_size).kernel_size
            around = padding_around(op, around, kernel, stride, dilation)
        self._geometry = Geometry.of(op, kernel_size, stride, around, dilation)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, around, self.dilation = self._geometry
        self.padding = padding if isinstance(padding, str) else around

    def _product(self, input: Tensor, theta: Tensor) -> Tensor:
        return _product(input, theta, self._topology, self.bias, self._geometry)

    @classmethod
    def from_conv(cls, layer: nn.Module, kept: Kept | None = None) -> SparseConv2d:
        """The sparse layer of an nn.Conv2d, MaskedConv2d or PowerConv2d.

        As `SparseLinear.from_linear`; a powered layer gives a `PowerSparseConv2d`.

        Raises:
            TypeError: what the sparse convolution does not have: groups, padding with anything but
                zeros or with more on one side than on the other; otherwise as
                `SparseLinear.from_linear`.
        """
        check_no_obstacle("SparseConv2d.from_conv", layer, conv_obstacle(layer))
        dense = cast(nn.Conv2d, layer)
        sparse = without_weight(PowerSparseConv2d if is_powered(layer) else SparseConv2d)
        sparse._set_geometry(
            dense.in_channels,
            dense.out_channels,
            cast(Any, dense.kernel_size),
            cast(Any, dense.stride),
            cast(Any, dense.padding),
            cast(Any, dense.dilation),
        )
        topology = None
        if kept is not None:
            topology = topology_of("SparseConv2d.from_conv", kept, tuple(dense.weight.shape))
        sparse._take(dense, topology)
        return sparse

    def _dense_layer(self, **options: Any) -> nn.Module:
        dense_class = PowerConv2d if is_powered(self) else MaskedConv2d
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        return dense_class(self.in_channels, self.out_channels, *geometry, **options)

    def extra_repr(self) -> str:
        padding = self.padding if isinstance(self.padding, str) else None
        sizes = _described(self._geometry, padding, self.bias is not None)
        return f"{self.in_channels}, {self.out_channels}, {sizes}{self._described()}"


class PowerSparseConv2d(PowerSparse, SparseConv2d):
    """`SparseConv2d` whose kept values are powered: θ = φ·|φ|^(α−1).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, device, dtype,
            kept: as in `SparseConv2d`.
        alpha, stores: as in `PowerSparseLinear`.

    Raises:
        TypeError, ValueError: as `SparseConv2d` and `PowerLinear`.

    Example::

        layer = pp.nn.PowerSparseConv2d(64, 64, 3, padding=1, kept=0.1, alpha=2.0)
        y = layer(torch.randn(8, 64, 14, 14))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kept: Kept,
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
            bias,
            device,
            dtype,
            kept=kept,
        )
        self.give_alpha(alpha, stores)
        if stores == "phi":
            self.set_theta(self.weight)


_DENSE = (nn.Conv2d, MaskedConv2d, PowerConv2d)


def conv_obstacle(layer: nn.Module) -> str | None:
    """Why `SparseConv2d.from_conv` does not take ``layer``; None if it does."""
    if reason := obstacle(layer, _DENSE):
        return reason
    conv = cast(Any, layer)
    if conv.groups != 1:
        return f"it has {conv.groups} groups, and the sparse convolution has none"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}, not 'zeros'"
    if isinstance(conv.padding, str):
        sizes = Geometry.of("SparseConv2d", conv.kernel_size, conv.stride, 0, conv.dilation)
        return padding_obstacle(conv.padding, sizes)
    return None


def padding_around(
    op: str, padding: str, kernel_size: tuple[int, int], stride: Pair, dilation: Pair
) -> tuple[int, int]:
    """What ``"same"`` or ``"valid"`` is as numbers, as much on both sides."""
    if padding == "valid":
        return 0, 0
    geometry = Geometry.of(op, kernel_size, stride, 0, dilation)
    if reason := padding_obstacle(padding, geometry):
        raise ValueError(f"{op}: {reason}")
    height, width = _spans(geometry)
    return height // 2, width // 2


def padding_obstacle(padding: str, geometry: Geometry) -> str | None:
    """Why the sparse convolution does not have ``padding`` for these sizes; None if it does."""
    if padding == "valid":
        return None
    if padding != "same":
        return f"padding must be 'same', 'valid' or numbers, got {padding!r}"
    if geometry.stride != (1, 1):
        return f"padding='same' needs stride 1, got {geometry.stride}"
    if any(span % 2 for span in _spans(geometry)):
        return (
            "padding='same' would take more on one side than on the other for kernel_size "
            f"{geometry.kernel_size} and dilation {geometry.dilation}"
        )
    return None


def _spans(geometry: Geometry) -> tuple[int, int]:
    """By how many pixels the output is smaller than the image, down and across."""
    (height, width), (down, across) = geometry.kernel_size, geometry.dilation
    return down * (height - 1), across * (width - 1)
