"""Triton: the key that an entry is ranked by, an integer that orders as |θ| does.

The keys, by their number of bits KEY:

    15       the bits of |x| of a half type
    31, 63   the bits of |x| as float32 or float64, so that weights of several types compare
    64       the bits of α·log2|x| in float64, sorted: where exponents differ

Those of 64 bits are the reference's bit for bit, so kernels are compiled without contraction of
products and sums (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ppkernels.ops._point import exponent_and_mantissa
from ppkernels.ops.select.reference import TERMS, TWO_OVER_LN2

_TERMS = tl.constexpr(TERMS)
_LAST_TERM = tl.constexpr(len(TERMS) - 1)
_TWO_OVER_LN2 = tl.constexpr(TWO_OVER_LN2)


@triton.jit
def _log2(size):
    """log2 of float64 numbers by the formula of the reference, bit for bit; not of 0, inf, NaN."""
    exponent, mantissa = exponent_and_mantissa(size)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = tl.full(s.shape, _TERMS[_LAST_TERM], tl.float64)
    for i in tl.static_range(1, _LAST_TERM + 1):
        series = series * square + _TERMS[_LAST_TERM - i]
    return exponent + s * series * _TWO_OVER_LN2


@triton.jit
def _single_bits(stored, TYPE: tl.constexpr):
    """The bits of |x| as float32; half types are widened without arithmetic, or as numbers > 0."""
    if TYPE == tl.float32:
        bits = stored & 0x7FFFFFFF
    elif TYPE == tl.bfloat16:
        bits = (stored.to(tl.int32) & 0x7FFF) << 16
    else:
        size = (stored & 0x7FFF).to(tl.float16, bitcast=True).to(tl.float32)
        bits = size.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _double_bits(stored, TYPE: tl.constexpr):
    """The bits of |x| as float64."""
    if TYPE == tl.float64:
        bits = stored & 0x7FFFFFFFFFFFFFFF
    else:
        size = _single_bits(stored, TYPE).to(tl.float32, bitcast=True).to(tl.float64)
        bits = size.to(tl.int64, bitcast=True)
    return bits


@triton.jit
def _ordered(bits, alpha):
    """The sorted bits of α·log2|x|, of the bits of |x| as float64."""
    size = bits.to(tl.float64, bitcast=True)
    key = (alpha * _log2(size)).to(tl.int64, bitcast=True)
    # A negative number is the smaller, the larger its other bits are.
    key = key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)
    key = tl.where(bits == 0, -0x7FF0000000000001, key)
    return tl.where(bits >= 0x7FF0000000000000, bits, key)


@triton.jit
def key_of(stored, alpha, TYPE: tl.constexpr, KEY: tl.constexpr):
    """The keys of what is stored, given as integers; see above."""
    if KEY == 15:
        key = stored.to(tl.int32) & 0x7FFF
    elif KEY == 31:
        key = _single_bits(stored, TYPE)
    elif KEY == 63:
        key = _double_bits(stored, TYPE)
    else:
        key = _ordered(_double_bits(stored, TYPE), alpha)
    return key


@triton.jit
def infinity_key(TYPE: tl.constexpr, KEY: tl.constexpr):
    """The key of infinity, above which there is NaN alone."""
    if KEY > 31:
        infinity = 0x7FF0000000000000
    elif KEY == 15 and TYPE == tl.float16:
        infinity = 0x7C00
    elif KEY == 15:
        infinity = 0x7F80
    else:
        infinity = 0x7F800000
    return infinity


@triton.jit
def no_key(KEY: tl.constexpr):
    """The key of what may not be kept."""
    return -0x8000000000000000 if KEY == 64 else -1
