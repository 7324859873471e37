"""The rows of the optimizers' steps alone, gradients given and fixed.

A call takes one more step from where the last one ended, and returns the weight itself: what is
compared is the weight after the first step, from equal starts. Rivals that take another step, the
plain one or none, are not compared.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

from bench import models
from bench.contenders import IN_MEMORY, QUICK, seeded
from bench.row import CPU, GPU, Bar, Build, Call, Row
from bench.training import ADAMW, OPS, OPTIMIZERS, SGD, TRAINED_SHARE, MakeOptimizer

ONE_TENSOR = 16 * 2**20

FUSED, FOREACH, TRAFFIC, COMPILED = "fused", "foreach", "traffic", "compiled"

STREAMS = {
    "sgd": ("theta", "momentum"),
    "adamw": ("theta", "average", "average of squares"),
}
"""What a step reads and writes; it reads the gradient besides. Bits of masks are not counted."""

FOREACH_OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": partial(torch.optim.SGD, foreach=True, **SGD),
    "adamw": partial(torch.optim.AdamW, foreach=True, **ADAMW),
}
"""torch's optimizers with the same options, a kernel for each part of the formula."""


@dataclass(frozen=True)
class UpdateInputs:
    """A plain model, the gradients of its parameters, and which weights may change."""

    plain: nn.Module
    grads: tuple[Tensor, ...]
    update_masks: Mapping[str, Tensor]  # bool, True where trained; by layer; empty: all are

    def copy_of_model(self) -> nn.Module:
        """A model to step, with the gradients that all contenders share and none writes to."""
        model = copy.deepcopy(self.plain)
        for parameter, grad in zip(model.parameters(), self.grads, strict=True):
            parameter.grad = grad
        return model


def one_weight(
    is_masked: bool, dtype: torch.dtype = torch.float32
) -> Callable[[int, torch.device], UpdateInputs]:
    """A linear layer of N weights, N a square number; under a mask, 90 % of them are frozen."""

    def make(size: int, device: torch.device) -> UpdateInputs:
        side = math.isqrt(size)
        with torch.device("meta"):
            layer = nn.Linear(side, side, bias=False)
        with seeded(device):
            layer.weight = nn.Parameter((torch.randn(side, side) * 0.03).to(dtype))
            grad = (torch.randn(side, side) * 1e-3).to(dtype)
            is_trained = torch.rand(side, side) < TRAINED_SHARE
        return UpdateInputs(layer, (grad,), {"": is_trained} if is_masked else {})

    return make


def resnet(layers: int, device: torch.device) -> UpdateInputs:
    """The tensors of a ResNet, most of them small: 161 for 50 layers."""
    with seeded(device):
        model = getattr(torchvision.models, f"resnet{layers}")()
        grads = tuple(torch.randn_like(parameter) * 1e-3 for parameter in model.parameters())
    return UpdateInputs(model, grads, {})


def update(
    make_optimizer: MakeOptimizer, alpha: float | None = None, weight: str = "weight"
) -> Build:
    """An optimizer's step: powered with ``alpha``, plain without; the call returns ``weight``."""

    def build(inputs: UpdateInputs) -> Call:
        model = inputs.copy_of_model()
        if alpha is not None:
            models.powered(alpha, "theta", inputs.update_masks)(model)
        optimizer = make_optimizer(model.parameters())

        def call() -> Tensor:
            optimizer.step()
            # Asked anew, so that the call keeps the model: a layer that is gone has no exponent.
            return model.get_parameter(weight)

        return call

    return build


# ---- the same steps as formulas, which write into their arguments

Formula = Callable[[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None], None]
"""Of θ, its gradient, the optimizer's averages, Adam's two corrections of them, and the mask.

Behind the averages may stand a float32 copy of θ, which is then what is stepped.
"""


def sums(
    theta: Tensor,
    grad: Tensor,
    averages: tuple[Tensor, ...],
    corrections: tuple[Tensor, ...],
    is_trained: Tensor | None,
) -> None:
    """The streams of a step, with one addition for each tensor written."""
    term = grad
    for tensor in (*averages, theta):
        term = tensor.add_(term)


def by_hand(optimizer: str, alpha: float, rule: str = "virtual") -> Formula:
    """The powered step on θ alone: φ = sign(θ)|θ|^(1/α), moved, and back."""

    def step(
        weight: Tensor,
        grad: Tensor,
        averages: tuple[Tensor, ...],
        corrections: tuple[Tensor, ...],
        is_trained: Tensor | None,
    ) -> None:
        theta = averages[-1] if len(averages) == len(STREAMS[optimizer]) else weight
        grad = grad.to(theta.dtype)
        phi = theta.sign() * theta.abs().pow(1 / alpha)
        slope = alpha * phi.abs().pow(alpha - 1)
        if optimizer == "sgd":
            lr = SGD["lr"]
            momentum = SGD["momentum"] * averages[0] + (grad * slope if rule == "chain" else grad)
            new, direction = (momentum,), momentum
        else:
            lr = ADAMW["lr"]
            averaged = grad * slope if rule == "chain" else grad
            average = averages[0].lerp(averaged, 0.1)
            squares = averages[1].lerp(averaged * averaged, 0.001)
            new = (average, squares)
            direction = average / corrections[0] / ((squares / corrections[1]).sqrt() + 1e-8)
        phi = phi - lr * (direction if rule == "chain" else slope * direction)
        new = (phi * phi.abs().pow(alpha - 1), *new)
        for tensor, value in zip((theta, *averages), new, strict=False):
            tensor.copy_(value if is_trained is None else torch.where(is_trained, value, tensor))
        if theta is not weight:
            weight.copy_(theta)

    return step


def written_out(optimizer: str, formula: Formula, has_master: bool = False) -> Build:
    """The formula on a model's only weight, as one kernel by torch.compile."""

    def build(inputs: UpdateInputs) -> Call:
        (grad,), is_trained = inputs.grads, inputs.update_masks.get("")
        theta = next(inputs.copy_of_model().parameters()).detach()
        wide = torch.float32 if has_master else theta.dtype
        averages = tuple(torch.zeros_like(theta, dtype=wide) for _ in STREAMS[optimizer][1:])
        if has_master:
            averages += (theta.to(wide),)
        step = torch.compile(formula, dynamic=False)
        steps = itertools.count(1)

        def call() -> Tensor:
            count = next(steps)
            # Tensors: with numbers, every step would be compiled anew. On the CPU, where a compiled
            # step takes them for numbers: a GPU would be waited for to get them.
            corrections = tuple(torch.tensor(1 - beta**count) for beta in (0.9, 0.999))
            step(theta, grad, averages, corrections, is_trained)
            return theta

        return call

    return build


# ---- the rows


def _row(
    optimizer: str,
    alpha: float,
    *,
    rule: str = "virtual",
    is_masked: bool = False,
    has_master: bool = False,
    bars: tuple[Bar, ...] = (),
    devices: tuple[str, ...] = CPU + GPU,
) -> Row:
    """A row; with ``has_master`` the weight is bfloat16, and its copy and averages are float32."""
    powered = partial(OPTIMIZERS[optimizer].powered, rule=rule, master_weights=has_master)
    dtype = torch.bfloat16 if has_master else torch.float32
    streams = (*STREAMS[optimizer], *(["master"] if has_master else []))
    parts = (optimizer, *(["rule=chain"] if rule == "chain" else []), f"alpha={alpha:g}")
    more = (*(["masks"] if is_masked else []), *(["bfloat16+master"] if has_master else []))
    return Row(
        name="/".join(("step", *parts, *more)),
        suite="step",
        ops=OPS,
        inputs=one_weight(is_masked, dtype),
        ours=update(powered, alpha),
        rivals={
            TRAFFIC: written_out(optimizer, sums, has_master),
            FUSED: update(OPTIMIZERS[optimizer].stock),
            COMPILED: written_out(optimizer, by_hand(optimizer, alpha, rule), has_master),
        },
        gpu_rivals={FOREACH: update(FOREACH_OPTIMIZERS[optimizer])},
        # At α = 1 the powered step is the plain one.
        other_work=() if alpha == 1 else (FUSED, FOREACH),
        size=ONE_TENSOR,
        gpu_size=IN_MEMORY,
        quick_size=QUICK,
        dtype=dtype,
        streams=(
            *(f"read {name}" for name in streams),
            "read grad",
            *(f"write {name}" for name in streams),
        ),
        # The weight and its gradient are of two bytes, all else of four.
        bytes_an_element=4 * (2 * len(streams) + 1) - 6 if has_master else None,
        roof=TRAFFIC,
        bars=bars,
        # A last bit in float32 may be another number in bfloat16.
        rtol=1e-2 if has_master else 2e-5,
        # A weight that the step takes close to 0 is as exact as it was before the step.
        atol=1e-9,
        devices=devices,
    )


def _resnet_row(optimizer: str, alpha: float, devices: tuple[str, ...] = CPU + GPU) -> Row:
    return Row(
        name=f"step/resnet-50/{optimizer}/alpha={alpha:g}",
        suite="step",
        ops=OPS,
        inputs=resnet,
        ours=update(OPTIMIZERS[optimizer].powered, alpha, "fc.weight"),
        rivals={
            FUSED: update(OPTIMIZERS[optimizer].stock, weight="fc.weight"),
            FOREACH: update(FOREACH_OPTIMIZERS[optimizer], weight="fc.weight"),
        },
        other_work=() if alpha == 1 else (FUSED, FOREACH),
        size=50,
        quick_size=18,
        unit="layers",
        devices=devices,
    )


def update_rows() -> list[Row]:
    """One weight of 16 Mi, on a GPU 64 Mi, and a ResNet-50's list of 161 tensors."""
    bars = (Bar("times", 1.25, TRAFFIC), Bar("times", 1.15, FUSED))
    return [
        _row("sgd", 1.5, bars=bars),
        _row("sgd", 1.25),
        _row("sgd", 2.0),
        _row("sgd", 1.0),
        _row("sgd", 1.5, rule="chain"),
        _row("sgd", 1.5, is_masked=True),
        _row("sgd", 1.25, is_masked=True),
        _row("sgd", 2.0, is_masked=True),
        _row("sgd", 1.5, rule="chain", is_masked=True),
        _row("adamw", 1.5),
        _row("adamw", 1.5, is_masked=True),
        _row("adamw", 1.5, rule="chain", devices=GPU),
        _row("sgd", 1.5, has_master=True, devices=GPU),
        _row("adamw", 1.5, has_master=True, devices=GPU),
        _row("adamw", 1.5, has_master=True, is_masked=True, devices=GPU),
        _resnet_row("sgd", 1.5),
        _resnet_row("sgd", 1.0),
        _resnet_row("adamw", 1.5, devices=GPU),
    ]
