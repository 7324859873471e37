// Vectors of the instruction set that this translation unit is compiled for.
// Longer than 350 lines: what one instruction set lacks against another stands in one place.
//
// Arithmetic, comparisons, shifts and `mask ? a : b` are the compiler's own on vector types (GCC,
// Clang); this file adds what they lack. It is compiled once per instruction set, everything in a
// namespace of that set's name, so that code for one processor is never linked into the path of
// another. No standard-library templates here or in kernels/: the linker would merge theirs.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "simd/tables.h"

// For what is part of a loop's body: a call there costs more than the arithmetic.
#define PPKERNELS_INLINE __attribute__((always_inline)) inline

// A loop as a function of its own with all that it calls inside: there are many of them, and the
// compiler, left to itself, begins to call the formula for each vector.
#define PPKERNELS_LOOP __attribute__((noinline, flatten))

namespace ppkernels::PPKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(kLanes * 4)));
typedef int32_t i32v __attribute__((vector_size(kLanes * 4)));
typedef uint32_t u32v __attribute__((vector_size(kLanes * 4)));
typedef uint16_t u16v __attribute__((vector_size(kLanes * 2)));
// As wide as the others, so of half as many lanes.
typedef uint64_t u64v __attribute__((vector_size(kLanes * 4)));
typedef int64_t i64v __attribute__((vector_size(kLanes * 4)));
typedef double f64v __attribute__((vector_size(kLanes * 4)));

inline f32v splat(float x) { return f32v{} + x; }
inline u32v bits(f32v x) { return (u32v)x; }
inline f32v from_bits(u32v x) { return (f32v)x; }

constexpr uint32_t kSignBit = 0x80000000u;

inline f32v abs(f32v x) { return from_bits(bits(x) & ~kSignBit); }
// |magnitude| with the sign of `sign`; magnitude must not be negative.
inline f32v with_sign(f32v magnitude, f32v sign) {
  return from_bits(bits(magnitude) | (bits(sign) & kSignBit));
}

// a·b + c, rounded once.
inline f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF) || defined(FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
  f32v r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#elif defined(__SSE2__)
  // No such instruction: the product is exact in double, and the sum of it rounds to 53 bits first.
  // That second rounding can only matter for a result within 2^-29 of a tie.
  const __m128 x = (__m128)a, y = (__m128)b, z = (__m128)c;
  const __m128d low = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z));
  const __m128d high =
      _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(_mm_movehl_ps(x, x)), _mm_cvtps_pd(_mm_movehl_ps(y, y))),
                 _mm_cvtps_pd(_mm_movehl_ps(z, z)));
  return (f32v)_mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
#else
  f32v r;
  for (int i = 0; i < kLanes; ++i) r[i] = (float)((double)a[i] * b[i] + c[i]);
  return r;
#endif
}

// Four floats, whatever the instruction set.
typedef float f32x4 __attribute__((vector_size(16)));

inline float sum_of(f32x4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }

#if defined(__AVX2__) || defined(__AVX512F__)  // elsewhere that is f32v
inline f32x4 fma(f32x4 a, f32x4 b, f32x4 c) {
  return (f32x4)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
}
#endif

// The sum of the lanes of each of four vectors. Each is added up in the same order, so that it does
// not matter which of the four a vector is.
inline f32x4 sums_of(f32v a, f32v b, f32v c, f32v d) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
  const __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  const __m512 zw = _mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
  const __m512 all =
      _mm512_add_ps(_mm512_shuffle_ps(xy, zw, 0x44), _mm512_shuffle_ps(xy, zw, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return (f32x4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 x = (__m256)a, y = (__m256)b, z = (__m256)c, w = (__m256)d;
  const __m256 xy = _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
  const __m256 zw = _mm256_add_ps(_mm256_unpacklo_ps(z, w), _mm256_unpackhi_ps(z, w));
  const __m256 all =
      _mm256_add_ps(_mm256_shuffle_ps(xy, zw, 0x44), _mm256_shuffle_ps(xy, zw, 0xee));
  return (f32x4)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  f32x4 sums;
  const f32v in[4] = {a, b, c, d};
  for (int k = 0; k < 4; ++k) sums[k] = (in[k][0] + in[k][2]) + (in[k][1] + in[k][3]);
  return sums;
#endif
}

// Whether a comparison holds in some lane.
inline bool any(i32v lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= lanes[i];
  return found != 0;
#endif
}

// The square root, correctly rounded.
inline f32v sqrt(f32v x) {
#if defined(__AVX512F__)
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (f32v)_mm256_sqrt_ps((__m256)x);
#else
  f32v r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// A table of 16 floats that is looked up by the low four bits of each lane.
class Table {
 public:
  Table() = default;
  explicit Table(const float* values) {
#if defined(__AVX512F__)
    values_ = _mm512_loadu_ps(values);
#elif defined(__AVX2__)
    low_ = _mm256_loadu_ps(values);
    high_ = _mm256_loadu_ps(values + 8);
#else
    for (int i = 0; i < 16; ++i) values_[i] = values[i];
#endif
  }

  f32v operator[](u32v index) const {
#if defined(__AVX512F__)
    return (f32v)_mm512_permutexvar_ps((__m512i)index, values_);
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(low_, (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(high_, (__m256i)index);
    return (f32v)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
    f32v r;
    for (int i = 0; i < kLanes; ++i) r[i] = values_[index[i] & 15];
    return r;
#endif
  }

 private:
#if defined(__AVX512F__)
  __m512 values_;
#elif defined(__AVX2__)
  __m256 low_, high_;
#else
  float values_[16];
#endif
};

// x = 2^exponent · mantissa with mantissa in [1, 2), for finite x > 0, subnormal ones included.
struct Split {
  f32v exponent, mantissa;
};

inline Split split(f32v x) {
#if defined(__AVX512F__)
  return {(f32v)_mm512_getexp_ps((__m512)x),
          (f32v)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero)};
#else
  const i32v is_subnormal = x < splat(0x1p-126f);
  const u32v b = bits(is_subnormal ? x * 0x1p24f : x);
  const i32v exponent = (i32v)(b >> 23) - 127 - (is_subnormal & 24);
  return {__builtin_convertvector(exponent, f32v), from_bits((b & 0x007fffffu) | 0x3f800000u)};
#endif
}

// x · 2^floor(k), rounded once, for x in [2^-40, 2^16]; `floor_k` is floor(k) as an integer.
// Above the largest float: inf; below the smallest normal: the nearest subnormal or 0.
inline f32v scale(f32v x, f32v k, i32v floor_k) {
#if defined(__AVX512F__)
  (void)floor_k;
  return (f32v)_mm512_scalef_ps((__m512)x, (__m512)k);
#else
  (void)k;
  // In two factors, since 2^-149 and 2^128 have no float of their own; only the second can round.
  const i32v low = i32v{} - 250, high = i32v{} + 250;
  i32v n = floor_k < low ? low : floor_k;
  n = n > high ? high : n;
  const i32v half = n >> 1;
  const f32v first = from_bits((u32v)(half + 127) << 23);
  const f32v second = from_bits((u32v)(n - half + 127) << 23);
  return x * first * second;
#endif
}

// ---- element types

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class V, class T>
inline V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

inline f32v load(const float* p) { return load_bits<f32v>(p); }

inline float as_float(float x) { return x; }
inline float as_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline f32v load(const bf16* p) {
  return from_bits(__builtin_convertvector(load_bits<u16v>(p), u32v) << 16);
}

// One element in all lanes.
inline f32v splat(const float* p) { return splat(*p); }

inline f32v splat(const bf16* p) {
  // In both halves of each lane; the shift leaves the upper one.
  typedef uint16_t halves __attribute__((vector_size(kLanes * 4)));
  return from_bits((u32v)(halves{} + p->bits) << 16);
}

inline f32v load(const f16* p) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const u32v h = __builtin_convertvector(load_bits<u16v>(p), u32v);
  const u32v magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  const u32v finite = bits(from_bits(magnitude) * 0x1p112f);
  const i32v is_finite = magnitude < (0x7c00u << 13);
  return from_bits((is_finite ? finite : (magnitude | 0x7f800000u)) | ((h & 0x8000u) << 16));
#endif
}

// Ordinary stores go through the cache. Streaming ones go around it, so that memory is not read
// before it is overwritten; the address must be a multiple of the size of what is stored.
template <bool kStream, class V, class T>
inline void store_bits(T* p, V v) {
#if defined(__AVX512F__)
  if constexpr (kStream && sizeof(V) == 64) {
    _mm512_stream_si512((__m512i*)p, (__m512i)v);
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (kStream && sizeof(V) == 32) {
    _mm256_stream_si256((__m256i*)p, (__m256i)v);
    return;
  }
#endif
#if defined(__SSE2__)
  if constexpr (kStream && sizeof(V) == 16) {
    _mm_stream_si128((__m128i*)p, (__m128i)v);
    return;
  }
#endif
  __builtin_memcpy(p, &v, sizeof(V));
}

// Makes streaming stores visible to other threads.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <bool kStream>
inline void store(float* p, f32v x) {
  store_bits<kStream>(p, x);
}

template <bool kStream>
inline void store(bf16* p, f32v x) {
  const u32v b = bits(x);
  const u32v nearest_even = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const u32v result = x == x ? nearest_even : u32v{} + 0x7fc0u;
  store_bits<kStream>(p, __builtin_convertvector(result, u16v));
}

template <bool kStream>
inline void store(f16* p, f32v x) {
#if defined(__AVX512F__)
  store_bits<kStream>(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  store_bits<kStream>(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const u32v sign = bits(x) & kSignBit;
  const u32v b = bits(x) & ~kSignBit;
  // Adding 0.5 lines the last bit of a half subnormal up with the last bit of the sum.
  const u32v subnormal = bits(from_bits(b) + 0.5f) - 0x3f000000u;
  const u32v normal = (b - (112u << 23) + 0xfffu + ((b >> 13) & 1u)) >> 13;
  u32v h = b < (113u << 23) ? subnormal : normal;
  h = b >= (143u << 23) ? u32v{} + 0x7c00u : h;
  h = b > 0x7f800000u ? u32v{} + 0x7e00u : h;
  store_bits<kStream>(p, __builtin_convertvector(h | (sign >> 16), u16v));
#endif
}

// ---- masks of one bit an entry: entry i is bit i % 8 of byte i / 8

inline uint32_t bit(const uint8_t* words, int64_t i) { return (words[i >> 3] >> (i & 7)) & 1u; }

// The bits i ... i + count − 1, 0 < count <= kLanes, as the first ones of a mask for `lane_mask`;
// what stands behind them has no meaning. i must be a multiple of kLanes; of `words` only the bytes
// that hold these bits are read.
struct BitsOfLanes {
  uint8_t words[2];
};
inline BitsOfLanes bits_of_lanes(const uint8_t* words, int64_t i, int64_t count) {
  const uint8_t* p = words + (i >> 3);
  return {{(uint8_t)(p[0] >> (i & 7)), count > 8 ? p[1] : uint8_t(0)}};
}

// Lanes of all ones where the bits i ... i + kLanes − 1 are set, and of 0 elsewhere. i must be a
// multiple of kLanes; of `words` only the bytes that hold these bits are read.
inline i32v lane_mask(const uint8_t* words, int64_t i) {
#if defined(__AVX512F__)
  uint16_t word;
  __builtin_memcpy(&word, words + (i >> 3), sizeof(word));
  return (i32v)_mm512_movm_epi32(word);
#elif defined(__AVX2__)
  const i32v bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return ((i32v{} + words[i >> 3]) & bit) == bit;
#else
  const i32v bit = {1, 2, 4, 8};
  return ((i32v{} + (words[i >> 3] >> (i & 4))) & bit) == bit;
#endif
}

// The same for lanes of 64 bits; i must be a multiple of kLanes / 2.
inline u64v wide_lane_mask(const uint8_t* words, int64_t i) {
  const uint64_t word = words[i >> 3] >> (i & 7);
#if defined(__AVX512F__)
  return (u64v)_mm512_movm_epi64((__mmask8)word);
#elif defined(__AVX2__)
  const u64v bit = {1, 2, 4, 8};
  return (u64v)(((u64v{} + word) & bit) == bit);
#else
  return u64v{0 - (word & 1), 0 - ((word >> 1) & 1)};
#endif
}

// A bit for each of 16 bytes, set where the byte is not 0.
inline uint32_t nonzero_bits(const uint8_t* p) {
#if defined(__SSE2__)
  const __m128i is_zero = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i*)p), _mm_setzero_si128());
  return (uint32_t)_mm_movemask_epi8(is_zero) ^ 0xffffu;
#else
  uint32_t word = 0;
  for (int i = 0; i < 16; ++i) word |= (uint32_t)(p[i] != 0) << i;
  return word;
#endif
}

}  // namespace ppkernels::PPKERNELS_ISA
