"""Selection of the largest weights in pure PyTorch: the specification of every implementation.

Weights are ranked by a key that orders them as |θ| does:

- where all tensors that are ranked together have one exponent, by |x| itself, x being what is
  stored: |x|^α orders alike;
- else by α·log2|x| in float64, so that |x|^α is neither rounded nor out of range. `log2` is made of
  additions, multiplications and divisions only, each rounded by itself, so that every
  implementation gives the same bits.

Of equal keys the one with the lower index ranks first: of an earlier tensor, or of the same tensor
and earlier in row-major order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppkernels.ops._bits import each_bit, unpacked

# s + s³/3 + s⁵/5 + ... = atanh(s); up to s²¹ it is exact to float64 for |s| ≤ 3 − √8.
TERMS = tuple(1 / n for n in range(1, 22, 2))
# log2(m) = 2/ln(2) · atanh((m − 1)/(m + 1))
TWO_OVER_LN2 = 2.8853900817779268
SQRT_HALF = 0.7071067811865476


def log2(x: Tensor) -> Tensor:
    """log2 of x ≥ 0, float64, within 4 ULP; exact for powers of two; log2(0) = −inf."""
    mantissa, exponent = torch.frexp(x)  # in [1/2, 1)
    is_low = mantissa < SQRT_HALF
    mantissa = torch.where(is_low, mantissa + mantissa, mantissa)
    exponent = exponent - is_low.to(exponent.dtype)
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = torch.full_like(s, TERMS[-1])
    for term in TERMS[-2::-1]:
        series = series * square + term
    result = exponent.double() + s * series * TWO_OVER_LN2
    # frexp splits neither 0 nor infinity.
    return torch.where((x > 0) & (x < torch.inf), result, x.log2())


def keys(tensor: Tensor, alpha: float, alphas: Sequence[float]) -> Tensor:
    """What a tensor is ranked by among others of ``alphas``: float64 [N], in row-major order."""
    magnitude = tensor.detach().reshape(-1).abs().double()
    if all(other == alpha for other in alphas):
        return magnitude
    return alpha * log2(magnitude)


def topk_bits(
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    alphas: Sequence[float],
    within: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """The words of the masks that keep the largest |θ|, and which tensor holds a NaN.

    Args:
        tensors: T tensors of any shapes.
        counts: how many entries to keep: one number, of all tensors together, or one a tensor.
        alphas: T exponents; a tensor holds φ = sign(θ)·|θ|^(1/α), so 1 where it holds θ.
        within: T words of masks, or nothing: where a bit is 0 the entry is not kept, and not looked
            at. A tensor of no elements stands for a mask of ones.

    Returns:
        T words, and the index of the first tensor in which there is a NaN, else −1, as a 0-dim
        int64 tensor. The words mean nothing where there is a NaN.
    """
    sizes = [tensor.numel() for tensor in tensors]
    is_one = len(counts) == 1
    ranked = [
        keys(tensor, alpha, alphas if is_one else [alpha])
        for tensor, alpha in zip(tensors, alphas, strict=True)
    ]
    candidates = [_candidates(key, *words) for key, *words in _beside(ranked, within)]
    has_nan = [(key.isnan() & may).any() for key, may in zip(ranked, candidates, strict=True)]
    if is_one:
        all_kept = _largest(torch.cat(ranked), torch.cat(candidates), counts[0])
        kept = list(torch.split(all_kept, sizes))
    else:
        kept = [_largest(*each) for each in zip(ranked, candidates, counts, strict=True)]
    return [_packed(mask) for mask in kept], _first(has_nan)


def _beside(ranked: list[Tensor], within: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(ranked, within, strict=True)) if within else [(key,) for key in ranked]


def _candidates(key: Tensor, words: Tensor | None = None) -> Tensor:
    """Which entries may be kept: bool [N]."""
    if words is None or words.numel() == 0:
        return torch.ones_like(key, dtype=torch.bool)
    return unpacked(words, key.shape)


def _largest(key: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The mask, bool [N], of the ``count`` largest keys among the candidates."""
    order = key.argsort(descending=True, stable=True)
    order = order[candidates[order]][:count]
    return torch.zeros_like(candidates).index_fill(0, order, True)


def _packed(mask: Tensor) -> Tensor:
    entries = torch.nn.functional.pad(mask, (0, -mask.numel() % 8))
    return (entries.view(-1, 8) * each_bit(mask.device)).sum(1, dtype=torch.uint8)


def _first(is_true: list[Tensor]) -> Tensor:
    """The index of the first that is true, or −1: 0-dim int64."""
    flags = torch.stack(is_true).long()
    return torch.where(flags.any(), flags.argmax(), -1)
