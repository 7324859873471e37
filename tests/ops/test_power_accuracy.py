"""The compiled float32 kernels against exact results: how many ULP they err, and where.

A unit in the last place (ULP) is the spacing of float32 at the exact value,
2^(floor(log2|exact|) − 23). Below the normal range the unit is the smallest subnormal number, and
infinity counts as 2^128, where the floats end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import pytest
import torch

import ppkernels as pp

pytestmark = pytest.mark.skipif(
    pp.cpu_capability() == "reference",
    reason="the bounds are those of the compiled CPU kernels, which are not installed",
)

ALPHAS = (1.0, 1.0001, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.7, 4.0, 5.0, 6.3, 7.0, 8.0)
LARGEST = float(np.finfo(np.float32).max)
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
SMALLEST = 2.0**-149

Exact = Callable[[np.ndarray], np.ndarray]


def bits_near(value: float, distance: int) -> np.ndarray:
    """Bit patterns of the positive floats within ``distance`` steps of ``value``."""
    center = int(np.float32(value).view(np.int32))
    bits = np.arange(center - distance, center + distance + 1)
    return bits[(bits > 0) & (bits < 0x7F80_0000)].astype(np.int32)


def hard_inputs(exponent: float) -> np.ndarray:
    """At least 2^20 positive floats for x^exponent: every exponent, and the places that are hard.

    These are mantissas close to 1 and to 2, x close to 1, subnormals, and the x whose powers are
    the largest float and the smallest normal and subnormal ones.
    """
    random = np.random.default_rng(0)
    octaves = np.arange(0, 255, dtype=np.int64) << 23
    near_one = octaves[:, None] + np.arange(768)
    near_two = octaves[:, None] + (1 << 23) - 1 - np.arange(768)
    patterns = [
        (octaves[:, None] + random.integers(0, 1 << 23, (255, 2_048))).ravel(),
        near_one.ravel(),
        near_two.ravel(),
        random.integers(1, 1 << 23, 1 << 15),
        random.integers(0x3D00_0000, 0x4000_0000, 1 << 17),  # ordinary weights, 2^-5 to 2
        bits_near(1.0, 1 << 15),
    ]
    for result in (LARGEST, SMALLEST_NORMAL, SMALLEST):
        log2_x = np.log2(result) / exponent
        if -149 <= log2_x < 128:
            patterns.append(bits_near(2.0**log2_x, 1 << 12))
    x = np.concatenate(patterns).astype(np.int32).view(np.float32)
    assert len(x) >= 1 << 20
    return x[x > 0]


def spacing(exact: np.ndarray) -> np.ndarray:
    """The ULP of float32 at ``exact`` (positive, float64)."""
    exponent = np.frexp(exact)[1] - 1
    return np.ldexp(1.0, np.clip(exponent, -126, 127) - 23)


def errors_in_ulp(result: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors of positive float32 results; a NaN errs infinitely."""
    came = np.minimum(result.astype(np.float64), 2.0**128)
    errors = np.abs(came - np.minimum(exact, 2.0**128)) / spacing(exact)
    return np.where(np.isnan(errors), np.inf, errors)


def assert_within(
    bound: float, name: str, x: np.ndarray, result: np.ndarray, exact: np.ndarray
) -> float:
    """Errors are at most ``bound`` ULP; returns the largest."""
    errors = errors_in_ulp(result, exact)
    worst = int(errors.argmax())
    assert errors[worst] <= bound, (
        f"{name} on {pp.cpu_capability()}: {errors[worst]:.4f} ULP at {x[worst]!r} "
        f"({float(x[worst]).hex()}): got {result[worst]!r}, exact {exact[worst]!r}; "
        f"{(errors > bound).sum()} of {errors.size} results err by more than {bound} ULP"
    )
    return float(errors[worst])


def assert_oracle_agrees(
    x: np.ndarray, result: np.ndarray, exact: np.ndarray, exact_of: Callable[[mpmath.mpf], object]
) -> None:
    """The float64 oracle gives the errors of the 100 worst results as mpmath does."""
    errors = errors_in_ulp(result, exact)
    with mpmath.workprec(160):
        for i in np.argpartition(errors, -100)[-100:]:
            precise = abs(
                mpmath.mpf(min(float(result[i]), 2.0**128)) - exact_of(mpmath.mpf(float(x[i])))
            )
            precise /= float(spacing(exact[i : i + 1])[0])
            assert abs(float(precise) - errors[i]) < 1e-5


def run(op: Callable[..., torch.Tensor], x: np.ndarray, *exponents: float) -> np.ndarray:
    """The op's results for ``x``, as numpy; the results for −x must be their negatives."""
    weight = torch.from_numpy(x)
    result = op(weight, *exponents)
    assert torch.equal(op(-weight, *exponents), -result), "the op is not odd"
    return result.numpy()


CASES = [
    *[("power", (alpha,), alpha) for alpha in ALPHAS],
    *[("inverse_power", (alpha,), 1 / alpha) for alpha in (1.0, 1.1, 1.5, 2.0, 3.0, 3.7, 8.0)],
    *[
        ("rebase", (alpha, other), alpha / other)
        for alpha, other in ((1.0, 2.0), (1.1, 1.5), (2.0, 1.25), (1.375, 1.562), (8.0, 1.0))
    ],
]


@pytest.mark.parametrize(("name", "exponents", "exponent"), CASES, ids=lambda value: str(value))
def test_within_one_ulp(name: str, exponents: tuple[float, ...], exponent: float) -> None:
    x = hard_inputs(exponent)
    result = run(getattr(pp, name), x, *exponents)
    with np.errstate(over="ignore"):
        exact = np.power(x.astype(np.float64), exponent)
    assert_within(1, f"{name}{exponents}", x, result, exact)
    ratio = [mpmath.mpf(number) for number in exponents]

    def exact_of(magnitude: mpmath.mpf) -> object:
        if name == "power":
            return magnitude ** ratio[0]
        return magnitude ** (1 / ratio[0] if name == "inverse_power" else ratio[0] / ratio[1])

    is_normal = (exact >= SMALLEST_NORMAL) & (exact <= LARGEST)
    assert_oracle_agrees(x[is_normal], result[is_normal], exact[is_normal], exact_of)


# The bounds that csrc/simd/math.h states, by the largest exponent they hold for.
STATED = ((2.0, 0.65), (4.0, 0.75), (8.0, 0.95))


def test_random_exponents_stay_within_the_stated_bounds() -> None:
    random = np.random.default_rng(2)
    for exponent in random.uniform(0.125, 8, 300):
        bits = random.integers(1, 0x7F80_0000, 1 << 14, dtype=np.int32)
        ordinary = random.uniform(2.0**-6, 4, 1 << 13).astype(np.float32)
        x = np.concatenate([bits.view(np.float32), ordinary])
        op, alpha = (pp.power, exponent) if exponent >= 1 else (pp.inverse_power, 1 / exponent)
        with np.errstate(over="ignore"):
            exact = np.power(x.astype(np.float64), exponent if exponent >= 1 else 1 / alpha)
        is_normal = (exact >= SMALLEST_NORMAL) & (exact <= LARGEST)
        x, exact = x[is_normal], exact[is_normal]
        bound = next(bound for largest, bound in STATED if exponent <= largest)
        assert_within(bound, f"exponent {exponent!r}", x, run(op, x, alpha), exact)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_one_and_two_are_correctly_rounded(alpha: float) -> None:
    x = hard_inputs(alpha)
    with np.errstate(over="ignore", under="ignore"):
        exact = (x.astype(np.float64) ** alpha).astype(np.float32)
    assert np.array_equal(run(pp.power, x, alpha), exact)


# The gradient g·α|φ|^(α−1) is a power and two products. Where |φ|^(α−1) is a normal number the
# kernels err by at most 1.79 ULP over ALPHAS; plain PyTorch errs by up to 60 (α = 6.3). All
# instruction sets give the same numbers. Where |φ|^(α−1) is subnormal, kernels and plain PyTorch
# lose its lower bits.
BACKWARD_BOUND = 2.5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_backward(alpha: float) -> None:
    x = hard_inputs(max(alpha - 1, 1e-3))
    grad = np.random.default_rng(1).uniform(0.5, 2, x.size).astype(np.float32)
    weight, grad_theta = torch.from_numpy(x), torch.from_numpy(grad)
    result = pp.power_backward(grad_theta, weight, alpha).numpy()
    plain = pp.reference.power_backward(grad_theta, weight, alpha).numpy()
    with np.errstate(over="ignore"):
        power = np.power(x.astype(np.float64), alpha - 1)
        exact = grad * (alpha * power)
    is_normal = (power >= SMALLEST_NORMAL) & (alpha * power <= LARGEST)
    is_normal &= (exact >= SMALLEST_NORMAL) & (exact <= LARGEST)
    x, result, plain, exact = (a[is_normal] for a in (x, result, plain, exact))
    worst = assert_within(BACKWARD_BOUND, f"power_backward({alpha})", x, result, exact)
    assert worst <= 2 * errors_in_ulp(plain, exact).max() + 1


def positive_floats(chunk: int = 1 << 24) -> Iterator[np.ndarray]:
    for start in range(1, 0x7F80_0000, chunk):
        end = min(start + chunk, 0x7F80_0000)
        yield np.arange(start, end, dtype=np.int32).view(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.5, 3.3, 8.0])
def test_every_positive_float(alpha: float, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.getoption("-m").replace("not slow", ""):
        pytest.skip("2^31 floats for each alpha take minutes: run with -m slow")
    for x in positive_floats():
        result = pp.power(torch.from_numpy(x), alpha).numpy()
        with np.errstate(over="ignore"):
            exact = np.power(x.astype(np.float64), alpha)
        assert_within(1, f"power({alpha})", x, result, exact)
