"""The rows of whole training steps: a network, a batch, an optimizer, an exponent.

Every contender starts from the same θ, so the losses of their first steps are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppkernels as pp
from bench import models
from bench.contenders import seeded
from bench.models import CLASSES, Network, Prepare
from bench.row import CPU, GPU, Bar, Build, Call, MemoryBar, Row

DENSE, PHI, EAGER, COMPILED = "dense", "stores=phi", "eager", "compiled"
MASKED, UNPOWERED = "masked", "not powered"

OPS = ("power", "power_backward", "inverse_power", "sgd_step_", "adam_step_")
"""What the steps run on, with θ stored or φ."""

SPARSE_OPS = (*OPS, "spmm", "spmm_grad_input", "spmm_grad_values")

TRAINED_SHARE = 0.1
"""Of the weights under an update mask; the others are frozen at 0."""

WORKSPACE_BYTES = 64 * 2**10
"""What a powered step may allocate in passing, whatever the size of the model."""

MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""Takes a model's parameters; the powered ones take options of theirs too."""


@dataclass(frozen=True)
class Optimizers:
    """torch's fused optimizer, and the powered one with the same options."""

    stock: MakeOptimizer
    powered: MakeOptimizer


# Adam moves every weight by about lr a step, on the same batch again and again: with a larger one,
# gradients would reach 0 within the run, and their averages decay into subnormal numbers.
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
ADAMW: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}

OPTIMIZERS = {
    "sgd": Optimizers(
        stock=lambda parameters: torch.optim.SGD(parameters, fused=True, **SGD),
        powered=lambda parameters, **more: pp.optim.PowerSGD(parameters, **SGD, **more),
    ),
    "adamw": Optimizers(
        stock=lambda parameters: torch.optim.AdamW(parameters, fused=True, **ADAMW),
        powered=lambda parameters, **more: pp.optim.PowerAdamW(parameters, **ADAMW, **more),
    ),
}


@dataclass(frozen=True)
class TrainingInputs:
    """One batch, the plain network to start from, and which of its weights may change."""

    input: Tensor  # [B, ...]
    target: Tensor  # [B]
    plain: nn.Module
    update_masks: Mapping[str, Tensor]  # bool, True where trained; by layer; empty: all are


def training_inputs(
    network: Network, batch: int, is_masked: bool
) -> Callable[[int, torch.device], TrainingInputs]:
    """Random pictures and classes; under masks, 90 % of each layer's weights are frozen at 0."""

    def make(size: int, device: torch.device) -> TrainingInputs:
        with seeded(device):
            plain = network.plain(size)
            input = torch.randn(batch, *network.input_shape(size))
            target = torch.randint(CLASSES, (batch,))
            update_masks = {}
            for name, layer in models.weight_layers(plain).items() if is_masked else ():
                update_masks[name] = torch.rand_like(layer.weight) < TRAINED_SHARE
                with torch.no_grad():
                    layer.weight.mul_(update_masks[name])
        return TrainingInputs(input, target, plain, update_masks)

    return make


def training_step(
    prepare: Prepare,
    make_optimizer: MakeOptimizer,
    is_compiled: bool = False,
    is_autocast: bool = False,
) -> Build:
    """One step of training: zero_grad, forward, cross-entropy, backward, optimizer step.

    With ``is_autocast`` the forward runs under autocast to bfloat16, the weights stay float32.
    """

    def build(inputs: TrainingInputs) -> Call:
        model = prepare(copy.deepcopy(inputs.plain))
        optimizer = make_optimizer(model.parameters())
        network = torch.compile(model, dynamic=False) if is_compiled else model
        # The call keeps these alone, and not the plain network: `bench.memory` counts what is left.
        input, target = inputs.input, inputs.target
        autocast = partial(torch.autocast, input.device.type, torch.bfloat16)
        casts = autocast if is_autocast else nullcontext

        def call() -> Tensor:
            optimizer.zero_grad()
            with casts():
                loss = F.cross_entropy(network(input), target)
            loss.backward()
            optimizer.step()
            return loss

        return call

    return build


def _row(
    network: Network,
    batch: int,
    optimizer: str,
    alpha: float,
    *,
    bars: tuple[Bar, ...] = (),
    by_hand: bool = False,
    is_masked: bool = False,
    is_weighed: bool = False,
    is_autocast: bool = False,
    devices: tuple[str, ...] = CPU + GPU,
) -> Row:
    """A row.

    Args:
        by_hand: handwritten Powerpropagation takes part on a CPU too, eager and compiled; both take
            their time there.
        is_masked: 90 % of the weights are frozen; stock optimizers know no masks, so that the only
            rival is the dense model, which trains all of them.
        is_weighed: peak memory has a bar too.
        is_autocast: the forward is in bfloat16, but for what autocast leaves in float32.
        devices: where it is measured.
    """
    step = partial(training_step, is_autocast=is_autocast)
    stock = OPTIMIZERS[optimizer].stock
    rivals = {DENSE: step(models.dense, stock)}
    written_out = {}
    if not is_masked:
        rivals[PHI] = step(models.powered(alpha, "phi"), stock)
        written_out[EAGER] = step(models.handwritten(alpha), stock)
        written_out[COMPILED] = step(models.handwritten(alpha), stock, is_compiled=True)

    def ours(inputs: TrainingInputs) -> Call:
        prepare = models.powered(alpha, "theta", inputs.update_masks)
        return step(prepare, OPTIMIZERS[optimizer].powered)(inputs)

    def extra_bytes(size: int) -> int:
        return WORKSPACE_BYTES + (network.mask_bytes(size) if is_masked else 0)

    parts = (network.name, f"batch={batch}", optimizer, f"alpha={alpha:g}")
    more = (*(["masks"] if is_masked else []), *(["autocast"] if is_autocast else []))
    return Row(
        name="/".join(("training_step", *parts, *more)),
        suite="training_step",
        ops=OPS,
        inputs=training_inputs(network, batch, is_masked),
        ours=ours,
        rivals={**rivals, **(written_out if by_hand else {})},
        gpu_rivals=written_out,
        size=network.size,
        quick_size=network.quick_size,
        unit=network.unit,
        flops=partial(network.flops, batch),
        bars=bars,
        memory=MemoryBar(DENSE, extra_bytes) if is_weighed else None,
        # A weight that is off by its last bit may be another number in bfloat16.
        rtol=1e-3 if is_autocast else 2e-5,
        devices=devices,
    )


def _sparse_row(batch: int, optimizer: str) -> Row:
    """Sparse layers of the weights that masks would train, powered and not, by their optimizers.

    The rivals have the same zeros: the dense step trains them with all the others, the masked one
    is ours without sparse layers.
    """
    alpha, network = 1.5, models.MLP_2048
    both = OPTIMIZERS[optimizer]

    def powered(is_sparse: bool) -> Build:
        def build(inputs: TrainingInputs) -> Call:
            prepare = models.powered(alpha, "theta", inputs.update_masks)
            return training_step(models.sparse(prepare) if is_sparse else prepare, both.powered)(
                inputs
            )

        return build

    return Row(
        name=f"training_step/{network.name}-sparse/batch={batch}/{optimizer}",
        suite="training_step",
        ops=SPARSE_OPS,
        inputs=training_inputs(network, batch, is_masked=True),
        ours=powered(is_sparse=True),
        rivals={
            UNPOWERED: training_step(models.sparse(models.dense), both.stock),
            DENSE: training_step(models.dense, both.stock),
            MASKED: powered(is_sparse=False),
        },
        size=network.size,
        quick_size=network.quick_size,
        unit=network.unit,
        flops=lambda size: round(TRAINED_SHARE * network.flops(batch, size)),
        bars=(
            Bar("faster", 2.5, DENSE),
            Bar("faster", 2.5, DENSE, UNPOWERED),
            Bar("faster", 2.5, MASKED),
        ),
        # Sums over the entries have another order.
        rtol=1e-4,
        devices=CPU,
    )


def _dense_times(limit: float) -> tuple[Bar, ...]:
    return (Bar("times", limit, DENSE),)


def training_rows() -> list[Row]:
    """SGD with momentum and AdamW, from small to large networks, with and without masks.

    On a GPU it is the MLPs: convolutions are in TF32 there by torch's default, so that the losses
    of two contenders need not agree as closely as the check asks.
    """
    mlp, small, cnn, resnet = models.MLP_2048, models.MLP_300, models.CNN, models.RESNET_18
    phi = (Bar("times", 1.5, DENSE, PHI), Bar("faster", 1.5, COMPILED, PHI))
    by_hand = (Bar("faster", 2.2, COMPILED), Bar("faster", 2.6, EAGER))
    near = _dense_times(1.05)
    return [
        _row(mlp, 128, "sgd", 1.5, bars=near + by_hand + phi, by_hand=True, is_weighed=True),
        _row(mlp, 128, "sgd", 1.25, bars=phi, by_hand=True),
        _row(mlp, 128, "sgd", 2.0, bars=_dense_times(1.02), by_hand=True),
        _row(mlp, 128, "sgd", 1.5, bars=near, is_masked=True, is_weighed=True),
        _row(mlp, 128, "adamw", 1.5, bars=near, is_weighed=True),
        _row(mlp, 128, "adamw", 1.25),
        _row(mlp, 128, "adamw", 2.0, bars=_dense_times(1.02)),
        _row(mlp, 128, "adamw", 1.5, bars=near, is_masked=True, is_weighed=True),
        _row(mlp, 16, "sgd", 1.5, bars=_dense_times(1.10), by_hand=True),
        _row(mlp, 16, "adamw", 1.5, bars=_dense_times(1.10)),
        _row(mlp, 512, "sgd", 1.5, bars=_dense_times(1.03)),
        _row(mlp, 512, "adamw", 1.5, bars=_dense_times(1.03)),
        _row(small, 60, "sgd", 1.5, bars=_dense_times(1.15), by_hand=True),
        _row(small, 60, "adamw", 1.5, bars=_dense_times(1.15)),
        _row(cnn, 64, "sgd", 1.5, by_hand=True, devices=CPU),
        _row(cnn, 64, "adamw", 1.5, devices=CPU),
        _row(resnet, 16, "sgd", 1.5, is_weighed=True, devices=CPU),
        _row(resnet, 16, "adamw", 1.5, devices=CPU),
        _row(resnet, 16, "sgd", 1.5, is_masked=True, is_weighed=True, devices=CPU),
        *(_sparse_row(128, name) for name in OPTIMIZERS),
        _row(mlp, 4096, "sgd", 1.5, devices=GPU),
        _row(mlp, 4096, "adamw", 1.5, devices=GPU),
        *(
            _row(mlp, batch, name, 1.5, is_autocast=True, is_weighed=batch == 128, devices=GPU)
            for batch in (16, 128, 512, 4096)
            for name in OPTIMIZERS
        ),
    ]
