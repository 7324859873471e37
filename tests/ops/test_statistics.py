"""Op `statistics` against NumPy and exact sums: values, memory, order, the raw op.
Longer than 350 lines: all of them go through one check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ppkernels as pp
from ppkernels.testing import DTYPES, LAYOUTS, random_bits, special_values
from ppkernels.testing_statistics import edge_values

ALPHAS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)
EPSILONS = (0.0, 1e-3, 0.25, 1e-60, math.inf, 0.5, 1e-2, 2.0**-149, 0.125)
BLOCK = 2**15

each_backend = pytest.mark.parametrize("backend", ["kernels", "reference"])
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
kernels_only = pytest.mark.skipif(
    pp.cpu_capability() == "reference", reason="the order of the sums is that of the kernels"
)


def ordinary(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * 0.3).to(dtype)


def all_values(dtype: torch.dtype) -> Tensor:
    """Special values, ends of bins and ε, and numbers of every exponent; no NaN."""
    special = torch.tensor(special_values(dtype), dtype=torch.float64).to(dtype)
    drawn = random_bits(2_000, dtype, torch.Generator().manual_seed(0))
    values = torch.cat([special, edge_values(dtype), drawn])
    return values[~values.isnan()]


def check(found: pp.Statistics, theta: Tensor) -> None:
    """``found`` is what NumPy and exact sums find in θ, whatever its layout; no NaN in it."""
    x = theta.detach().double().flatten().numpy()
    size = np.abs(x)
    assert found.count == len(x)
    assert found.counts_below == tuple(int((size < epsilon).sum()) for epsilon in found.epsilons)
    assert found.min == (x.min() if len(x) else math.inf)
    assert found.max == (x.max() if len(x) else -math.inf)
    if found.range is not None:
        # NumPy's own bins end where its edges, rounded, are; ours where the formula says.
        (low, high), bins = found.range, len(found.histogram)
        inside = x[(x >= low) & (x <= high)]
        place = np.minimum(np.floor((inside - low) * (bins / (high - low))), bins - 1)
        assert found.histogram == tuple(np.bincount(place.astype(np.int64), minlength=bins))
    with np.errstate(over="ignore"):
        sums = ((found.sum, x), (found.sum_abs, size), (found.sum_square, x * x))
    for came, terms in sums:
        if not np.isfinite(terms).all():
            expected = sum(terms.tolist())
            assert came == expected or (math.isnan(came) and math.isnan(expected))
            continue
        try:
            total, room = math.fsum(terms), math.fsum(np.abs(terms))
        except OverflowError:
            assert not math.isfinite(came)
            continue
        bound = (len(x) / BLOCK + 2**11 + 5) * 2.0**-53
        assert abs(came - total) <= bound * room or math.isinf(room * 2)


# ---- values


@each_backend
@each_dtype
@each_alpha
def test_values_of_all_kinds(alpha: float, dtype: torch.dtype, backend: str) -> None:
    weight = all_values(dtype)
    with pp.backend(backend):
        found = pp.statistics(weight, EPSILONS, alpha, bins=7, range=(-0.5, 0.25))
        check(found, pp.power(weight, alpha))
        finite = weight[weight.abs() < 2]
        found = pp.statistics(finite, EPSILONS[:4], alpha, bins=10, range=(-1, 1))
        check(found, pp.power(finite, alpha))


@each_backend
@each_dtype
@each_layout
def test_any_layout_with_and_without_a_mask(
    layout: object, dtype: torch.dtype, backend: str
) -> None:
    weight = layout.arrange(ordinary(*layout.shape, dtype=dtype))
    mask = torch.rand(weight.shape) < 0.4
    hidden = torch.where(mask, weight, torch.nan)
    # In the layout of the weight again, so that mask and memory are told apart.
    hidden = torch.empty_like(weight).copy_(hidden)
    within = pp.BitMask.pack(mask)
    with pp.backend(backend):
        for alpha in (None, 1.5):
            theta = weight if alpha is None else pp.power(weight, alpha)
            check(pp.statistics(weight, EPSILONS, alpha, bins=3, range=(-1, 1)), theta)
            found = pp.statistics(hidden, EPSILONS, alpha, bins=3, range=(-1, 1), within=within)
            check(found, theta[mask])


@each_dtype
@pytest.mark.parametrize("size", [15, 16, 17, 2_047, 2_049, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_sizes_around_lanes_pieces_and_blocks(size: int, dtype: torch.dtype) -> None:
    weight = ordinary(size, dtype=dtype)
    for alpha in (1.0, 2.7):
        check(
            pp.statistics(weight, EPSILONS[:5], alpha, bins=101, range=(-1, 1)),
            pp.power(weight, alpha),
        )


@each_dtype
def test_theta_is_bit_for_bit_that_of_power(dtype: torch.dtype) -> None:
    # One entry at a time, each rounded to the dtype: min is θ itself.
    for alpha in ALPHAS:
        for weight in ordinary(40, dtype=dtype).split(1):
            assert pp.statistics(weight, (), alpha).min == pp.power(weight, alpha).item()


def test_epsilons_are_those_of_float64() -> None:
    weight = torch.tensor([0.1, 0.01, 0.001])
    for value in weight:
        exact = value.item()  # no float32 is between 0.1 and this
        below = [math.nextafter(exact, 0), exact, math.nextafter(exact, 1)]
        found = pp.statistics(value, below)
        assert found.counts_below == (0, 0, 1)
    # 0.1 in float32 lies above 0.1 in float64, 0.01 below.
    assert pp.statistics(weight[0], [0.1]).counts_below == (0,)
    assert pp.statistics(weight[1], [0.01]).counts_below == (1,)


@each_backend
def test_ends_of_the_histogram(backend: str) -> None:
    weight = torch.tensor([-1.0, -0.0, 0.0, 0.5, 1.0, -1.001, 1.001, math.inf, -math.inf])
    with pp.backend(backend):
        assert pp.statistics(weight, bins=4, range=(-1, 1)).histogram == (1, 0, 2, 2)
        assert pp.statistics(weight, bins=1, range=(-1, 1)).histogram == (5,)
        assert pp.statistics(weight, bins=2, range=(0.5, 1e300)).histogram == (3, 0)
        # (θ − low) · (bins / (high − low)) may round up to bins.
        low, high = 0.1, 0.7
        inside = torch.tensor([math.nextafter(high, 0)], dtype=torch.float64)
        for bins in (1, 3, 7, 10, 1_000):
            assert pp.statistics(inside, bins=bins, range=(low, high)).histogram[-1] == 1


@each_backend
def test_zeros_and_nothing(backend: str) -> None:
    with pp.backend(backend):
        for zeros in ([-0.0, 0.0], [0.0, -0.0], [-0.0]):
            found = pp.statistics(torch.tensor(zeros), [1e-3])
            assert [math.copysign(1, x) for x in (found.min, found.max)] == [1, 1]
            assert found.below == {1e-3: len(zeros)}
        for nothing in (torch.empty(0), torch.empty(3, 0)):
            found = pp.statistics(nothing, [1.0], bins=2, range=(0, 1))
            assert found == pp.Statistics(
                0, math.inf, -math.inf, 0.0, 0.0, 0.0, (1.0,), (0,), (0, 0), (0.0, 1.0)
            )
            assert math.isnan(found.mean)
            assert math.isnan(found.share_below(1.0))
        all_hidden = pp.BitMask.pack(torch.zeros(9, dtype=torch.bool))
        assert pp.statistics(torch.ones(9), within=all_hidden).count == 0


@each_backend
def test_infinities(backend: str) -> None:
    with pp.backend(backend):
        found = pp.statistics(torch.tensor([1.0, math.inf]), [math.inf])
        assert (found.min, found.max, found.sum, found.sum_square) == (1, *[math.inf] * 3)
        assert found.below == {math.inf: 1}
        found = pp.statistics(torch.tensor([-math.inf, 1.0, math.inf]))
        assert math.isnan(found.sum)
        assert (found.min, found.max, found.sum_abs) == (-math.inf, math.inf, math.inf)
        # θ overflows though φ does not.
        assert pp.statistics(torch.tensor([1e30]), (), 3.0).max == math.inf


@each_backend
@each_dtype
@pytest.mark.parametrize("place", [0, 7, 40, 2_500, BLOCK + 3])
def test_nan_is_counted(place: int, dtype: torch.dtype, backend: str) -> None:
    weight = ordinary(BLOCK + 50, dtype=dtype)
    weight[place] = weight[-1] = math.nan
    one = torch.ones((), dtype=torch.float64)
    find = torch.ops.ppkernels.statistics if backend == "kernels" else pp.reference.statistics
    moments, counts = find(weight, one, [0.1], 2, -9.0, 9.0, None)
    assert moments.isnan().all()
    assert counts[:2].tolist() == [BLOCK + 50, 2]
    assert counts[3:].sum() == BLOCK + 48
    with pp.backend(backend), pytest.raises(ValueError, match=r"NaN in tensors\['b'\] \(2 of "):
        pp.statistics({"a": torch.ones(3), "b": weight})
    mask = ~weight.isnan()
    assert pp.statistics(weight, within=pp.BitMask.pack(mask)).count == BLOCK + 48


# ---- the order of the sums


def in_order(theta: Tensor) -> list[float]:
    """The sums of kernels/statistics.h, Note [The order of the sums]: Σθ, Σ|θ|, Σθ²."""
    x = theta.double().numpy()
    totals = []
    for terms in (x, np.abs(x), x * x):
        total = 0.0
        for begin in range(0, len(terms), BLOCK):
            block = terms[begin : begin + BLOCK]
            block = np.append(block, np.zeros(-len(block) % 16)).reshape(-1, 16)
            lanes = np.zeros(16)
            for row in block:
                lanes = lanes + row
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = lanes[:half] + lanes[half:]
            total += float(lanes[0])
        totals.append(total)
    return totals


@kernels_only
@each_dtype
@pytest.mark.parametrize("size", [0, 5, 4_097, 2 * BLOCK + 21])
def test_sums_have_the_bits_of_the_stated_order(size: int, dtype: torch.dtype) -> None:
    weight = ordinary(size, dtype=dtype)
    for alpha in (1.0, 1.5):
        found = pp.statistics(weight, (), alpha)
        expected = in_order(pp.power(weight, alpha))
        assert [found.sum, found.sum_abs, found.sum_square] == expected
    mask = torch.rand(size) < 0.3
    found = pp.statistics(weight, within=pp.BitMask.pack(mask))
    expected = in_order(torch.where(mask, weight, 0.0))
    assert [found.sum, found.sum_abs, found.sum_square] == expected


@kernels_only
def test_dense_tensors_are_read_in_the_order_of_their_memory() -> None:
    weight, mask = ordinary(300, 401), torch.rand(300, 401) < 0.3
    bits, turned = pp.BitMask.pack(mask), pp.BitMask.pack(mask.t())
    assert pp.statistics(weight.t(), within=turned) == pp.statistics(weight, within=bits)
    # Others are read in row-major order.
    wide = torch.randn(300, 802)[:, ::2]
    assert pp.statistics(wide, [0.1], 1.5) == pp.statistics(wide.contiguous(), [0.1], 1.5)


@kernels_only
@each_dtype
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    weight = ordinary(11 * BLOCK + 77, dtype=dtype)
    within = pp.BitMask.pack(torch.rand(len(weight)) < 0.3)

    def found() -> list[pp.Statistics]:
        options = {"bins": 50, "range": (-1, 1)}
        return [
            pp.statistics(weight, EPSILONS, alpha, within=mask, **options)
            for alpha in (None, 1.25)
            for mask in (None, within)
        ]

    two = found()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert found() == two


@kernels_only
def test_many_bins() -> None:
    weight = torch.rand(100_000)
    for bins in (1, 2, 1_000, 100_003):
        check(pp.statistics(weight, bins=bins, range=(0, 1)), weight)


# ---- what Hypothesis finds


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), max_size=70),
    epsilons=st.lists(st.floats(min_value=0, allow_nan=False), max_size=9),
    alpha=st.sampled_from(ALPHAS),
    bins=st.integers(0, 40),
    ends=st.tuples(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30)).filter(
        lambda ends: abs(ends[0] - ends[1]) > 1e-290
    ),
)
def test_anything(
    values: list[float],
    epsilons: list[float],
    alpha: float,
    bins: int,
    ends: tuple[float, float],
) -> None:
    weight = torch.tensor(values, dtype=torch.float32)
    span = (min(ends), max(ends))
    check(pp.statistics(weight, epsilons, alpha, bins=bins, range=span), pp.power(weight, alpha))


# ---- the raw op, torch.compile


def raw_arguments(weight: Tensor, masked: bool) -> tuple[object, ...]:
    words = pp.pack_bits(torch.rand(weight.shape) < 0.5) if masked else None
    return weight, torch.tensor(1.5, dtype=torch.float64), [0.1, 0.2], 3, -1.0, 1.0, words


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "arrange",
    [lambda x: x, lambda x: x.permute(1, 0, 2), lambda x: x[:, ::2], lambda x: x[:0]],
    ids=["contiguous", "permuted", "step 2", "empty"],
)
def test_opcheck(arrange: Callable[[Tensor], Tensor], masked: bool) -> None:
    args = raw_arguments(arrange(ordinary(4, 6, 5)), masked)
    torch.library.opcheck(torch.ops.ppkernels.statistics.default, args)


def test_the_raw_op_compiles_and_the_function_leaves_the_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    raw = torch.compile(
        lambda *args: torch.ops.ppkernels.statistics(*args), fullgraph=True, backend=counter
    )
    weight, _, *rest = raw_arguments(ordinary(33), True)
    for alpha in (1.0, 1.5, 2.7):
        exponent = torch.tensor(alpha, dtype=torch.float64)
        expected = torch.ops.ppkernels.statistics(weight, exponent, *rest)
        for came, wanted in zip(raw(weight, exponent, *rest), expected, strict=True):
            assert torch.equal(came, wanted)
        if alpha == 1.0:
            counter.frame_count = 0
    assert counter.frame_count == 0
    around = torch.compile(lambda w: w * pp.statistics(w + 1).count, backend="aot_eager")
    assert torch.equal(around(weight), weight * 33)


def test_no_gradient_comes_through() -> None:
    weight = ordinary(5).requires_grad_()
    assert pp.statistics(weight, (), 1.5).count == 5
    assert not torch.ops.ppkernels.statistics(*raw_arguments(weight.detach(), False))[
        0
    ].requires_grad


def test_nothing_is_written() -> None:
    weight, before = ordinary(70_001), torch.empty(70_001)
    before.copy_(weight)
    version = weight._version
    pp.statistics(weight, EPSILONS, 1.5, bins=5, range=(0, 1))
    assert torch.equal(weight, before)
    assert weight._version == version


@pytest.mark.skipif(pp.cpu_capability() == "reference", reason="what the compiled kernels check")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, dtype=torch.int32)}, "tensors must be float32"),
        ({1: torch.tensor(0.5, dtype=torch.float64)}, "alpha must be a finite number >= 1"),
        ({1: torch.tensor(1.5)}, "alpha must be a 0-dim float64 tensor"),
        ({3: -1}, "bins must be a number from 0"),
        ({3: 2**31 - 1}, "bins must be a number from 0"),
        ({4: 1.0}, "low must be below high"),
        ({4: -math.inf}, "low must be below high"),
        ({4: math.nan}, "low must be below high"),
        ({6: torch.zeros(2, dtype=torch.uint8)}, "words must be a contiguous uint8"),
    ],
)
def test_the_raw_op_refuses_what_it_would_misread(change: dict[int, object], message: str) -> None:
    args = list(raw_arguments(ordinary(5), True))
    for place, value in change.items():
        args[place] = value
    with pytest.raises(RuntimeError, match=f"^statistics: {re.escape(message)}"):
        torch.ops.ppkernels.statistics(*args)
