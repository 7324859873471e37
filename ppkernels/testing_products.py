"""How exact the ops that are products of matrices must be; the rest of ppkernels.testing.

Their results are sums, so that errors are judged against the largest value and not one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppkernels import ops, reference

PRODUCTS = ("power_linear", "power_linear_grad_input", "power_linear_grad_weight")
# M, N, K: one of each; odd; tiles of GPU kernels and more, in multiples of 16.
_PRODUCT_SIZES = ((1, 1, 1), (5, 37, 50), (3, 64, 128), (130, 144, 80))


def check_product(op: str, device: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise AssertionError unless a powered product is right, with and without a mask.

    The largest error of a result, as a share of the largest exact value, may be twice what the
    reference in the same dtype errs, and four units of the dtype; half types' powers are good to
    2^-16. Half types come beside a weight of the same dtype and beside a float32 one.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for dtype in dtypes:
        for own in dict.fromkeys((dtype, torch.float32 if dtype.itemsize == 2 else dtype)):
            for batch, rows, columns in _PRODUCT_SIZES:
                weight = draw(rows, columns).to(own)
                g, x = draw(batch, rows).to(dtype), draw(batch, columns).to(dtype)
                operands = {PRODUCTS[0]: (x,), PRODUCTS[1]: (g,), PRODUCTS[2]: (g, x)}[op]
                for words in (None, reference.pack_bits(draw(rows, columns) > 0)):
                    _check_product(op, operands, weight, words, device)


def _check_product(
    op: str, operands: tuple[Tensor, ...], weight: Tensor, words: Tensor | None, device: str
) -> None:
    alpha = 1.5
    there = [tensor.to(device) for tensor in (*operands, weight)]
    hidden = None if words is None else words.to(device)
    result = getattr(ops, op)(*there, alpha, words=hidden).cpu().double()
    plain = getattr(reference, op)(*operands, weight, alpha, words=words).double()
    exact = getattr(reference, op)(
        *(tensor.double() for tensor in (*operands, weight)), alpha, words=words
    )
    dtype = operands[0].dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(result.dtype).eps)
    floor = (4 * eps + (2.0**-15 if dtype.itemsize == 2 else 0.0)) * exact.abs().max()
    error, allowed = (result - exact).abs().max(), 2 * (plain - exact).abs().max() + floor
    assert error <= allowed, (
        f"{op} {dtype} beside {weight.dtype}, weight {tuple(weight.shape)}, batch "
        f"{len(operands[0])}, {'no ' if words is None else ''}mask: off by {error:.3g}, allowed "
        f"are {allowed:.3g}"
    )
