"""The rows: what is measured, against what. Adding an op is adding a row to `ROWS`.

The elementwise ops are here, single layers in layers.py, whole training steps in training.py, and
the optimizers' steps alone in update.py. φ is ``weight``, θ ``theta``, α ``alpha``; N is the number
of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ppkernels as pp
from bench.layers import layer_rows
from bench.row import Bar, Build, Call, Row
from bench.training import training_rows
from bench.update import update_rows

IN_MEMORY = 64 * 2**20
IN_CACHE = 64 * 2**10
QUICK = 2**20


@dataclass(frozen=True)
class Tensors:
    """The inputs of an elementwise row: N values of each name it asks for, and an output."""

    weight: Tensor  # [N]
    grad: Tensor  # [N]
    grad_grad: Tensor  # [N]
    out: Tensor  # [N]
    mask: Tensor  # [N], bool; one in ten is True


def tensors(
    dtype: torch.dtype = torch.float32,
    grads: int = 0,
    has_out: bool = True,
    is_positive: bool = False,
    has_mask: bool = False,
) -> Callable[[int], Tensors]:
    """Weights of a usual scale, ``grads`` gradients, output, mask; what is not asked is empty."""

    def make(size: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(size, generator=generator).mul_(0.1).to(dtype)
        # The eager second derivative is NaN at 0, so that it would agree with nothing.
        weight.masked_fill_(weight == 0, 0.1)
        gradients = [torch.randn(size, generator=generator).to(dtype) for _ in range(grads)]
        grad, grad_grad = gradients + [torch.empty(0, dtype=dtype)] * (2 - grads)
        # Written once here, so that no contender pays for the first touch of its pages.
        out = torch.empty(size if has_out else 0, dtype=dtype).zero_()
        mask = torch.rand(size if has_mask else 0, generator=generator) < 0.1
        return Tensors(weight.abs_() if is_positive else weight, grad, grad_grad, out, mask)

    return make


def compiled(formula: Callable[..., Tensor], *names: str) -> Build:
    """torch.compile of ``formula`` over the named inputs, with fixed shapes (its best case)."""

    def build(x: Tensors) -> Call:
        function = torch.compile(formula, dynamic=False)
        inputs = [getattr(x, name) for name in names]
        return lambda: function(*inputs)

    return build


def power_rows() -> list[Row]:
    """θ = φ·|φ|^(α−1) into an existing tensor: in memory, in cache, in bfloat16; and masked."""
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
    rows.append(_power_row("memory", 1.25, dtype=torch.bfloat16))
    rows.append(_masked_row(1.5))
    return rows


def _masked_row(alpha: float) -> Row:
    """θ under a mask in which one bit in ten is set, in new memory, as a layer computes it."""

    def eager(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight * weight.abs().pow(alpha - 1), 0.0)

    def masked(x: Tensors) -> Call:
        words = pp.pack_bits(x.mask)
        return lambda: pp.power(x.weight, alpha, words=words)

    def two_passes(x: Tensors) -> Call:
        words = pp.pack_bits(x.mask)
        return lambda: pp.apply_mask(pp.power(x.weight, alpha), words)

    return Row(
        name=f"power/memory/float32/alpha={alpha:g}/masked",
        suite="power",
        ops=("power",),
        inputs=tensors(has_out=False, has_mask=True),
        ours=masked,
        rivals={
            "torch.clone": lambda x: lambda: x.weight.clone(),
            "power, apply_mask": two_passes,
            "eager": lambda x: lambda: eager(x.weight, x.mask),
            "compiled": compiled(eager, "weight", "mask"),
        },
        size=IN_MEMORY,
        quick_size=QUICK,
        # The mask's bits, a 64th of that, are not counted.
        streams=("read weight", "write theta"),
        roof="torch.clone",
    )


def _power_row(
    place: str, alpha: float, dtype: torch.dtype = torch.float32, bars: tuple[Bar, ...] = ()
) -> Row:
    def eager(weight: Tensor) -> Tensor:
        return weight * weight.abs().pow(alpha - 1)

    def eager_into(weight: Tensor, out: Tensor) -> Tensor:
        return out.copy_(weight * weight.abs().pow(alpha - 1))

    in_cache = place == "cache"
    rivals: dict[str, Build] = {
        "copy_": lambda x: lambda: x.out.copy_(x.weight),
        "eager": lambda x: lambda: eager(x.weight),
        "compiled": compiled(eager, "weight"),
        "compiled, into out": compiled(eager_into, "weight", "out"),
    }
    if in_cache:
        # |φ|^α only: no sign, and NaN for φ < 0. The row's inputs are positive, so all agree.
        rivals["torch.pow"] = lambda x: lambda: torch.pow(x.weight, alpha, out=x.out)
    return Row(
        name=f"power/{place}/{str(dtype).removeprefix('torch.')}/alpha={alpha:g}",
        suite="power",
        ops=("power",),
        inputs=tensors(dtype, is_positive=in_cache),
        ours=lambda x: lambda: pp.power(x.weight, alpha, out=x.out),
        rivals=rivals,
        size=IN_CACHE if in_cache else IN_MEMORY,
        quick_size=IN_CACHE if in_cache else QUICK,
        dtype=dtype,
        streams=("read weight", "write theta"),
        roof="copy_",
        threads=1 if in_cache else None,
        in_cache=in_cache,
        bars=bars,
        # The rivals round twice in bfloat16, whose steps are 2^-8 of the value.
        rtol=2e-2 if dtype == torch.bfloat16 else 2e-5,
    )


def backward_rows() -> list[Row]:
    """∂L/∂φ = g·α|φ|^(α−1) into an existing tensor."""
    return [
        _backward_row(1.25, bars=(Bar("times", 1.15, "torch.add"),)),
        _backward_row(1.5),
        _backward_row(2.0),
    ]


def _backward_row(alpha: float, bars: tuple[Bar, ...] = ()) -> Row:
    def eager(grad: Tensor, weight: Tensor) -> Tensor:
        return grad * (alpha * weight.abs().pow(alpha - 1))

    def eager_into(grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        return out.copy_(grad * (alpha * weight.abs().pow(alpha - 1)))

    return Row(
        name=f"power_backward/memory/float32/alpha={alpha:g}",
        suite="power",
        ops=("power_backward",),
        inputs=tensors(grads=1),
        ours=lambda x: lambda: pp.power_backward(x.grad, x.weight, alpha, out=x.out),
        rivals={
            "torch.add": lambda x: lambda: torch.add(x.grad, x.weight, out=x.out),
            "eager": lambda x: lambda: eager(x.grad, x.weight),
            "compiled": compiled(eager, "grad", "weight"),
            "compiled, into out": compiled(eager_into, "grad", "weight", "out"),
        },
        size=IN_MEMORY,
        quick_size=QUICK,
        streams=("read grad_theta", "read weight", "write grad_weight"),
        roof="torch.add",
        bars=bars,
    )


def allocating_rows() -> list[Row]:
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
    return [
        _allocating_row("power", one, forward, lambda w: pp.power(w, alpha), torch.clone),
        _allocating_row(
            "power_backward", two, backward, lambda g, w: pp.power_backward(g, w, alpha), torch.add
        ),
        _allocating_row(
            "power_double_backward",
            three,
            double_backward,
            lambda h, g, w: pp.power_double_backward(h, g, w, alpha),
            torch.addcmul,
        ),
        _allocating_row(
            "inverse_power", one, inverse, lambda t: pp.inverse_power(t, alpha), torch.clone
        ),
        _allocating_row("rebase", one, rebased, lambda w: pp.rebase(w, alpha, other), torch.clone),
    ]


def _allocating_row(
    op: str,
    names: tuple[str, ...],
    formula: Callable[..., Tensor],
    function: Callable[..., Tensor],
    roof: Callable[..., Tensor],
) -> Row:
    roof_name = f"torch.{roof.__name__}"

    def bind(call: Callable[..., Tensor]) -> Build:
        def build(x: Tensors) -> Call:
            inputs = [getattr(x, name) for name in names]
            return lambda: call(*inputs)

        return build

    return Row(
        name=f"{op}/allocating/float32/alpha=1.25",
        suite="power",
        ops=(op,),
        inputs=tensors(grads=len(names) - 1, has_out=False),
        ours=bind(function),
        rivals={
            roof_name: bind(roof),
            "eager": bind(formula),
            "compiled": compiled(formula, *names),
        },
        size=IN_MEMORY,
        quick_size=QUICK,
        streams=(*(f"read {name}" for name in names), "write the result"),
        roof=roof_name,
    )


ROWS: tuple[Row, ...] = (
    *power_rows(),
    *backward_rows(),
    *allocating_rows(),
    *layer_rows(),
    *training_rows(),
    *update_rows(),
)
"""Every row, in the order in which they are measured and printed."""
