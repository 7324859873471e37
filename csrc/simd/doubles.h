// Vectors of doubles, as wide as those of vec.h, so of half as many lanes; and, for loops over
// floats or doubles, which vectors an element type is computed in.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

constexpr int kDoubles = kLanes / 2;

inline f64v splat_double(double x) { return f64v{} + x; }
inline u64v bits(f64v x) { return (u64v)x; }
inline f64v abs(f64v x) { return (f64v)(bits(x) & 0x7fffffffffffffffull); }

inline f64v load(const double* p) { return load_bits<f64v>(p); }

// The lanes of x as doubles, in order.
PPKERNELS_INLINE void widen(f32v x, f64v* out) {
#if defined(__AVX512F__)
  out[0] = (f64v)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  out[1] = (f64v)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
  out[0] = (f64v)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  out[1] = (f64v)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#elif defined(__SSE2__)
  out[0] = (f64v)_mm_cvtps_pd((__m128)x);
  out[1] = (f64v)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
#else
  for (int i = 0; i < kLanes; ++i) out[i / kDoubles][i % kDoubles] = x[i];
#endif
}
PPKERNELS_INLINE void widen(f64v x, f64v* out) { out[0] = x; }

// Lane by lane the lesser, and the greater; with a NaN, or of two zeros, either of the two.
inline f32v lesser(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline f32v greater(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline f64v lesser(f64v a, f64v b) {
#if defined(__AVX512F__)
  return (f64v)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (f64v)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}
inline f64v greater(f64v a, f64v b) {
#if defined(__AVX512F__)
  return (f64v)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (f64v)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// ---- the vectors that an element type is computed in

// Sizes can be compared as integers, which orders them as their values, and puts NaN above them
// all.
struct FloatLanes {
  using V = f32v;
  using I = i32v;
  using Integer = int32_t;
  static constexpr int kCount = kLanes;
  static constexpr Integer kAboveInfinity = 0x7f800001;

  static V splat(float x) { return V{} + x; }
  PPKERNELS_INLINE static I kept(const uint8_t* words, int64_t i) { return lane_mask(words, i); }

  // The integer of the least float32 that is no less than ε, for ε > 0.
  static Integer limit(double epsilon) {
    const float nearest = (float)epsilon;
    Integer result;
    __builtin_memcpy(&result, &nearest, sizeof(result));
    return (double)nearest < epsilon ? result + 1 : result;
  }
};

struct DoubleLanes {
  using V = f64v;
  using I = i64v;
  using Integer = int64_t;
  static constexpr int kCount = kDoubles;
  static constexpr Integer kAboveInfinity = 0x7ff0000000000001;

  static V splat(double x) { return V{} + x; }
  PPKERNELS_INLINE static I kept(const uint8_t* words, int64_t i) {
    return (I)wide_lane_mask(words, i);
  }

  static Integer limit(double epsilon) {
    Integer result;
    __builtin_memcpy(&result, &epsilon, sizeof(result));
    return result;
  }
};

template <class T>
struct LanesOf {
  using Type = FloatLanes;
};
template <>
struct LanesOf<double> {
  using Type = DoubleLanes;
};

}  // namespace ppkernels::PPKERNELS_ISA
