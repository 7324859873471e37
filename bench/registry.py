"""The rows: what is measured, against what. Adding an op is adding a row to `ROWS`.

The elementwise ops are here, those on masks in masks.py, statistics in distribution.py, selections
in selection.py, single layers in layers.py, sparse ones in sparse.py, whole training steps in
training.py, and the optimizers' steps alone in update.py. φ is ``weight``, θ ``theta``, α
``alpha``; N is the number of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import ppkernels as pp
from bench.contenders import IN_CACHE, IN_MEMORY, QUICK, bound, compiled, seeded
from bench.distribution import distribution_rows
from bench.layers import layer_rows
from bench.masks import mask_rows
from bench.products import product_rows
from bench.row import CPU, GPU, Bar, Build, Row, dtype_name
from bench.selection import select_rows
from bench.sparse import sparse_rows
from bench.training import training_rows
from bench.update import update_rows

HALF = torch.bfloat16


@dataclass(frozen=True)
class Tensors:
    """The inputs of an elementwise row: N values of each name it asks for, and an output."""

    weight: Tensor  # [N]
    grad: Tensor  # [N]
    grad_grad: Tensor  # [N]
    out: Tensor  # [N]


def tensors(
    dtype: torch.dtype = torch.float32,
    grads: int = 0,
    has_out: bool = True,
    is_positive: bool = False,
) -> Callable[[int, torch.device], Tensors]:
    """Weights of a usual scale, ``grads`` gradients, and an output; what is not asked is empty."""

    def make(size: int, device: torch.device) -> Tensors:
        with seeded(device):
            weight = torch.randn(size).mul_(0.1).to(dtype)
            # The eager second derivative is NaN at 0, so that it would agree with nothing.
            weight.masked_fill_(weight == 0, 0.1)
            gradients = [torch.randn(size).to(dtype) for _ in range(grads)]
            grad, grad_grad = gradients + [torch.empty(0, dtype=dtype)] * (2 - grads)
            # Written once here, so that no contender pays for the first touch of its pages.
            out = torch.empty(size if has_out else 0, dtype=dtype).zero_()
        return Tensors(weight.abs_() if is_positive else weight, grad, grad_grad, out)

    return make


def power_rows() -> list[Row]:
    """θ = φ·|φ|^(α−1) into an existing tensor: in memory, in cache or small, and in bfloat16."""
    rows = []
    for alpha in (1.25, 1.5, 2.0, 1.0):
        bars = (
            Bar("times", 1.15, "copy_"),
            Bar("faster", 10, "eager"),
            Bar("faster", 6, "compiled"),
            Bar("faster", 6, "compiled, into out"),
        )
        rows.append(_power_row("memory", alpha, bars=bars if alpha == 1.25 else ()))
    in_cache = Bar("faster", 4, "torch.pow")
    rows.append(_power_row("cache", 1.25, bars=(in_cache,)))
    rows.append(_power_row("cache", 1.5))
    rows.append(_power_row("memory", 1.25, HALF))
    rows.append(_power_row("memory", 1.5, HALF, devices=GPU))
    rows.append(_power_row("small", 1.25))
    rows.append(_power_row("small", 1.25, HALF))
    return rows


DEVICES = {"memory": CPU + GPU, "cache": CPU, "small": GPU}
"""Where the rows of each place are measured; of ``small`` ones a GPU's launch is the most."""


def _name(op: str, place: str, dtype: torch.dtype, alpha: float) -> str:
    return f"{op}/{place}/{dtype_name(dtype)}/alpha={alpha:g}"


def _rtol(dtype: torch.dtype) -> float:
    """The rivals round several times in bfloat16, whose steps are 2^-8 of the value."""
    return 2e-2 if dtype == HALF else 2e-5


def _power_row(
    place: str,
    alpha: float,
    dtype: torch.dtype = torch.float32,
    bars: tuple[Bar, ...] = (),
    devices: tuple[str, ...] | None = None,
) -> Row:
    def eager(weight: Tensor) -> Tensor:
        return weight * weight.abs().pow(alpha - 1)

    def eager_into(weight: Tensor, out: Tensor) -> Tensor:
        return out.copy_(weight * weight.abs().pow(alpha - 1))

    is_alone, is_small = place == "cache", place != "memory"
    rivals: dict[str, Build] = {
        "copy_": lambda x: lambda: x.out.copy_(x.weight),
        "eager": lambda x: lambda: eager(x.weight),
        "compiled": compiled(eager, "weight"),
        "compiled, into out": compiled(eager_into, "weight", "out"),
    }
    if is_alone:
        # |φ|^α only: no sign, and NaN for φ < 0. The row's inputs are positive, so all agree.
        rivals["torch.pow"] = lambda x: lambda: torch.pow(x.weight, alpha, out=x.out)
    return Row(
        name=_name("power", place, dtype, alpha),
        suite="power",
        ops=("power",),
        inputs=tensors(dtype, is_positive=is_alone),
        ours=lambda x: lambda: pp.power(x.weight, alpha, out=x.out),
        rivals=rivals,
        size=IN_CACHE if is_small else IN_MEMORY,
        quick_size=IN_CACHE if is_small else QUICK,
        dtype=dtype,
        streams=("read weight", "write theta"),
        roof="copy_",
        threads=1 if is_alone else None,
        in_cache=is_small,
        bars=bars,
        rtol=_rtol(dtype),
        devices=devices or DEVICES[place],
    )


def backward_rows() -> list[Row]:
    """∂L/∂φ = g·α|φ|^(α−1) into an existing tensor."""
    return [
        _backward_row(1.25, bars=(Bar("times", 1.15, "torch.add"),)),
        _backward_row(1.5),
        _backward_row(2.0),
        _backward_row(1.25, HALF, devices=GPU),
        _backward_row(1.25, place="small"),
    ]


def _backward_row(
    alpha: float,
    dtype: torch.dtype = torch.float32,
    place: str = "memory",
    bars: tuple[Bar, ...] = (),
    devices: tuple[str, ...] | None = None,
) -> Row:
    def eager(grad: Tensor, weight: Tensor) -> Tensor:
        return grad * (alpha * weight.abs().pow(alpha - 1))

    def eager_into(grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        return out.copy_(grad * (alpha * weight.abs().pow(alpha - 1)))

    is_small = place != "memory"
    return Row(
        name=_name("power_backward", place, dtype, alpha),
        suite="power",
        ops=("power_backward",),
        inputs=tensors(dtype, grads=1),
        ours=lambda x: lambda: pp.power_backward(x.grad, x.weight, alpha, out=x.out),
        rivals={
            "torch.add": lambda x: lambda: torch.add(x.grad, x.weight, out=x.out),
            "eager": lambda x: lambda: eager(x.grad, x.weight),
            "compiled": compiled(eager, "grad", "weight"),
            "compiled, into out": compiled(eager_into, "grad", "weight", "out"),
        },
        size=IN_CACHE if is_small else IN_MEMORY,
        quick_size=IN_CACHE if is_small else QUICK,
        dtype=dtype,
        streams=("read grad_theta", "read weight", "write grad_weight"),
        roof="torch.add",
        in_cache=is_small,
        bars=bars,
        rtol=_rtol(dtype),
        devices=devices or DEVICES[place],
    )


def allocating_rows(dtype: torch.dtype, devices: tuple[str, ...] = CPU + GPU) -> list[Row]:
    """Ops that return a new tensor; the roof allocates one as well, and pays its page faults."""
    alpha, other = 1.25, 2.0

    def inverse(theta: Tensor) -> Tensor:
        return theta.sign() * theta.abs().pow(1 / alpha)

    def rebased(weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs().pow(alpha / other)

    def forward(weight: Tensor) -> Tensor:
        return weight * weight.abs().pow(alpha - 1)

    def backward(grad: Tensor, weight: Tensor) -> Tensor:
        return grad * (alpha * weight.abs().pow(alpha - 1))

    def double_backward(grad_grad: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        factor = alpha * (alpha - 1)
        return grad_grad * grad * (factor * weight.abs().pow(alpha - 2) * weight.sign())

    one, two = ("weight",), ("grad", "weight")
    three = ("grad_grad", *two)
    rows = [
        _allocating_row("power", one, forward, lambda w: pp.power(w, alpha), torch.clone, dtype),
        _allocating_row(
            "power_backward",
            two,
            backward,
            lambda g, w: pp.power_backward(g, w, alpha),
            torch.add,
            dtype,
        ),
        _allocating_row(
            "power_double_backward",
            three,
            double_backward,
            lambda h, g, w: pp.power_double_backward(h, g, w, alpha),
            torch.addcmul,
            dtype,
        ),
        _allocating_row(
            "inverse_power", one, inverse, lambda t: pp.inverse_power(t, alpha), torch.clone, dtype
        ),
        _allocating_row(
            "rebase", one, rebased, lambda w: pp.rebase(w, alpha, other), torch.clone, dtype
        ),
    ]
    return [replace(row, devices=devices) for row in rows]


def _allocating_row(
    op: str,
    names: tuple[str, ...],
    formula: Callable[..., Tensor],
    function: Callable[..., Tensor],
    roof: Callable[..., Tensor],
    dtype: torch.dtype,
) -> Row:
    roof_name = f"torch.{roof.__name__}"
    return Row(
        name=_name(op, "allocating", dtype, 1.25),
        suite="power",
        ops=(op,),
        inputs=tensors(dtype, grads=len(names) - 1, has_out=False),
        ours=bound(function, *names),
        rivals={
            roof_name: bound(roof, *names),
            "eager": bound(formula, *names),
            "compiled": compiled(formula, *names),
        },
        size=IN_MEMORY,
        quick_size=QUICK,
        dtype=dtype,
        streams=(*(f"read {name}" for name in names), "write the result"),
        roof=roof_name,
        rtol=_rtol(dtype),
    )


ROWS: tuple[Row, ...] = (
    *power_rows(),
    *backward_rows(),
    *allocating_rows(torch.float32),
    *allocating_rows(HALF, GPU),
    *mask_rows(),
    *distribution_rows(),
    *product_rows(),
    *layer_rows(),
    *training_rows(),
    *update_rows(),
    *select_rows(),
    *sparse_rows(),
)
"""Every row, in the order in which they are measured and printed."""


def rows_on(device: str) -> tuple[Row, ...]:
    """The rows of a kind of device, as they are measured there."""
    rows = [row for row in ROWS if device in row.devices]
    return tuple(rows if device == "cpu" else map(Row.on_gpu, rows))
