// The loop over elements: whole vectors, then the remainder through a padded one.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// ---- which results are written: all of them, or those whose bit is set, and +0 for the others

struct All {
  static constexpr const uint8_t* words = nullptr;
  PPKERNELS_INLINE f32v of(f32v x, int64_t) const { return x; }
};

struct Masked {
  const uint8_t* words;
  // Of the vector of the elements from i on; i is a multiple of kLanes.
  PPKERNELS_INLINE f32v of(f32v x, int64_t i) const {
    return from_bits(bits(x) & (u32v)lane_mask(words, i));
  }
};

// ---- the loop

// The formula comes by value: what the stores might alias would be loaded again for each vector.

// The elements i ... i + count − 1, count < kLanes, of which `out` and `in` point at the first;
// `words` is null or the whole mask. The lanes behind them compute on zeros and are dropped, so
// that an element's bits do not depend on where in the tensor it stands.
template <class Point, class T, class... In>
PPKERNELS_LOOP void map_part(const Point point, const uint8_t* words, int64_t i, T* out,
                             int64_t count, const In*... in) {
  const auto padded = [count](const auto* p) {
    T buffer[kLanes] = {};
    for (int64_t k = 0; k < count; ++k) buffer[k] = p[k];
    return load(buffer);
  };
  f32v result = point(padded(in)...);
  if (words != nullptr) {
    const BitsOfLanes left = bits_of_lanes(words, i, count);
    result = Masked{left.words}.of(result, 0);
  }
  T buffer[kLanes];
  store<false>(buffer, result);
  for (int64_t k = 0; k < count; ++k) out[k] = buffer[k];
}

// out[i] = point(in[i]...) for i < n, and what `kept` leaves of it. `out` may be one of the inputs,
// but must not overlap one otherwise.
template <class Kept, class Point, class T, class... In>
PPKERNELS_LOOP void map(const Kept kept, const Point point, T* out, int64_t n, const In*... in) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store<false>(out + i, kept.of(point(load(in + i)...), i));
  if (i < n) map_part(point, kept.words, i, out + i, n - i, (in + i)...);
}

// The same with stores that go around the cache; `out` must be no input. With `Masked`, its address
// must be a multiple of 64, so that vectors and bytes of the mask begin at the same elements.
template <class Kept, class Point, class T, class... In>
PPKERNELS_LOOP void map_streaming(const Kept kept, const Point point, T* out, int64_t n,
                                  const In*... in) {
  constexpr int64_t kBytes = kLanes * sizeof(T);
  const int64_t misaligned = (int64_t)((uintptr_t)out % kBytes);
  int64_t i = misaligned == 0 ? 0 : (kBytes - misaligned) / (int64_t)sizeof(T);
  if (i > n) i = n;
  if (i > 0) map_part(point, kept.words, 0, out, i, in...);
  for (; i + kLanes <= n; i += kLanes) store<true>(out + i, kept.of(point(load(in + i)...), i));
  if (i < n) map_part(point, kept.words, i, out + i, n - i, (in + i)...);
  finish_streaming();
}

}  // namespace ppkernels::PPKERNELS_ISA
