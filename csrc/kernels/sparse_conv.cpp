// Compiled once per instruction set (CMakeLists.txt), each in its own namespace.
#include "kernels/sparse_conv.h"

#include "kernels/panel.h"
#include "simd/part.h"

namespace ppkernels::PPKERNELS_ISA {
namespace {

// Vectors in registers beside those of the entry at hand.
#if defined(__AVX512F__)
constexpr int kAccumulate = 14, kSample = 14;
#elif defined(__AVX2__)
constexpr int kAccumulate = 12, kSample = 8;
#else
constexpr int kAccumulate = 8, kSample = 8;
#endif

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- images into planes

template <class T, class To>
PPKERNELS_INLINE void copy(To* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store<false>(to + i, load(from + i));
  if (i < n) store_first(to + i, load_first(from + i, n - i), n - i);
}

// to[i] = from[2·i]
template <class T>
PPKERNELS_INLINE void copy_every_second(float* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = 2 * (n - i) - 1;
    const f32v a = load_first(from + 2 * i, least(left, kLanes));
    f32v b = {};
    if (left > kLanes) b = load_first(from + 2 * i + kLanes, least(left - kLanes, kLanes));
    store_first(to + i, every_second(a, b), least(n - i, kLanes));
  }
}

template <class T>
PPKERNELS_INLINE void copy_with_step(float* to, const T* from, int64_t n, int64_t step) {
  if (step == 1) return copy(to, from, n);
  if (step == 2) return copy_every_second(to, from, n);
  for (int64_t i = 0; i < n; ++i) to[i] = splat(from + i * step)[0];
}

// The positions of a phase that lie in the image, from `begin` to `end`.
struct Inside {
  Inside(const PlaneAxis& axis, int64_t phase) : first(axis.first + phase) {
    begin = first < 0 ? least(axis.span, (-first + axis.step - 1) / axis.step) : 0;
    const int64_t left = axis.size - first;
    end = left > 0 ? least(axis.span, (left + axis.step - 1) / axis.step) : 0;
    end = largest(begin, end);
  }
  int64_t first, begin, end;
};

template <class T>
PPKERNELS_LOOP void pack_plane(const Planes& p, const T* source, int64_t images, int64_t y,
                               int64_t rows, int64_t y_phase, int64_t x_phase, float* to) {
  const Inside inside_y(p.y, y_phase), inside_x(p.x, x_phase);
  const int64_t begin = largest(inside_y.begin, y), end = least(inside_y.end, y + rows);
  const int64_t count = inside_x.end - inside_x.begin;
  __builtin_memset(to, 0, (size_t)p.plane * sizeof(float));
  if (count <= 0) return;
  source += inside_x.first + inside_x.begin * p.x.step;
  to += inside_x.begin;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = source + image * p.source_image + (inside_y.first + i * p.y.step) * p.x.size;
      copy_with_step(to + image * p.image + (i - y) * p.pitch, row, count, p.x.step);
    }
  }
}

template <class T>
void pack_of(const Planes& p, const void* source, int64_t images, int64_t y, int64_t rows,
             float* to) {
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* channel = (const T*)source + c * p.y.size * p.x.size;
    for (int64_t f = 0; f < p.y.phases; ++f) {
      for (int64_t h = 0; h < p.x.phases; ++h) {
        pack_plane(p, channel, images, y, rows, f, h, to);
        to += p.plane;
      }
    }
  }
}

void pack_entry(const Planes& planes, Type type, const void* source, int64_t images, int64_t y,
                int64_t rows, float* to) {
  if (type == Type::kBFloat16) return pack_of<bf16>(planes, source, images, y, rows, to);
  pack_of<float>(planes, source, images, y, rows, to);
}

// ---- lines into images

// The pixels of `phases` lines of one image row, `line` floats apart: pixel h + step·j is number j
// of line h. From j = begin on, and fewer than end; `width` pixels are in the image row.
template <class T>
PPKERNELS_INLINE void write_row(T* out, const float* lines, int64_t line, int64_t phases,
                                int64_t step, int64_t begin, int64_t end, int64_t width) {
  if (step == 1) return copy(out + begin, lines + begin, least(end, width) - begin);
  if (step == 2 && phases == 2) {
    const int64_t last = least(2 * end, width);
    for (int64_t j = begin; 2 * j < last; j += kLanes) {
      const Interleaved both = interleaved(load(lines + j), load(lines + line + j));
      const int64_t left = last - 2 * j;
      store_first(out + 2 * j, both.low, least(left, kLanes));
      if (left > kLanes) store_first(out + 2 * j + kLanes, both.high, least(left - kLanes, kLanes));
    }
    return;
  }
  for (int64_t h = 0; h < phases; ++h) {
    for (int64_t j = begin; j < end && h + step * j < width; ++j)
      copy(out + h + step * j, lines + h * line + j, 1);
  }
}

// What a pass, whose first position is `first`, has of the rows of one channel and y-phase.
template <class T>
PPKERNELS_INLINE void write_pass(const Pixels& p, int64_t channel, int64_t y_phase,
                                 const float* lines, int64_t line, int64_t first) {
  T* out = (T*)p.out + channel * p.height * p.width;
  const int64_t across = (p.width + p.x_step - 1) / p.x_step;
  for (int64_t image = 0; image < p.images; ++image) {
    // Rows that end before the pass are passed over.
    const int64_t before = first - image * p.image - across;
    int64_t i = before < 0 ? 0 : before / p.pitch + 1;
    int64_t position = image * p.image + i * p.pitch - first;
    for (; i < p.rows; ++i, position += p.pitch) {
      const int64_t y = y_phase + p.y_step * (p.y + i);
      const int64_t begin = largest(0, -position), end = least(across, line - position);
      if (y >= p.height || end <= 0) break;
      if (begin >= end) continue;
      T* row = out + (image * p.channels * p.height + y) * p.width;
      write_row(row, lines + position, line, p.x_phases, p.x_step, begin, end, p.width);
    }
  }
}

// ---- rows of entries times a pass

template <int V>
PPKERNELS_INLINE void accumulate_row(const Entries& entries, const float* operands,
                                     const float* from, float start, int64_t begin, int64_t end,
                                     float* to) {
  Sums<V, (V < 8 ? 2 : 1)> sums;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sums.even[v] = from ? load(from + v * kLanes) : splat(start);
  accumulate(sums, Strided<int32_t>{operands, entries.addresses, 1}, Direct<float>{entries.values},
             begin, end);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store<false>(to + v * kLanes, sums[v]);
}

template <int V, class T>
PPKERNELS_LOOP void correlate_pass(const Entries& entries, const float* planes, int64_t first,
                                   const Pixels& pixels, const float* bias, int64_t begin,
                                   int64_t end, float* stage) {
  constexpr int64_t kLine = V * kLanes;
  const int64_t phases = pixels.x_phases, rows = pixels.y_phases * phases;
  for (int64_t b = 0; b < entries.blocks; ++b) {
    const bool is_first = b == 0, is_last = b + 1 == entries.blocks;
    for (int64_t c = begin; c < end; ++c) {
      float* lines = entries.blocks == 1 ? stage : stage + (c - begin) * rows * kLine;
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* segment = entries.segments + (c * rows + r) * (entries.blocks + 1) + b;
        float* line = lines + r * kLine;
        accumulate_row<V>(entries, planes + first, is_first ? nullptr : line, bias ? bias[c] : 0.f,
                          segment[0], segment[1], line);
      }
      if (!is_last) continue;
      for (int64_t f = 0; f < pixels.y_phases; ++f)
        write_pass<T>(pixels, c, f, lines + f * phases * kLine, kLine, first);
    }
  }
}

// body(std::integral_constant-like value) for a count of vectors known at compile time.
template <int V>
struct Count {
  static constexpr int value = V;
};
template <int kMost, class Body>
PPKERNELS_INLINE void with_count(int64_t vectors, const Body& body) {
  if constexpr (kMost > 1) {
    if (vectors < kMost) return with_count<kMost - 1>(vectors, body);
  }
  body(Count<kMost>());
}

template <class T>
void correlate_of(const Entries& entries, const float* planes, const Line& line,
                  const Pixels& pixels, const float* bias, int64_t begin, int64_t end,
                  float* stage) {
  with_count<kAccumulate>(line.vectors, [&](auto count) {
    constexpr int V = decltype(count)::value;
    for (int64_t pass = 0; pass < line.passes; ++pass) {
      correlate_pass<V, T>(entries, planes, pass * V * kLanes, pixels, bias, begin, end, stage);
    }
  });
}

void correlate_entry(const Entries& entries, const float* planes, const Line& line,
                     const Pixels& pixels, const float* bias, int64_t begin, int64_t end,
                     float* stage) {
  if (pixels.type == Type::kBFloat16)
    return correlate_of<bf16>(entries, planes, line, pixels, bias, begin, end, stage);
  correlate_of<float>(entries, planes, line, pixels, bias, begin, end, stage);
}

template <int V>
PPKERNELS_LOOP void sample_pass(const Entries& entries, const float* planes, const float* gradients,
                                int64_t gradient_plane, int64_t begin, int64_t end, float* out) {
  for (int64_t b = 0; b < entries.blocks; ++b) {
    for (int64_t r = begin; r < end; ++r) {
      const int32_t* segment = entries.segments + r * (entries.blocks + 1) + b;
      if (segment[0] == segment[1]) continue;
      f32v g[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        g[v] = load(gradients + (r - begin) * gradient_plane + v * kLanes);
      sample<true>(g, Strided<int32_t>{planes, entries.addresses, 1}, out, segment[0], segment[1]);
    }
  }
}

void sample_entry(const Entries& entries, const float* planes, const Line& line,
                  const float* gradients, int64_t gradient_plane, int64_t begin, int64_t end,
                  float* out) {
  with_count<kSample>(line.vectors, [&](auto count) {
    constexpr int V = decltype(count)::value;
    for (int64_t pass = 0; pass < line.passes; ++pass) {
      const int64_t first = pass * V * kLanes;
      sample_pass<V>(entries, planes + first, gradients + first, gradient_plane, begin, end, out);
    }
  });
}

// ---- types

void widen_entry(Type type, const void* from, float* to, int64_t n) {
  if (type == Type::kBFloat16) return copy(to, (const bf16*)from, n);
  copy(to, (const float*)from, n);
}

template <class T>
PPKERNELS_LOOP void total_of(const float* parts, int64_t count, int64_t stride, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = least(n - i, kLanes);
    f32v sum = load_first(parts + i, left);
    for (int64_t k = 1; k < count; ++k) sum += load_first(parts + k * stride + i, left);
    store_first(to + i, sum, left);
  }
}

void total_entry(Type type, const float* parts, int64_t count, int64_t stride, void* to,
                 int64_t n) {
  if (type == Type::kBFloat16) return total_of(parts, count, stride, (bf16*)to, n);
  total_of(parts, count, stride, (float*)to, n);
}

}  // namespace

extern const SparseConvKernels kSparseConv;
const SparseConvKernels kSparseConv = {kLanes,          kAccumulate,  kSample,     pack_entry,
                                       correlate_entry, sample_entry, widen_entry, total_entry};

}  // namespace ppkernels::PPKERNELS_ISA
