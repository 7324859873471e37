// The loop over elements: whole vectors, then the remainder through a padded one.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// The first `count` < kLanes elements. The lanes behind them compute on zeros and are dropped, so
// that an element's bits do not depend on where in the tensor it stands.
template <class Point, class T, class... In>
inline void map_part(const Point& point, T* out, int64_t count, const In*... in) {
  const auto padded = [count](const auto* p) {
    T buffer[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
    return load(buffer);
  };
  T buffer[kLanes];
  store<false>(buffer, point(padded(in)...));
  for (int64_t i = 0; i < count; ++i) out[i] = buffer[i];
}

// out[i] = point(in[i]...) for i < n. `out` may be one of the inputs, but must not overlap one
// otherwise.
template <class Point, class T, class... In>
inline void map(const Point& point, T* out, int64_t n, const In*... in) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store<false>(out + i, point(load(in + i)...));
  if (i < n) map_part(point, out + i, n - i, (in + i)...);
}

// The same with stores that go around the cache; `out` must be no input.
template <class Point, class T, class... In>
inline void map_streaming(const Point& point, T* out, int64_t n, const In*... in) {
  constexpr int64_t kBytes = kLanes * sizeof(T);
  const int64_t misaligned = (int64_t)((uintptr_t)out % kBytes);
  int64_t i = misaligned == 0 ? 0 : (kBytes - misaligned) / (int64_t)sizeof(T);
  if (i > n) i = n;
  if (i > 0) map_part(point, out, i, in...);
  for (; i + kLanes <= n; i += kLanes) store<true>(out + i, point(load(in + i)...));
  if (i < n) map_part(point, out + i, n - i, (in + i)...);
  finish_streaming();
}

}  // namespace ppkernels::PPKERNELS_ISA
