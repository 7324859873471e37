"""The rows of op `power_linear`: a powered product, fused or by a buffer, against the library's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ppkernels as pp
from bench.contenders import bound, compiled, seeded
from bench.row import GPU, OURS, Build, Call, Row, dtype_name

ALPHA = 1.5
FEATURES = 2048


@dataclass(frozen=True)
class ProductInputs:
    """A batch for a layer of N features, φ of the layer, and its power θ in the batch's dtype."""

    input: Tensor  # [B, N]
    grad_output: Tensor  # [B, N]
    weight: Tensor  # [N, N]
    theta: Tensor  # [N, N]


def product_inputs(
    batch: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> Callable[[int, torch.device], ProductInputs]:
    """``batch`` samples; as under autocast where the weight is wider than they are."""

    def make(size: int, device: torch.device) -> ProductInputs:
        with seeded(device):
            input, grad = torch.randn(batch, size).to(dtype), torch.randn(batch, size).to(dtype)
            weight = torch.randn(size, size).mul_(0.1).to(weight_dtype)
        theta = pp.reference.power(weight, ALPHA).to(dtype)
        return ProductInputs(input, grad, weight, theta)

    return make


def theta_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """θ as a user writes it, in the dtype of the product."""
    return (weight * weight.abs().pow(ALPHA - 1)).to(dtype)


def launched(op: str, way: str, *names: str) -> Build:
    """Ours in one of its two ways, which the choice between them is judged by.

    The CPU, where tests look at the values, has one way only.
    """

    def build(inputs: ProductInputs) -> Call:
        tensors = [getattr(inputs, name) for name in names]
        if not tensors[0].is_cuda:
            return lambda: getattr(pp, op)(*tensors, ALPHA)
        from ppkernels.ops.power_linear import gpu

        launch, alpha = getattr(gpu, op), torch.tensor(ALPHA, dtype=torch.float64)
        no_bias_no_mask = (None, None) if op == "power_linear" else (None,)
        return lambda: launch(*tensors, alpha, *no_bias_no_mask, way=way)

    return build


# Each product in several ways: ours, with θ given (what the library's product alone takes), and as
# a user writes it, with op `power` and without.


def forward() -> dict[str, Build]:
    def buffered(input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, pp.power(weight, ALPHA).to(input.dtype))

    def eager(input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, theta_of(weight, input.dtype))

    names = ("input", "weight")
    return {
        OURS: lambda x: lambda: pp.power_linear(x.input, x.weight, ALPHA),
        DENSE: bound(F.linear, "input", "theta"),
        BUFFERED: bound(buffered, *names),
        "eager": bound(eager, *names),
        "compiled": compiled(eager, *names),
    }


def grad_input() -> dict[str, Build]:
    def buffered(grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output @ pp.power(weight, ALPHA).to(grad_output.dtype)

    def eager(grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output @ theta_of(weight, grad_output.dtype)

    names = ("grad_output", "weight")
    return {
        OURS: lambda x: lambda: pp.power_linear_grad_input(x.grad_output, x.weight, ALPHA),
        DENSE: bound(torch.mm, "grad_output", "theta"),
        BUFFERED: bound(buffered, *names),
        "eager": bound(eager, *names),
        "compiled": compiled(eager, *names),
    }


def grad_weight() -> dict[str, Build]:
    def dense(grad_output: Tensor, input: Tensor) -> Tensor:
        return grad_output.t() @ input

    def buffered(grad_output: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return pp.power_backward(dense(grad_output, input).to(weight.dtype), weight, ALPHA)

    def eager(grad_output: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return dense(grad_output, input).to(weight.dtype) * (ALPHA * weight.abs().pow(ALPHA - 1))

    names = ("grad_output", "input", "weight")
    return {
        OURS: lambda x: (
            lambda: pp.power_linear_grad_weight(x.grad_output, x.input, x.weight, ALPHA)
        ),
        DENSE: bound(dense, "grad_output", "input"),
        BUFFERED: bound(buffered, *names),
        "eager": bound(eager, *names),
        "compiled": compiled(eager, *names),
    }


# From a product to its contenders, its op, and what that takes.
PRODUCTS: Mapping[str, tuple[Callable[[], dict[str, Build]], str, tuple[str, ...]]] = {
    "forward": (forward, "power_linear", ("input", "weight")),
    "grad_input": (grad_input, "power_linear_grad_input", ("grad_output", "weight")),
    "grad_weight": (
        grad_weight,
        "power_linear_grad_weight",
        ("grad_output", "input", "weight"),
    ),
}
WAYS = {"ours, fused": "fused", "ours, by a buffer": "buffer"}
DENSE, BUFFERED = "product alone", "power, then product"


def product_rows() -> list[Row]:
    """Each product for small and large batches: in float32, under autocast, and in bfloat16."""
    single, half = torch.float32, torch.bfloat16
    return [
        _row(product, batch, dtype, weight_dtype)
        for dtype, weight_dtype in ((single, single), (half, single), (half, half))
        for product in PRODUCTS
        for batch in (16, 128, 1024)
    ]


def _row(product: str, batch: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Row:
    kind = dtype_name(dtype) if dtype == weight_dtype else f"{dtype_name(dtype)}+autocast"
    contenders, op, names = PRODUCTS[product]
    rivals = contenders()
    rivals |= {name: launched(op, way, *names) for name, way in WAYS.items()}
    return Row(
        name=f"power_linear/{product}/{kind}/batch={batch}",
        suite="power",
        ops=(op,),
        inputs=product_inputs(batch, dtype, weight_dtype),
        ours=rivals.pop(OURS),
        rivals=rivals,
        # Without the power it is another result.
        other_work=(DENSE,) if product == "grad_weight" else (),
        size=FEATURES,
        quick_size=256,
        unit="features",
        dtype=dtype,
        flops=lambda size: 2 * batch * size**2,
        # Sums of up to 2048 products of size 1 × 0.03, rounded as their dtypes have it.
        rtol=1e-3 if dtype == torch.float32 else 5e-2,
        atol=1e-3 if dtype == torch.float32 else 5e-2,
        devices=GPU,
    )
