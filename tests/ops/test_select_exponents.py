"""`topk_mask` where exponents differ: what ranks is log2|θ|, and how exact that is."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

import ppkernels as pp
from ppkernels import BitMask
from ppkernels.ops.select.reference import log2
from ppkernels.testing import random_bits
from ppkernels.testing_selection import weights

BACKENDS = ("kernels", "reference")
NAN, INF = torch.nan, torch.inf

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def kept(mask: BitMask) -> list[int]:
    """The indices of the entries that are set."""
    return mask.unpack().flatten().nonzero().flatten().tolist()


def drawn(count: int) -> Tensor:
    return weights(torch.float32, count, "drawn", torch.Generator().manual_seed(1))


@each_backend
def test_equal_theta_under_other_exponents(backend: str) -> None:
    # θ = 1/16, 1/4, 1/4, 0, 1, ∞ from φ in three ways, all exact.
    theta = [1 / 16, 1 / 4, 1 / 4, 0.0, 1.0, INF]
    tensors = [
        torch.tensor(theta),
        torch.tensor(theta, dtype=torch.float64).sqrt(),
        torch.tensor(theta).sqrt().sqrt().square().bfloat16(),
    ]
    with pp.backend(backend):
        for k in range(19):
            indices = list(map(kept, pp.topk_mask(tensors, k, [1.0, 2.0, 2.0])))
            order = [5] * 3 + [4] * 3 + [1, 2] * 3 + [0] * 3 + [3] * 3
            owners = [0, 1, 2] * 2 + [0, 0, 1, 1, 2, 2] + [0, 1, 2] * 2
            expected = [
                sorted(i for i, o in zip(order[:k], owners[:k], strict=True) if o == owner)
                for owner in range(3)
            ]
            assert indices == expected, k


def test_float64_under_exponents_that_differ() -> None:
    # Closer to each other than the float64 logarithm: kept are exactly k, as the reference keeps
    # them.
    close = 1 + torch.arange(3_000, dtype=torch.float64) * 2.0**-52
    tensors = [close, close.flip(0).clone(), drawn(2_000).double(), torch.full((2_000,), 0.9)]
    alphas = [1.0, 1.5, 1.25, 1.0]
    for k in (1, 700, 2_999, 3_000, 4_500, 7_000, 9_000):
        masks = pp.topk_mask(tensors, k, alphas)
        assert sum(mask.count() for mask in masks) == k
        with pp.backend("reference"):
            assert pp.topk_mask(tensors, k, alphas) == masks


def test_one_exponent_a_tensor_ranks_by_the_weight_itself() -> None:
    # Counts of their own: what exponents others have makes no difference, down to the last bit.
    close = 1e100 * (1 + torch.arange(300, dtype=torch.float64) * 2.0**-52)
    for backend in BACKENDS:
        with pp.backend(backend):
            masks = pp.topk_mask([close, close], [3, 5], [1.0, 3.0])
        assert list(map(kept, masks)) == [[297, 298, 299], [295, 296, 297, 298, 299]]


def test_the_logarithm_errs_by_four_ulp_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    float64 = torch.float64
    octave = torch.exp2(torch.rand(5_000, dtype=float64, generator=generator) - 0.5)
    near_one = 1 + torch.randn(5_000, dtype=float64, generator=generator) * 1e-3
    any_bits = random_bits(3_000, float64, generator).abs()
    around = 0.5**0.5 * (1 + torch.arange(-32, 32).double() * 2.0**-52)
    ends = torch.tensor([5e-324, 2.0**-1022, torch.finfo(float64).max, 1 - 2**-53], dtype=float64)
    x = torch.cat([octave, near_one, any_bits[any_bits.isfinite()], around, ends])
    with mpmath.workprec(160):
        exact = [mpmath.log(value, 2) for value in x.tolist()]
        pairs = zip(log2(x).tolist(), exact, strict=True)
        errors = [float(abs(found - value) / math.ulp(value)) for found, value in pairs]
    assert max(errors) <= 4
    powers = torch.ldexp(torch.ones(2_098, dtype=float64), torch.arange(-1_074, 1_024))
    assert torch.equal(log2(powers), torch.arange(-1_074, 1_024).double())
    special = log2(torch.tensor([0.0, INF, NAN], dtype=float64))
    assert special.tolist()[:2] == [-INF, INF]
    assert special[2].isnan()
