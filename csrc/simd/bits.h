// The set bits of a word as a list of numbers.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

#if defined(__AVX512F__)
inline void store_first(int32_t* p, __m512i lanes, uint32_t count) {
  _mm512_mask_storeu_epi32(p, (__mmask16)((1u << count) - 1), lanes);
}
inline void store_first(uint16_t* p, __m512i lanes, uint32_t count) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), _mm512_cvtepi32_epi16(lanes));
}
#endif

// Writes base + b for each set bit b of `word`, ascending, from `out` on; nothing behind them is
// written. Returns where the list ends. T is int32_t or uint16_t, and the numbers fit.
template <class T>
PPKERNELS_INLINE T* list_bits(uint64_t word, uint32_t base, T* out) {
#if defined(__AVX512F__)
  const __m512i each = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (uint32_t b = 0; b < 64; b += 16) {
    const uint32_t lanes = (uint32_t)(word >> b) & 0xffffu;
    const __m512i numbers = _mm512_add_epi32(each, _mm512_set1_epi32((int)(base + b)));
    const uint32_t count = (uint32_t)__builtin_popcount(lanes);
    store_first(out, _mm512_maskz_compress_epi32((__mmask16)lanes, numbers), count);
    out += count;
  }
#else
  for (; word != 0; word &= word - 1) *out++ = (T)(base + (uint32_t)__builtin_ctzll(word));
#endif
  return out;
}

}  // namespace ppkernels::PPKERNELS_ISA
