// Powers of a point.
#pragma once

#include "simd/pack.h"
#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// Note [A power in two floats]
//
// |x|^e = 2^(e·log2|x|) loses 22 to 44 ULP over the range of float when log2|x|, up to 149 in size,
// is one float. So the logarithm is kept in two: `hi`, the integer exponent plus a table value of
// at most 15 fractional bits (their sum is exact), and `lo`, below 2^-4 in size, from a polynomial.
// The exponent e is two floats as well, and the error of the product e_hi·hi is recovered by an
// fma. What is left to round is the small part of the sum and the last addition.

// Where x is 0, inf or NaN; those lanes get junk below and are set apart by the caller.
inline i32v is_special(f32v magnitude) { return (i32v)(bits(magnitude) - 1u >= 0x7f7fffffu); }

// factor · x^exponent for finite x > 0, subnormals included; 2^-30 <= |exponent| <= 128, or 0.
// Wherever the exact value is a normal number and factor is 1:
//   exponent in (0, 2]: max 0.65 ULP      in [2, 4]: max 0.75 ULP      in [4, 8]: max 0.95 ULP
class Power {
 public:
  static constexpr double kLargestExponent = 128;
  static constexpr double kSmallestExponent = 0x1p-30;

  // Of no value until it is assigned one.
  Power() = default;
  Power(double exponent, double factor) : Power(exponent, Scaled(factor)) {}

  f32v operator()(f32v x) const {
    const Split s = split(x);
    const u32v interval = bits(s.mantissa) >> 19;
    const f32v r = fma(s.mantissa, inverse_[interval], splat(-1.0f));
    // The leading term last and by itself, so that only one rounding is as large as `lo`'s.
    f32v p = fma(splat(kLogPoly[4]), r, splat(kLogPoly[3]));
    p = fma(p, r, splat(kLogPoly[2]));
    p = fma(p, r, splat(kLogPoly[1]));
    const f32v hi = s.exponent + log_hi_[interval];
    const f32v lo = fma(splat(kLogPoly[0]), r, fma(p, r * r, log_lo_[interval]));

    // exponent · (hi + lo) = y + exponent_hi · lo + rest.
    const f32v y = exponent_hi_ * hi;
    const f32v rest = fma(exponent_lo_, hi, fma(exponent_hi_, hi, -y));

    // Adding 1.5·2^19 rounds to a multiple of 1/16, whose 16ths are then the low four bits.
    const f32v magic = splat(0x1.8p19f);
    const f32v shifted = fma(exponent_hi_, lo, y) + magic;
    const f32v k = shifted - magic;
    const f32v g = fma(exponent_hi_, lo, y - k) + rest;
    f32v q = fma(splat(kExpPoly[2]), g, splat(kExpPoly[1]));
    q = fma(q, g, splat(kExpPoly[0])) * g;
    const u32v sixteenth = bits(shifted);
    const f32v t = exp_hi_[sixteenth];
    const f32v power = t + fma(t, q, exp_lo_[sixteenth]);
    const i32v sixteenths = (i32v)(sixteenth - 0x49400000u);
    return scale(power, k, sixteenths >> 4);
  }

 private:
  // factor · 2^(i/16) in two floats.
  struct Scaled {
    explicit Scaled(double factor) {
      for (int i = 0; i < 16; ++i) {
        const double value = factor * kExp[i];
        hi[i] = (float)value;
        lo[i] = (float)(value - (double)hi[i]);
      }
    }
    float hi[16], lo[16];
  };

  Power(double exponent, const Scaled& scaled)
      : inverse_(kInverse), log_hi_(kLogHi), log_lo_(kLogLo), exp_hi_(scaled.hi),
        exp_lo_(scaled.lo), exponent_hi_(splat((float)exponent)),
        exponent_lo_(splat((float)(exponent - (double)(float)exponent))) {}

  Table inverse_, log_hi_, log_lo_, exp_hi_, exp_lo_;
  f32v exponent_hi_, exponent_lo_;
};

// factor · x^exponent for what is applied to something small: the logarithm is one float, the
// polynomials are short. |exponent| <= 3, finite x > 0, subnormals included; factor a normal
// number, of either sign; where the exact value is normal:
//   relative error at most 2^-20.5 + |exponent · log2 x| · 2^-24
class ShortPower {
 public:
  static constexpr double kLargestExponent = 3;

  explicit ShortPower(double exponent, double factor = 1)
      : ShortPower((float)exponent, Scaled(factor)) {}

  template <class V>
  PPKERNELS_INLINE V operator()(const V& x) const {
    const auto s = split_as(x);
    const auto interval = bits(s.mantissa) >> 19;
    const V r = fma(s.mantissa, at(inverse_, interval), splat(-1.0f));
    V p = fma(splat(kShortLogPoly[2]), r, splat(kShortLogPoly[1]));
    p = fma(p, r, splat(kShortLogPoly[0]));
    const V log2 = s.exponent + fma(p, r, at(log_, interval));

    const f32v magic = splat(0x1.8p19f);
    const V shifted = fma(exponent_, log2, magic);
    const V k = shifted - magic;
    const V g = fma(exponent_, log2, splat(0.0f) - k);
    const V q = fma(splat(kShortExpPoly[1]), g, splat(kShortExpPoly[0])) * g;
    const auto sixteenth = bits(shifted);
    const V t = at(exp_, sixteenth);
    return scaled(fma(t, q, t), k, sixteenth);
  }

 private:
  // factor · 2^(i/16).
  struct Scaled {
    explicit Scaled(double factor) {
      for (int i = 0; i < 16; ++i) values[i] = (float)(factor * kExp[i]);
    }
    float values[16];
  };

  ShortPower(float exponent, const Scaled& scaled)
      : inverse_(kInverse), log_(kLog), exp_(scaled.values), exponent_(splat(exponent)) {}

  struct PackSplit {
    Pack<f32v> exponent, mantissa;
  };
  PPKERNELS_INLINE static Split split_as(f32v x) { return split(x); }
  PPKERNELS_INLINE static PackSplit split_as(const Pack<f32v>& x) {
    PackSplit s;
    for (int i = 0; i < kPack; ++i) {
      const Split one = split(x.v[i]);
      s.exponent.v[i] = one.exponent;
      s.mantissa.v[i] = one.mantissa;
    }
    return s;
  }

  PPKERNELS_INLINE static f32v at(const Table& table, u32v index) { return table[index]; }
  PPKERNELS_INLINE static Pack<f32v> at(const Table& table, const Pack<u32v>& index) {
    Pack<f32v> x;
    for (int i = 0; i < kPack; ++i) x.v[i] = table[index.v[i]];
    return x;
  }

  // x · 2^floor(k); `sixteenth` is k in sixteenths above the bits of 1.5·2^19.
  PPKERNELS_INLINE static f32v scaled(f32v x, f32v k, u32v sixteenth) {
    return scale(x, k, (i32v)(sixteenth - 0x49400000u) >> 4);
  }
  PPKERNELS_INLINE static Pack<f32v> scaled(const Pack<f32v>& x, const Pack<f32v>& k,
                                            const Pack<u32v>& sixteenth) {
    return each([](f32v a, f32v b, u32v c) { return scaled(a, b, c); }, x, k, sixteenth);
  }

  Table inverse_, log_, exp_;
  f32v exponent_;
};

}  // namespace ppkernels::PPKERNELS_ISA
