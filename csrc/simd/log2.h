// log2 in float64, made of additions, multiplications and divisions that are each rounded by
// themselves: the same bits on every instruction set, and in plain PyTorch
// (ppkernels/ops/select/reference.py).
#pragma once

#include "simd/magnitude.h"

namespace ppkernels::PPKERNELS_ISA {

// log2(x) for x ≥ 0, within 4 ULP, exact for powers of two; −∞ for 0, ∞ for ∞, NaN for NaN.
//
// x = 2^e·m with m in [√½, √2); log2(m) = 2/ln(2)·atanh(s), s = (m − 1)/(m + 1), by the series of
// atanh up to s²¹, which is exact to float64 for |s| ≤ 3 − √8.
PPKERNELS_INLINE f64v log2(f64v x) {
  const u64v is_subnormal = (u64v)(x < f64v{} + 0x1p-1022);
  const u64v b = is_subnormal ? (u64v)(x * 0x1p54) : (u64v)x;
  // The mantissa in [½, 1) first.
  f64v m = (f64v)((b & 0x000fffffffffffffu) | 0x3fe0000000000000u);
  const u64v is_low = (u64v)(m < f64v{} + 0.7071067811865476);
  m = is_low ? m + m : m;
  const u64v exponent = (b >> 52) - 1022 - (is_subnormal & 54) - (is_low & 1);
  // An integer of few bits, made a float64 in the mantissa of 1.5·2^52.
  const f64v e = (f64v)(exponent + 0x4338000000000000u) - 0x1.8p52;
  const f64v s = (m - 1.0) / (m + 1.0);
  const f64v square = s * s;
  f64v series = f64v{} + 1.0 / 21;
  for (int n = 19; n > 0; n -= 2) series = series * square + 1.0 / n;
  const f64v result = e + s * series * 2.8853900817779268;
  const f64v infinity = f64v{} + __builtin_inf();
  return x == f64v{} ? -infinity : (x < infinity ? result : x);
}

}  // namespace ppkernels::PPKERNELS_ISA
