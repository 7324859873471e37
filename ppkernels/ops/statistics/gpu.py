"""Triton kernels of op `statistics` and their launcher, for NVIDIA and AMD GPUs.

A program takes a block of elements, powers them as op `power` does, and adds up in float64: its
moments go into a table of partial results, its counts onto the result by integer additions. A
second kernel combines the partial results in an order that their number alone decides. So results
are the same on every run. Nothing waits for the device, and no value of α, ε, bins or range causes
a compilation.

θ is not written. A weight that is dense in any order is read where it lies; another is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops._device import is_amd
from ppkernels.ops._layout import arranged_words, is_dense
from ppkernels.ops._point import signed_power
from ppkernels.ops._tile import tile_bits, tile_offsets
from ppkernels.ops.power.gpu import exponent_argument, exponent_of

# Elements of a program, by bytes of an element: a reduction over the block, of which there is one
# for each number, is shared by so many. Not tuned on hardware. The last bits of sums depend
# on it; nothing else does.
BLOCKS = {2: 2048, 4: 2048, 8: 1024}
# Bins that a program counts. NVIDIA counts in shared memory, one atomic addition an element; Triton
# for AMD counts by votes, whose cost grows with the number of bins.
NVIDIA_BINS, AMD_BINS = 512, 128
# Partial results that are combined at a time.
LANES = 1024
MOMENTS = 5
# Numbers that a range is given by.
_OF_RANGE = tl.constexpr(3)


# ---- a block


@triton.jit
def _load(values, tile, left, BLOCK: tl.constexpr):
    # Only the last block has a mask: one of unknown length would narrow every access to one
    # element.
    if left >= BLOCK:
        block = tl.load(values + tile)
    else:
        block = tl.load(values + tile, mask=tile < left, other=0.0)
    return block


@triton.jit
def _add(count, number):
    tl.atomic_add(count, number.to(tl.int64), sem="relaxed")


@triton.jit
def _put_moments(partials, counts, programs, theta, is_in):
    """This program's column of partials: minimum, maximum and sums; NaN are counted."""
    column = partials + tl.program_id(0)
    least = tl.min(tl.where(is_in, theta, float("inf")))
    largest = tl.max(tl.where(is_in, theta, float("-inf")))
    tl.store(column, least.to(tl.float64))
    tl.store(column + programs, largest.to(tl.float64))
    x = tl.where(is_in, theta, 0.0).to(tl.float64)
    total = tl.sum(x)
    tl.store(column + 2 * programs, total)
    tl.store(column + 3 * programs, tl.sum(tl.abs(x)))
    tl.store(column + 4 * programs, tl.sum(x * x))
    # Of a NaN, or of infinities of both signs.
    if total != total:
        _add(counts + 1, tl.sum((x != x).to(tl.int32)))


@triton.jit
def _count_below(counts, limits, count, theta, is_in):
    """Entries with |θ| below each of ``count`` limits, which are exact in θ's type."""
    size = tl.where(is_in, tl.abs(theta), float("inf"))
    for i in range(count):
        limit = tl.load(limits + i).to(theta.dtype)
        _add(counts + i, tl.sum((size < limit).to(tl.int32)))


@triton.jit
def _count_bins(counts, numbers, theta, is_in, bins, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """This program's BINS bins; ``numbers`` are low, high and bins / (high − low)."""
    first = tl.program_id(1) * BINS
    low, high, scale = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    x = theta.to(tl.float64)
    is_inside = is_in & (x >= low) & (x <= high)
    # What is not negative is cut off as it is rounded down.
    place = tl.where(is_inside, (x - low) * scale, -1.0).to(tl.int32)
    place = tl.minimum(place, bins - 1)
    # In any order: nothing moves between threads.
    place = tl.reshape(place, [BLOCK], can_reorder=True)
    own = place - first
    found = tl.histogram(own, BINS, mask=own.to(tl.uint32, bitcast=True) < BINS)
    pointers = counts + first + tl.arange(0, BINS)
    tl.atomic_add(pointers, found.to(tl.int64), mask=found != 0, sem="relaxed")


# ---- kernels


@triton.jit(do_not_specialize=["alpha", "limits", "bins", "numel", "programs"])
def statistics_kernel(
    weight,
    words,
    alpha,
    numbers,
    limits,
    bins,
    partials,
    counts,
    numel,
    programs,
    HISTOGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """partials [5, programs] and counts [2 + limits + bins] of [numel] elements in memory order.

    ``numbers`` float64: low, high, bins / (high − low), then ε, ``limits`` of them, rounded up to
    the type that θ is compared in. ``alpha`` is what `exponent_of` takes. Entries whose bit in
    ``words`` is 0 are left out. HISTOGRAM: there are bins.
    """
    TYPE: tl.constexpr = weight.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    tile = tile_offsets(BLOCK // 8)
    phi = _load(weight + start, tile, left, BLOCK).to(COMPUTE)
    theta = signed_power(phi, exponent_of(alpha), TYPE.primitive_bitwidth > 16)
    # As it is stored, in the type that it was computed in.
    theta = theta.to(TYPE).to(COMPUTE)
    is_in = tile < left
    entries = left
    if words is not None:
        is_in = is_in & tile_bits(words + start // 8, (left + 7) // 8, 0, BLOCK // 8)
        entries = tl.sum(is_in.to(tl.int32))
    # Programs beside the first of a block take more bins of the histogram, and nothing else.
    if tl.program_id(1) == 0:
        _add(counts, entries)
        _put_moments(partials, counts, programs, theta, is_in)
        _count_below(counts + 2, numbers + _OF_RANGE, limits, theta, is_in)
    if HISTOGRAM:
        _count_bins(counts + 2 + limits, numbers, theta, is_in, bins, BLOCK, BINS)


@triton.jit(do_not_specialize=["programs"])
def combine_kernel(partials, counts, moments, programs, LANES: tl.constexpr):
    """moments[program] of partials [5, programs]; NaN where counts say that there is one."""
    moment = tl.program_id(0)
    row = partials + moment.to(tl.int64) * programs
    lanes = tl.arange(0, LANES)
    none = tl.where(moment == 0, float("inf"), tl.where(moment == 1, float("-inf"), 0.0))
    found = tl.zeros([LANES], tl.float64) + none
    for first in range(0, programs, LANES):
        more = tl.load(row + first + lanes, mask=first + lanes < programs, other=none)
        both = tl.where(moment == 0, tl.minimum(found, more), tl.maximum(found, more))
        found = tl.where(moment < 2, both, found + more)
    # + 0.0 makes +0 of −0.
    edge = tl.where(moment == 0, tl.min(found), tl.max(found)) + 0.0
    result = tl.where(moment < 2, edge, tl.sum(found))
    tl.store(moments + moment, tl.where(tl.load(counts + 1) > 0, float("nan"), result))


# ---- launcher


def launch_choices(
    element_size: int, is_masked: bool, has_bins: bool, for_amd: bool | None = None
) -> dict[str, int]:
    """What a launch fixes for elements of so many bytes, with a mask and a histogram or without.

    The compiled code depends on it. 128 threads; on AMD, where scalar registers hold a bit for each
    element and condition, 256 if there are many of these.
    """
    amd = is_amd() if for_amd is None else for_amd
    choices = {"HISTOGRAM": has_bins, "BLOCK": BLOCKS[element_size]}
    choices["BINS"] = AMD_BINS if amd else NVIDIA_BINS
    return {**choices, "num_warps": 2 if amd and not (is_masked and has_bins) else 4}


def combine_choices() -> dict[str, int]:
    """What every launch of `combine_kernel` fixes."""
    return {"LANES": LANES, "num_warps": 4}


def statistics(
    weight: Tensor,
    alpha: Tensor,
    epsilons: Sequence[float],
    bins: int,
    low: float,
    high: float,
    words: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Moments float64 [5] and counts int64 [2 + E + bins] of θ; see reference.py."""
    layout = weight if is_dense(weight) else weight.contiguous()
    if words is not None:
        words = arranged_words("statistics", words, layout)
    choices = launch_choices(weight.element_size(), words is not None, bins > 0)
    numel = weight.numel()
    programs = triton.cdiv(numel, choices["BLOCK"])
    partials = weight.new_empty((MOMENTS, programs), dtype=torch.float64)
    counts = weight.new_zeros(2 + len(epsilons) + bins, dtype=torch.int64)
    moments = weight.new_empty(MOMENTS, dtype=torch.float64)
    numbers = _numbers(weight, epsilons, bins, low, high)
    # A kernel goes to the current device, which need not be that of the tensors.
    with torch.cuda.device_of(weight):
        if programs > 0:
            exponent = exponent_argument(alpha, weight.device)
            shape = (len(epsilons), bins, partials, counts, numel, programs)
            grid = (programs, max(1, triton.cdiv(bins, choices["BINS"])))
            statistics_kernel[grid](layout, words, exponent, numbers, *shape, **choices)
        combine_kernel[(MOMENTS,)](partials, counts, moments, programs, **combine_choices())
    return moments, counts


def _numbers(
    weight: Tensor, epsilons: Sequence[float], bins: int, low: float, high: float
) -> Tensor:
    """What the kernel takes of numbers, float64; as arguments they would be rounded to float32."""
    scale = bins / (high - low)
    limits = [rounded_up(epsilon, weight.dtype) for epsilon in epsilons]
    # From memory that is not pinned, the copy would wait for the device.
    is_gpu = weight.device.type != "cpu"
    numbers = [low, high, scale, *limits]
    host = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=is_gpu)
    return host.to(weight.device, non_blocking=True)


def rounded_up(limit: float, dtype: torch.dtype) -> float:
    """The least number that is at least ``limit`` and of the type that θ is compared in.

    So many θ are below the one as below the other: float32 holds every value of the half types.
    """
    if dtype is torch.float64 or math.isinf(limit):
        return limit
    # The device is named because `with torch.device("meta")` would lose the value.
    nearest, infinity = torch.tensor([limit, math.inf], dtype=torch.float32, device="cpu")
    if nearest.item() < limit:
        nearest = nearest.nextafter(infinity)
    return float(nearest)
