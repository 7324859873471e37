// Float values of the test programs: drawn, special, and compared bit by bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ppkernels_test {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The values of the half types, float16 and bfloat16.
inline double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa != 0 ? double(kNaN) : sign * double(kInf);
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

inline double bfloat_value(uint16_t bits) { return double(from_bits(uint32_t(bits) << 16)); }

// The same value, counting NaNs as equal and 0 and -0 as different.
inline bool same(float a, float b) { return to_bits(a) == to_bits(b) || (a != a && b != b); }

// A reproducible stream of numbers.
struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  float centered() { return float(next()) / 4294967296.0f - 0.5f; }
};

}  // namespace ppkernels_test
