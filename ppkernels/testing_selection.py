"""What `topk_mask` is tested on, and which masks it must give, for tests and bench.

The masks are those of Python's own sort over Python's own numbers; where exponents differ, over
α·log2|x| by mpmath. The rule: every bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mpmath  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ppkernels import BitMask, ops

SELECTIONS = ("topk_mask",)


@dataclass(frozen=True)
class Selection:
    """One call.

    Attributes:
        name: what a failure calls it.
        tensors, k, alphas, within: as `ppkernels.topk_mask` takes them.
    """

    name: str
    tensors: list[Tensor]
    k: int | list[int]
    alphas: list[float]
    within: list[BitMask | None] | None = None


# ---- the masks


def _exact_keys(tensor: Tensor, alpha: float, by_log: bool) -> list[float | int]:
    """Numbers that order as |θ| does, in row-major order."""
    magnitudes = tensor.detach().reshape(-1).abs().double().tolist()
    if not by_log:
        return list(magnitudes)
    with mpmath.workprec(160):
        scale = mpmath.mpf(alpha) * 2**60 / mpmath.log(2)
        # As integers: equal |θ| under different exponents must be equal here.
        return [
            int(mpmath.nint(scale * mpmath.log(x))) if 0 < x < math.inf else (x or -math.inf)
            for x in magnitudes
        ]


def exact_masks(case: Selection) -> list[BitMask]:
    """The masks of a selection, on the CPU."""
    tensors = [tensor.cpu() for tensor in case.tensors]
    may = [torch.ones(tensor.shape, dtype=torch.bool) for tensor in tensors]
    if case.within is not None:
        pairs = zip(may, case.within, strict=True)
        may = [all_ones if mask is None else mask.cpu().unpack() for all_ones, mask in pairs]
    kept = [torch.zeros(tensor.numel(), dtype=torch.bool) for tensor in tensors]
    each = list(range(len(tensors)))
    together = [each] if isinstance(case.k, int) else [[i] for i in each]
    counts = [case.k] if isinstance(case.k, int) else case.k
    for group, count in zip(together, counts, strict=True):
        by_log = len({case.alphas[i] for i in group}) > 1
        ranked = []
        for i in group:
            keys = _exact_keys(tensors[i], case.alphas[i], by_log)
            ranked += [(-keys[n], i, n) for n in may[i].flatten().nonzero().flatten().tolist()]
        for _, i, n in sorted(ranked)[:count]:
            kept[i][n] = True
    return [
        BitMask.pack(mask.view(tensor.shape)) for mask, tensor in zip(kept, tensors, strict=True)
    ]


# ---- the calls


def weights(
    dtype: torch.dtype, count: int, kind: str, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """``count`` weights: "drawn" like a network's, "zeros" for nine in ten, or of a "grid"."""
    drawn = torch.randn(count, dtype=torch.float64, generator=generator) * 0.1
    if kind == "zeros":
        zero = torch.where(drawn > 0, 0.0, -0.0).double()
        drawn = torch.where(torch.rand(count, generator=generator) < 0.9, zero, drawn)
    elif kind == "grid":
        drawn = (drawn * 20).round() / 4
    return drawn.to(device, dtype)


KINDS = ("drawn", "zeros", "grid")

# More than a part of the CPU's kernels for each of two threads.
LARGE = 140_001


def selections(dtype: torch.dtype, device: str = "cpu") -> Iterator[Selection]:
    """Calls on tensors of one dtype, and on some of several."""
    generator = torch.Generator().manual_seed(0)
    large = weights(dtype, LARGE, "zeros", generator, device)
    yield Selection("large", [large], LARGE // 20, [1.0])
    others = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for kind in KINDS:
        sizes = (300, 0, 1, 2_501)
        tensors = [weights(dtype, size, kind, generator, device) for size in sizes]
        total = sum(sizes)
        for share in (0, 0.001, 0.1, 0.5, 1):
            name = f"{kind}, {share:g} of all"
            yield Selection(name, tensors, round(share * total), [1.5] * 4)
        yield Selection(f"{kind}, of each", tensors, [size // 10 for size in sizes], [1.5] * 4)

        small = [weights(dtype, 500, kind, generator, device) for _ in range(3)]
        small += [weights(other, 300, kind, generator, device) for other in others]
        alphas = [1.0, 2.0, 4.0, 1.5, 1.25, 1.0, 3.0]
        yield Selection(f"{kind}, exponents that differ", small, 400, alphas)
        masks: list[BitMask | None] = [
            BitMask.pack((torch.rand(tensor.shape, generator=generator) < 0.5).to(device))
            for tensor in small
        ]
        masks[0] = masks[3] = None
        yield Selection(f"{kind}, within masks", small, 500, [1.0] * 7, masks)
        yield Selection(f"{kind}, within masks, exponents", small, 500, alphas, masks)


# ---- comparison


def check_selection(case: Selection, what: str = "topk_mask") -> None:
    """Raise AssertionError unless a call gives exactly the masks that it should."""
    masks = ops.topk_mask(case.tensors, case.k, case.alphas, within=case.within)
    for i, (mask, wanted) in enumerate(zip(masks, exact_masks(case), strict=True)):
        assert mask.device == case.tensors[i].device, f"{what}, {case.name}: on {mask.device}"
        if mask == wanted:
            continue
        more, fewer = (mask.cpu() - wanted).count(), (wanted - mask.cpu()).count()
        raise AssertionError(
            f"{what}, {case.name}: of tensor {i}, {tuple(wanted.shape)}, {more} entries are kept "
            f"that should not be, and {fewer} are missing"
        )


def check_selections(op: str, device: str = "cpu", dtypes: Sequence[torch.dtype] = ()) -> None:
    """What `ppkernels.testing.check_values` calls for an op in `SELECTIONS`."""
    for dtype in dtypes:
        for case in selections(dtype, device):
            check_selection(case, f"{op}: {dtype}")
