// Square blocks of floats, transposed in registers.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// x[r][c] becomes x[c][r].
PPKERNELS_INLINE void transpose(f32v (&x)[kLanes]) {
#if defined(__AVX512F__)
  // Blocks of 4 × 4 within the quarters of four vectors, then the quarters themselves.
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 16; q += 4) {
    u[q] = _mm512_shuffle_ps(t[q], t[q + 2], 0x44);
    u[q + 1] = _mm512_shuffle_ps(t[q], t[q + 2], 0xee);
    u[q + 2] = _mm512_shuffle_ps(t[q + 1], t[q + 3], 0x44);
    u[q + 3] = _mm512_shuffle_ps(t[q + 1], t[q + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 lower_even = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 lower_odd = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    x[c] = (f32v)_mm512_shuffle_f32x4(even, lower_even, 0x88);
    x[4 + c] = (f32v)_mm512_shuffle_f32x4(odd, lower_odd, 0x88);
    x[8 + c] = (f32v)_mm512_shuffle_f32x4(even, lower_even, 0xdd);
    x[12 + c] = (f32v)_mm512_shuffle_f32x4(odd, lower_odd, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
  }
#pragma GCC unroll 2
  for (int q = 0; q < 8; q += 4) {
    u[q] = _mm256_shuffle_ps(t[q], t[q + 2], 0x44);
    u[q + 1] = _mm256_shuffle_ps(t[q], t[q + 2], 0xee);
    u[q + 2] = _mm256_shuffle_ps(t[q + 1], t[q + 3], 0x44);
    u[q + 3] = _mm256_shuffle_ps(t[q + 1], t[q + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c] = (f32v)_mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    x[4 + c] = (f32v)_mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
#elif defined(__SSE2__)
  __m128 rows[4] = {(__m128)x[0], (__m128)x[1], (__m128)x[2], (__m128)x[3]};
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  for (int r = 0; r < 4; ++r) x[r] = (f32v)rows[r];
#else
  for (int r = 0; r < kLanes; ++r) {
    for (int c = 0; c < r; ++c) {
      const float swapped = x[r][c];
      x[r][c] = x[c][r];
      x[c][r] = swapped;
    }
  }
#endif
}

}  // namespace ppkernels::PPKERNELS_ISA
