"""The rows of sparse layers: a linear one and a convolution, forward alone and with the backward.

All contenders have the same weight, 0 outside entries at random places, and a bias. The backward is
that of a layer inside a network: with the gradients of weight, bias and input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ppkernels as pp
from bench import models, rivals
from bench.contenders import seeded
from bench.models import Prepare
from bench.rivals import BFLOAT16, CSR, CsrLinear
from bench.row import CPU, Bar, Build, Call, Row

DENSE, CHANNELS_LAST = "dense", "dense, channels last"
FEATURES = 2048
KEPT = (0.2, 0.1, 0.05, 0.01)

Passes = Literal["forward", "forward+backward"]
FORWARD: Passes = "forward"
BOTH: Passes = "forward+backward"

OPS: dict[str, tuple[str, ...]] = {
    "spmm": ("spmm", "spmm_grad_input", "spmm_grad_values"),
    "sparse_conv": ("sparse_conv2d", "sparse_conv2d_grad_input", "sparse_conv2d_grad_values"),
}

# Times faster than dense, at each share that is kept.
LINEAR_BARS: dict[tuple[Passes, int], dict[float, float]] = {
    (FORWARD, 1): {0.2: 2.5, 0.1: 5, 0.05: 9, 0.01: 20},
    (FORWARD, 64): {0.2: 2, 0.1: 4, 0.05: 8, 0.01: 25},
    (FORWARD, 256): {},
    (BOTH, 64): {0.2: 1.7, 0.1: 3.3, 0.05: 6, 0.01: 15},
    (BOTH, 256): {0.2: 1.8, 0.1: 3.5, 0.05: 6.5, 0.01: 18},
}
CONV_BARS: dict[float, float] = {0.05: 2}
CSR_BAR = Bar("faster", 1.5, CSR)


@dataclass(frozen=True)
class SparseInputs:
    """What a layer takes, the gradient of its output, and the plain layer, with its zeros."""

    input: Tensor  # [B, K] or [B, C, Y, X]
    grad_output: Tensor  # of the output's shape
    plain: nn.Module


def random_mask(kept: float, shape: Sequence[int]) -> Tensor:
    """Bools of which the share ``kept`` is True, at random places: as near as a count can be."""
    count = round(kept * math.prod(shape))
    return pp.topk_mask([torch.rand(*shape)], count)[0].unpack()


def inputs_of(
    make_layer: Callable[[int], nn.Module], kept: float, shape: Callable[[int], tuple[int, ...]]
) -> Callable[[int, torch.device], SparseInputs]:
    """A plain layer of size N, most of its weight set to 0, and its ``shape`` of an input."""

    def make(size: int, device: torch.device) -> SparseInputs:
        with seeded(device), torch.no_grad():
            plain = make_layer(size)
            plain.weight.masked_fill_(~random_mask(kept, plain.weight.shape), 0)
            input = torch.randn(shape(size))
            return SparseInputs(input, torch.randn_like(plain(input)), plain)

    return make


# ---- the contenders


def sparse_linear(plain: nn.Module) -> nn.Module:
    """Ours, of what is not 0."""
    return pp.nn.SparseLinear.from_linear(plain)


def sparse_conv(plain: nn.Module) -> nn.Module:
    """Ours, of what is not 0."""
    return pp.nn.SparseConv2d.from_conv(plain)


def layer_call(layer: nn.Module, passes: Passes, input: Tensor, grad_output: Tensor) -> Call:
    """One forward without gradients, or one forward and backward, gradients fresh each time.

    The call returns the output, or ∂L/∂x.
    """
    input = input.detach().requires_grad_(passes == BOTH)
    leaves = [input, *layer.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(input)

    def forward_backward() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        layer(input).backward(grad_output)
        return input.grad

    return forward if passes == FORWARD else forward_backward


def csr_call(csr: CsrLinear, passes: Passes, input: Tensor, grad_output: Tensor) -> Call:
    """The same by torch's CSR tensors; x and ∂L/∂y are transposed beforehand."""
    columns, grad_columns = input.t().contiguous(), grad_output.t().contiguous()

    def forward() -> Tensor:
        return csr.forward(columns).t()

    def forward_backward() -> Tensor:
        csr.forward(columns)
        return csr.backward(grad_columns, input)[0].t()

    return forward if passes == FORWARD else forward_backward


def layer_pass(prepare: Prepare, passes: Passes, **to: Any) -> Build:
    """`layer_call` of a copy of the plain layer that ``prepare`` has prepared.

    ``to`` is what .to() of layer and tensors takes: a dtype, a memory format.
    """

    def build(x: SparseInputs) -> Call:
        layer, tensors = prepare(copy.deepcopy(x.plain)), (x.input, x.grad_output)
        if to:
            layer, tensors = layer.to(**to), tuple(tensor.to(**to) for tensor in tensors)
        return layer_call(layer, passes, *tensors)

    return build


def csr_pass(passes: Passes) -> Build:
    """`csr_call` of the plain layer."""
    return lambda x: csr_call(CsrLinear(x.plain), passes, x.input, x.grad_output)


def _others(layers: Mapping[str, Prepare], passes: Passes) -> dict[str, Build]:
    """The rivals that can take part here, of those that not every machine has."""
    builds = {name: layer_pass(prepare, passes) for name, prepare in layers.items()}
    builds[BFLOAT16] = layer_pass(models.dense, passes, dtype=torch.bfloat16)
    return {name: build for name, build in builds.items() if name not in rivals.absent()}


def _absent(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(sentence for name, sentence in rivals.absent().items() if name in names)


# ---- the rows


def linear_row(
    passes: Passes,
    batch: int,
    kept: float,
    out_features: int = FEATURES,
    in_features: int = FEATURES,
) -> Row:
    """A linear layer, θ [N, K]; a row of another size than N keeps the ratio of the two."""

    def columns(size: int) -> int:
        return size * in_features // out_features

    csr = {} if CSR in rivals.absent() else {CSR: csr_pass(passes)}
    others = _others(rivals.LINEAR, passes)
    limit = LINEAR_BARS.get((passes, batch), {}).get(kept)
    bars = (Bar("faster", limit, DENSE),) if limit else ()
    if csr and passes == FORWARD and batch > 1:
        bars += (CSR_BAR,)
    return Row(
        name=f"spmm/{passes}/{out_features}x{in_features}/kept={kept:g}/batch={batch}",
        suite="sparse",
        ops=OPS["spmm"],
        inputs=inputs_of(
            lambda size: nn.Linear(columns(size), size), kept, lambda size: (batch, columns(size))
        ),
        ours=layer_pass(sparse_linear, passes),
        rivals={DENSE: layer_pass(models.dense, passes), **csr, **others},
        other_work=(BFLOAT16,) if BFLOAT16 in others else (),
        size=out_features,
        quick_size=256,
        unit="outputs",
        flops=lambda size: _operations(passes, round(kept * size * columns(size)) * batch),
        bars=bars,
        rtol=1e-4,
        atol=1e-5,
        devices=CPU,
        absent=_absent([CSR, BFLOAT16, *rivals.LINEAR]),
    )


def conv_row(kept: float, channels: int = 256, side: int = 14, batch: int = 32) -> Row:
    """A 3x3 convolution that keeps the image's size."""
    others = _others(rivals.CONV, BOTH)
    limit = CONV_BARS.get(kept)
    where = f"3x3/{channels}-{channels}/{side}x{side}/batch={batch}"
    return Row(
        name=f"sparse_conv/{BOTH}/{where}/kept={kept:g}",
        suite="sparse",
        ops=OPS["sparse_conv"],
        inputs=inputs_of(
            lambda size: nn.Conv2d(size, size, 3, padding=1),
            kept,
            lambda size: (batch, size, side, side),
        ),
        ours=layer_pass(sparse_conv, BOTH),
        rivals={
            DENSE: layer_pass(models.dense, BOTH),
            CHANNELS_LAST: layer_pass(models.dense, BOTH, memory_format=torch.channels_last),
            **others,
        },
        other_work=(BFLOAT16,) if BFLOAT16 in others else (),
        size=channels,
        quick_size=32,
        unit="channels",
        flops=lambda size: _operations(BOTH, round(kept * 9 * size * size) * batch * side * side),
        bars=tuple(Bar("faster", limit, who) for who in (DENSE, CHANNELS_LAST) if limit),
        rtol=1e-4,
        atol=1e-5,
        devices=CPU,
        absent=_absent([BFLOAT16, *rivals.CONV]),
    )


def _operations(passes: Passes, products: int) -> int:
    """A multiplication and an addition each; the backward has two products like the forward's."""
    return products * (2 if passes == FORWARD else 6)


def sparse_rows() -> list[Row]:
    """Linear layers of 2048 features by passes, batch and share; then the convolution."""
    return [
        *(linear_row(passes, batch, kept) for passes, batch in LINEAR_BARS for kept in KEPT),
        *(conv_row(kept) for kept in KEPT),
    ]
