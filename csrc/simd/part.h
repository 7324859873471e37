// Parts of vectors, and vectors taken apart: rows of images, whose length is no multiple of the
// lanes.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// ---- a part of a vector

// The first `count` elements at p, 0 <= count <= kLanes, and zeros behind them; no other is read.
inline f32v load_first(const float* p, int64_t count) {
  if (count == kLanes) return load(p);
#if defined(__AVX512F__)
  return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(__AVX2__)
  const i32v lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (f32v)_mm256_maskload_ps(p, (__m256i)(lane < (int32_t)count));
#else
  float buffer[kLanes] = {};
  for (int64_t k = 0; k < count; ++k) buffer[k] = p[k];
  return load(buffer);
#endif
}

inline f32v load_first(const bf16* p, int64_t count) {
  if (count == kLanes) return load(p);
#if defined(__AVX512F__)
  const __m256i halves = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
  return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  bf16 buffer[kLanes] = {};
  for (int64_t k = 0; k < count; ++k) buffer[k] = p[k];
  return load(buffer);
#endif
}

// The first `count` lanes, 0 <= count <= kLanes; nothing else is written.
inline void store_first(float* p, f32v x, int64_t count) {
  if (count == kLanes) return store<false>(p, x);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x);
#elif defined(__AVX2__)
  const i32v lane = {0, 1, 2, 3, 4, 5, 6, 7};
  _mm256_maskstore_ps(p, (__m256i)(lane < (int32_t)count), (__m256)x);
#else
  for (int64_t k = 0; k < count; ++k) p[k] = x[k];
#endif
}

inline void store_first(bf16* p, f32v x, int64_t count) {
  if (count == kLanes) return store<false>(p, x);
  bf16 buffer[kLanes];
  store<false>(buffer, x);
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256((const __m256i*)buffer);
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), halves);
#else
  for (int64_t k = 0; k < count; ++k) p[k] = buffer[k];
#endif
}

// ---- two vectors side by side, as one of twice the lanes

// Every second lane of them: 0, 2, 4, ...
inline f32v every_second(f32v a, f32v b) {
#if defined(__AVX512F__)
  const i32v lanes = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return (f32v)_mm512_permutex2var_ps((__m512)a, (__m512i)lanes, (__m512)b);
#elif defined(__AVX2__)
  const __m256 halves = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (f32v)_mm256_permute4x64_pd((__m256d)halves, 0xd8);
#else
  f32v r;
  for (int i = 0; i < kLanes; ++i) r[i] = 2 * i < kLanes ? a[2 * i] : b[2 * i - kLanes];
  return r;
#endif
}

// The lanes of a and b in turn: a0, b0, a1, b1, ...
struct Interleaved {
  f32v low, high;
};
inline Interleaved interleaved(f32v a, f32v b) {
#if defined(__AVX512F__)
  const i32v low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return {(f32v)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b),
          (f32v)_mm512_permutex2var_ps((__m512)a, (__m512i)(low + 8), (__m512)b)};
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b);
  const __m256 high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return {(f32v)_mm256_permute2f128_ps(low, high, 0x20),
          (f32v)_mm256_permute2f128_ps(low, high, 0x31)};
#else
  Interleaved r;
  for (int i = 0; i < kLanes / 2; ++i) {
    r.low[2 * i] = a[i];
    r.low[2 * i + 1] = b[i];
    r.high[2 * i] = a[kLanes / 2 + i];
    r.high[2 * i + 1] = b[kLanes / 2 + i];
  }
  return r;
#endif
}

}  // namespace ppkernels::PPKERNELS_ISA
