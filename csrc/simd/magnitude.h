// Magnitudes as integers: the bits of a number without its sign order as |x| does, NaN above ∞.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// What stands for the bits of an element type.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t U;
  static constexpr U kInf = 0x7f800000u;
};
template <>
struct BitsOf<double> {
  typedef uint64_t U;
  static constexpr U kInf = 0x7ff0000000000000u;
};
template <>
struct BitsOf<bf16> {
  typedef uint16_t U;
  static constexpr U kInf = 0x7f80u;
};
template <>
struct BitsOf<f16> {
  typedef uint16_t U;
  static constexpr U kInf = 0x7c00u;
};

// Signed, since magnitudes are not negative, and AVX2 compares no other integers.
typedef int16_t i16w __attribute__((vector_size(kLanes * 4)));
inline i16w lanes_of(uint16_t x) { return i16w{} + (int16_t)x; }
inline i32v lanes_of(uint32_t x) { return i32v{} + (int32_t)x; }
inline i64v lanes_of(uint64_t x) { return i64v{} + (int64_t)x; }

// A bit for each lane, the first lane's the lowest: whether x < y there. Both must be magnitudes.
inline uint64_t bits_below(i32v x, i32v y) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)(x < y));
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)(x < y));
#else
  uint64_t word = 0;
  for (int i = 0; i < kLanes; ++i) word |= (uint64_t)(x[i] < y[i]) << i;
  return word;
#endif
}

inline uint64_t bits_below(i64v x, i64v y) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi64_mask((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_pd((__m256d)(x < y));
#elif defined(__SSE2__)
  // There is no comparison of these; but a difference of magnitudes cannot overflow.
  return (uint32_t)_mm_movemask_pd((__m128d)(x - y));
#else
  uint64_t word = 0;
  for (int i = 0; i < kLanes / 2; ++i) word |= (uint64_t)(x[i] < y[i]) << i;
  return word;
#endif
}

inline uint64_t bits_below(i16w x, i16w y) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi16_mask((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  const __m256i below = (__m256i)(x < y);
  const uint32_t twice = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(below, below));
  return (twice & 0xffu) | ((twice >> 8) & 0xff00u);
#elif defined(__SSE2__)
  const __m128i below = (__m128i)(x < y);
  return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(below, _mm_setzero_si128()));
#else
  uint64_t word = 0;
  for (int i = 0; i < kLanes * 2; ++i) word |= (uint64_t)(x[i] < y[i]) << i;
  return word;
#endif
}

// How many elements are compared at once: a bit each.
constexpr int kWord = 64;

// Compares the magnitudes of 64 elements at p with `least`: bit i is whether that of p[i] is as
// large or larger.
template <class U>
PPKERNELS_INLINE uint64_t bits_at_least(const U* p, U least) {
  const auto bound = lanes_of(least), magnitude = lanes_of((U)(U(-1) >> 1));
  typedef decltype(lanes_of(least)) V;
  constexpr int kStep = (int)(sizeof(V) / sizeof(U));
  uint64_t below = 0;
  for (int i = 0; i < kWord; i += kStep) {
    below |= bits_below(load_bits<V>(p + i) & magnitude, bound) << i;
  }
  return ~below;
}

// Remembers whether one of the magnitudes that it has seen belongs to a NaN.
template <class T>
class NanWatch {
 public:
  typedef typename BitsOf<T>::U U;

  PPKERNELS_INLINE void see(const U* p) {
    const V magnitude = lanes_of((U)(U(-1) >> 1)), inf = lanes_of(BitsOf<T>::kInf);
    for (int i = 0; i < kWord; i += (int)(sizeof(V) / sizeof(U))) {
      differences_ |= inf - (load_bits<V>(p + i) & magnitude);
    }
  }
  // Negative is what is above infinity.
  bool has_seen() const {
    for (unsigned i = 0; i < sizeof(V) / sizeof(U); ++i) {
      if (differences_[i] < 0) return true;
    }
    return false;
  }

 private:
  typedef decltype(lanes_of(U(0))) V;
  V differences_ = {};
};

}  // namespace ppkernels::PPKERNELS_ISA
