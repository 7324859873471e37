"""The power of a point in Triton, for the kernels of every room that needs it.

# Note [The power of a point]
|x|^e = 2^(e·log2|x|), in float32 and float64 with arithmetic, masks and shifts only: no approximate
instruction of one vendor, so what the interpreter runs is what a GPU runs. With |x| = 2^k·(1+f),
1+f in [√½, √2), and c = e·log2(e₁), e₁ Euler's number,

    e·log2|x| = e·k + c·ln(1+f),        ln(1+f) = f − f²/2 + f³·T(f)

The exponent of 2 reaches ±150 in float32 and must be right to 2^-25, so the large terms are kept
exact. e and c are cut into a high part with few bits and a rest; f likewise, so that
u = f_high − f_high²/2 has at most 14 bits; then e_high·k and c_high·u fit into 24 bits (53 in
float64). Products that fit are exact whether or not the compiler contracts a·b + c into one fused
operation, which GPUs do and the interpreter does not.
T and Q, 2^r = 1 + r·Q(r) on |r| ≤ 1/2, are least-maximum fits of the total error by weighted least
squares, coefficients rounded one after the other.

The half types keep 11 bits at most. For them the exponent of 2 is one float32, the polynomial of
the logarithm is shorter, and the power of 2 is `tl.exp2`, which NVIDIA and AMD each have an
instruction for, off by a few units in the last place of float32. By the formula above, arithmetic
and not memory would set their speed.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Single, double: max |f³·(T(f) − exact)| is 2^-32.5, 2^-64.1; max |r·(Q(r) − exact)| is 2^-28.2,
# 2^-57.8. Half: log2(1+f) = f·L(f), whose natural logarithm is off by 2^-21.3 at most.
_L_HALF = tl.constexpr(
    (1.442695, -0.7213475, 0.48066163, -0.35977414, 0.2958226, -0.2667136, 0.16802751)
)
_T_SINGLE = tl.constexpr(
    (0.333333, -0.2500001, 0.2000289, -0.16668536, 0.14206527)
    + (-0.12389608, 0.11958718, -0.11790287, 0.067370966)
)
_Q_SINGLE = tl.constexpr(
    (0.6931472, 0.2402265, 0.05550359, 0.009618077, 0.0013391325, 0.00015456395)
)
_T_DOUBLE = tl.constexpr(
    (0.3333333333333337, -0.250000000000008, 0.19999999999986784, -0.1666666666645052)
    + (0.14285714287288684, -0.12500000023259147, 0.11111111026031742, -0.0999999866411959)
    + (0.09090911180227224, -0.08333378921806232, 0.07692301055214801, -0.07141898526192154)
    + (0.06665778297820642, -0.06262221839594934, 0.05905155123729362, -0.05470104946859895)
    + (0.0500680516839795, -0.05203525518738886, 0.06116637198007283, -0.05443190869647689)
    + (0.02236433825404369,)
)
_Q_DOUBLE = tl.constexpr(
    (0.6931471805599453, 0.24022650695910122, 0.05550410866482268, 0.009618129107596744)
    + (0.001333355814623735, 0.00015403530454547712, 1.5252733965401137e-05)
    + (1.3215436320457341e-06, 1.0178014835963489e-07, 7.073633805766079e-09)
    + (4.4612709014154937e-10,)
)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Σ COEFFICIENTS[i]·x^i by Horner's rule."""
    y = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        y = y * x + COEFFICIENTS[DEGREE - i]
    return y


@triton.jit
def _bits(x):
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def _unsigned(x):
    if x.dtype == tl.int64:
        return x.to(tl.uint64, bitcast=True)
    else:
        return x.to(tl.uint32, bitcast=True)


@triton.jit
def _cut(x, LOW: tl.constexpr):
    """x with its LOW lowest mantissa bits cleared."""
    return (_bits(x) >> LOW << LOW).to(x.dtype, bitcast=True)


@triton.jit
def _split(value, DTYPE: tl.constexpr, LOW: tl.constexpr):
    """A float64 value as high + low in DTYPE; the LOW lowest mantissa bits of high are 0."""
    high = _cut(value.to(DTYPE), LOW)
    return high, (value - high.to(tl.float64)).to(DTYPE)


@triton.jit
def scaled_power(x, exponent, scale, PRECISE: tl.constexpr):
    """scale·|x|^exponent of float32 or float64 values; see Note [The power of a point].

    Args:
        x: a block of float32 or float64.
        exponent: float64, a scalar or a block like x; above 2^14 it acts as 2^14. Where it is not
            positive, 0 and inf are outside the function's range, but for the exponent 0 with a
            scale.
        scale: a float64 scalar, or None for 1. It is multiplied in before |x|^exponent can leave
            the range.
        PRECISE: False for values that came from a half type: fewer terms.

    |x| = 0, inf or NaN gives |x| itself, and ``scale`` where the exponent is 0. Where the exact
    value is normal, exponent in [0, 8]: float32 max 1.5 ULP (2 with a scale), float64 max 2 ULP,
    not PRECISE a relative error of at most 2^-16, and inf within that of the largest float32.
    Exponents 0 and 1 are exact where scale is 1, and 2 is correctly rounded if PRECISE. Subnormal
    values are rounded once more.
    """
    if exponent.type.is_block():
        power = _power(x, exponent, scale, PRECISE)
        if PRECISE:
            power = tl.where(exponent == 2.0, _scaled(x, scale) * tl.abs(x), power)
        power = tl.where(exponent == 1.0, _scaled(x, scale), power)
    # What all elements decide alike, none has to pay for.
    elif exponent == 1.0:
        power = _scaled(x, scale)
    elif PRECISE and exponent == 2.0:
        power = _scaled(x, scale) * tl.abs(x)
    else:
        power = _power(x, exponent, scale, PRECISE)
    return power


@triton.jit
def _scaled(x, scale):
    if scale is None:
        return tl.abs(x)
    else:
        return tl.abs(x) * scale.to(x.dtype)


@triton.jit
def exponent_and_mantissa(size):
    """k and 1+f with size = 2^k·(1+f), 1+f in [√½, √2), both in the type of size > 0, finite."""
    DTYPE: tl.constexpr = size.dtype
    DOUBLE: tl.constexpr = DTYPE == tl.float64
    MANTISSA: tl.constexpr = 52 if DOUBLE else 23
    ONE: tl.constexpr = 0x3FF0000000000000 if DOUBLE else 0x3F800000
    SQRT_HALF: tl.constexpr = 0x3FE6A09E667F3BCD if DOUBLE else 0x3F3504F3
    SMALLEST_NORMAL: tl.constexpr = 2.0**-1022 if DOUBLE else 2.0**-126
    # Subnormal numbers are scaled up to have a leading bit.
    raised = tl.where(size < SMALLEST_NORMAL, tl.full((), 2.0 ** (MANTISSA + 1), DTYPE), 1.0)
    shifted = _bits(size * raised) - _bits(raised) + (ONE - SQRT_HALF)
    k = (shifted >> MANTISSA).to(DTYPE)
    return k, ((shifted & ((1 << MANTISSA) - 1)) + SQRT_HALF).to(DTYPE, bitcast=True)


@triton.jit
def _power(x, exponent, scale, PRECISE: tl.constexpr):
    """`scaled_power` by the general formula."""
    DTYPE: tl.constexpr = x.dtype
    INFINITY: tl.constexpr = 0x7FF0000000000000 if DTYPE == tl.float64 else 0x7F800000
    size = tl.abs(x)
    k, near_one = exponent_and_mantissa(size)

    bounded = tl.minimum(exponent, 16384.0)
    if PRECISE:
        power = _power_of_2(k, near_one, bounded, scale)
    else:
        power = _short_power_of_2(k, near_one - 1.0, bounded, scale)
    special = size
    if scale is not None:
        special = tl.where(exponent == 0.0, scale.to(DTYPE), size)
    # 0, inf and NaN, in one comparison: 0 − 1 is the largest of the numbers without a sign.
    return tl.where(_unsigned(_bits(size) - 1) >= INFINITY - 1, special, power)


@triton.jit
def _power_of_2(k, near_one, exponent, scale):
    """scale·(2^k·near_one)^exponent, near_one in [√½, √2), with the large terms in two parts."""
    DTYPE: tl.constexpr = k.dtype
    DOUBLE: tl.constexpr = DTYPE == tl.float64
    MANTISSA: tl.constexpr = 52 if DOUBLE else 23
    BIAS: tl.constexpr = 1023 if DOUBLE else 127
    EXPONENT_BITS: tl.constexpr = 0x7FF0000000000000 if DOUBLE else 0x7F800000
    # A number this large has no bits behind the point: adding it rounds to an integer, which then
    # stands in its lowest bits, twice the bias of an exponent higher.
    ROUNDER: tl.constexpr = 1.5 * 2.0**MANTISSA + 2 * BIAS
    # Beyond 2^±LIMIT every result is 0 or infinite, and 2^(LIMIT/2) is still a normal number.
    LIMIT: tl.constexpr = 1200.0 if DOUBLE else 200.0
    T: tl.constexpr = _T_DOUBLE if DOUBLE else _T_SINGLE
    Q: tl.constexpr = _Q_DOUBLE if DOUBLE else _Q_SINGLE

    # e·log2|x| = high + low.
    c = (exponent * _LOG2_E).to(DTYPE)
    e_high, e_low = _split(exponent, DTYPE, 11 if DOUBLE else 8)
    c_high, c_low = _split(exponent * _LOG2_E, DTYPE, 28 if DOUBLE else 14)
    f = near_one - 1.0
    f_high = _cut(near_one, 39 if DOUBLE else 17) - 1.0
    slope = 1.0 - 0.5 * f_high  # exact
    u = f_high * slope  # exact
    cubic = f * f * f * _polynomial(f, T, 20 if DOUBLE else 8)
    rest = cubic + (f - f_high) * (slope - 0.5 * f)
    integral = e_high * k  # exact, and at least as large as the next, or 0
    fraction = c_high * u  # exact
    high = integral + fraction
    low = c * rest + (c_low * u + (e_low * k + (fraction - (high - integral))))

    # 2^(n+r), |r| ≤ 1/2; 2^n in two factors, so that subnormal and largest results come out.
    n = (high + low) + ROUNDER
    r = (high - (n - ROUNDER)) + low
    power = r * _polynomial(r, Q, 10 if DOUBLE else 5)
    if scale is None:
        power = power + 1.0
    else:
        scale_high, scale_low = _split(scale, DTYPE, 0)
        power = scale_high + (scale_high * power + scale_low)
    # As a plain float argument of tl.minimum the bound would be a float32.
    smallest, largest = tl.full((), ROUNDER - LIMIT, DTYPE), tl.full((), ROUNDER + LIMIT, DTYPE)
    n = _bits(tl.minimum(tl.maximum(n, smallest), largest))
    half = (n << (MANTISSA - 1)) & EXPONENT_BITS
    power = power * half.to(DTYPE, bitcast=True)
    return power * ((n << MANTISSA) - half).to(DTYPE, bitcast=True)


@triton.jit
def _short_power_of_2(k, f, exponent, scale):
    """scale·(2^k·(1 + f))^exponent of float32 to 2^-16 of the result."""
    # The root of the result, which stays in the range of normal numbers: NVIDIA's exp2 does not
    # give others, and the scale may bring the square back into the range.
    root = tl.exp2((f * _polynomial(f, _L_HALF, 6) + k) * (0.5 * exponent).to(tl.float32))
    if scale is None:
        return root * root
    else:
        return (root * scale.to(tl.float32)) * root


@triton.jit
def times_sign(y, x):
    """y, negated where the sign bit of x is set."""
    sign = _bits(x) ^ _bits(tl.abs(x))
    return (_bits(y) ^ sign).to(x.dtype, bitcast=True)


@triton.jit
def with_sign(size, x):
    """``size``, whose own sign bit is 0, with the sign bit of x."""
    sign = _bits(x) ^ _bits(tl.abs(x))
    return (_bits(size) | sign).to(x.dtype, bitcast=True)


@triton.jit
def signed_power(x, exponent, PRECISE: tl.constexpr):
    """sign(x)·|x|^exponent, exponent > 0; range and error of `scaled_power`."""
    return with_sign(scaled_power(x, exponent, None, PRECISE), x)
