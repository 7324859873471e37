"""The rows of `pp.statistics`: one pass over θ against a pass for each question in plain torch.

Every contender returns one vector: least, largest and mean θ, mean |θ| and θ², the share of |θ|
below each ε, and the share of θ in each bin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import ppkernels as pp
from bench.contenders import IN_MEMORY, QUICK, compiled, seeded
from bench.masks import BIT
from bench.row import Build, Row, dtype_name
from bench.training import TRAINED_SHARE

EPSILONS = (1e-3, 1e-2, 1e-1)
RANGE = (-0.5, 0.5)

LAYERS, LAYER_SIZE = 200, 64
"""Many small weights, where a call's overhead is all."""


@dataclass(frozen=True)
class WeightInputs:
    """N weights in all, and a mask of those of the first tensor."""

    weights: list[Tensor]
    mask: Tensor  # bool
    within: pp.BitMask


def weight_inputs(dtype: torch.dtype, layers: int) -> Callable[[int, torch.device], WeightInputs]:
    """Weights of a usual scale, in ``layers`` tensors; nine bits in ten are 0."""

    def make(size: int, device: torch.device) -> WeightInputs:
        with seeded(device):
            weights = [torch.randn(size // layers).mul_(0.1).to(dtype) for _ in range(layers)]
            mask = torch.rand(weights[0].shape) < TRAINED_SHARE
        return WeightInputs(weights, mask, pp.BitMask(pp.reference.pack_bits(mask), mask.shape))

    return make


def as_vector(found: pp.Statistics) -> Tensor:
    """What every contender returns."""
    shares = [count / found.count for count in (*found.counts_below, *found.histogram)]
    means = [found.mean, found.mean_abs, found.mean_square]
    return torch.tensor([found.min, found.max, *means, *shares], dtype=torch.float64)


def plain(weight: Tensor, alpha: float, bins: int) -> Tensor:
    """The same in plain torch, a pass for each number."""
    theta = weight if alpha == 1 else weight * weight.abs().pow(alpha - 1)
    size = theta.abs()
    numbers = [theta.min(), theta.max()]
    numbers += [each.mean(dtype=torch.float64) for each in (theta, size, theta * theta)]
    numbers += [size.lt(epsilon).sum() / theta.numel() for epsilon in EPSILONS]
    vector = torch.stack([number.double() for number in numbers])
    if bins == 0:
        return vector
    histogram = torch.histc(theta, bins, *RANGE).double() / theta.numel()
    return torch.cat([vector, histogram])


def distribution_rows() -> list[Row]:
    """θ stored or powered, with a histogram, under a mask, in bfloat16; and many small weights."""
    return [
        _row(1.0),
        _row(1.5),
        _row(1.0, dtype=torch.bfloat16),
        _row(1.0, bins=100),
        _row(1.0, masked=True),
        _row(1.0, layers=LAYERS),
    ]


def _row(
    alpha: float,
    *,
    dtype: torch.dtype = torch.float32,
    bins: int = 0,
    masked: bool = False,
    layers: int = 1,
) -> Row:
    def ours(inputs: WeightInputs) -> Callable[[], Tensor]:
        within = [inputs.within] if masked else None

        def call() -> Tensor:
            found = pp.statistics(
                inputs.weights, EPSILONS, alpha, bins=bins, range=RANGE, within=within
            )
            return torch.stack([as_vector(each) for each in found])

        return call

    def eager(inputs: WeightInputs) -> Callable[[], Tensor]:
        def looked_at(weight: Tensor) -> Tensor:
            return weight[inputs.mask] if masked else weight

        return lambda: torch.stack(
            [plain(looked_at(weight), alpha, bins).cpu() for weight in inputs.weights]
        )

    is_small = layers > 1
    size = layers * LAYER_SIZE if is_small else IN_MEMORY
    rivals: Mapping[str, Build] = {
        "torch.sum": lambda x: lambda: torch.stack([weight.sum() for weight in x.weights]),
        "eager": eager,
    }
    if not (is_small or masked or bins):
        # histc and selection by a mask leave torch.compile's one kernel.
        rivals = {**rivals, "compiled": _compiled(alpha)}
    parts = [f"alpha={alpha:g}", f"bins={bins}" if bins else "", "masked" if masked else ""]
    place = "small" if is_small else "memory"
    return Row(
        name="/".join(["statistics", place, dtype_name(dtype), *filter(None, parts)]),
        suite="select",
        ops=("statistics",),
        inputs=weight_inputs(dtype, layers),
        ours=ours,
        rivals=rivals,
        size=size,
        quick_size=size if is_small else QUICK,
        dtype=dtype,
        streams=("read weight", "read words") if masked else ("read weight",),
        bytes_an_element=dtype.itemsize + (BIT if masked else 0),
        roof="torch.sum",
        in_cache=is_small,
        # Means in float32 or bfloat16 powers, and edges of bins in float32.
        rtol=2e-2 if dtype.itemsize == 2 else 2e-5,
        atol=1e-4,
    )


def _compiled(alpha: float) -> Build:
    def formula(weights: list[Tensor]) -> Tensor:
        return torch.stack([plain(weight, alpha, 0) for weight in weights])

    return compiled(formula, "weights")
