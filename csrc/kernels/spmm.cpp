// Compiled once per instruction set (CMakeLists.txt), each in its own namespace.
// Longer than 350 lines: the three products share how a batch is packed and how types are told
// apart.
#include "kernels/spmm.h"

#include "kernels/panel.h"
#include "simd/part.h"
#include "simd/transpose.h"
#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How many of `count` numbers are left for the vector v.
inline int64_t in_vector(int64_t count, int64_t v) {
  const int64_t left = count - v * kLanes;
  return left < 0 ? 0 : least(left, kLanes);
}

// ---- packing

// A row of the batch is contiguous: blocks of kLanes rows × kLanes columns, transposed. Along the
// rows, so that the processor sees kLanes streams to fetch ahead.
template <class T>
PPKERNELS_LOOP void pack_rows(const T* x, int64_t stride, int64_t count, int64_t begin, int64_t end,
                              int64_t width, float* panel) {
  for (int64_t v = 0; v * kLanes < width; ++v) {
    const int64_t rows = in_vector(count, v);
    const T* from = x + v * kLanes * stride;
    float* to = panel + v * kLanes;
    int64_t k = begin;
    for (; rows == kLanes && k + kLanes <= end; k += kLanes, to += kLanes * width) {
      f32v block[kLanes];
      for (int r = 0; r < kLanes; ++r) block[r] = load(from + r * stride + k);
      transpose(block);
      for (int c = 0; c < kLanes; ++c) store<false>(to + c * width, block[c]);
    }
    for (; k < end; k += kLanes, to += kLanes * width) {
      const int64_t columns = least(kLanes, end - k);
      f32v block[kLanes] = {};
      for (int64_t r = 0; r < rows; ++r) block[r] = load_first(from + r * stride + k, columns);
      transpose(block);
      for (int64_t c = 0; c < columns; ++c) store<false>(to + c * width, block[c]);
    }
  }
}

// A column of the batch is contiguous.
template <class T>
PPKERNELS_LOOP void pack_columns(const T* x, int64_t stride, int64_t count, int64_t begin,
                                 int64_t end, int64_t width, float* panel) {
  for (int64_t k = begin; k < end; ++k, panel += width) {
    for (int64_t v = 0; v * kLanes < width; ++v) {
      const f32v numbers = load_first(x + k * stride + v * kLanes, in_vector(count, v));
      store<false>(panel + v * kLanes, numbers);
    }
  }
}

template <class T>
void pack_as(const SpmmMatrix& x, int64_t first, int64_t count, int64_t begin, int64_t end,
             int64_t width, float* panel) {
  const T* from = (const T*)x.data + first * x.row_stride;
  if (x.column_stride == 1) {
    pack_rows(from, x.row_stride, count, begin, end, width, panel);
  } else {
    pack_columns(from, x.column_stride, count, begin, end, width, panel);
  }
}

void pack_entry(const SpmmMatrix& x, int64_t first, int64_t count, int64_t begin, int64_t end,
                int64_t width, float* panel) {
  x.type == Type::kFloat32 ? pack_as<float>(x, first, count, begin, end, width, panel)
                           : pack_as<bf16>(x, first, count, begin, end, width, panel);
}

// ---- the forward and grad_input

// Rows of the weight that are transposed together, through L1: a row of the batch is then read or
// written four lines at a time. Measured: ops/spmm/README.md.
constexpr int64_t kTileRows = 64;

// tile[r·width + b] becomes out[b, n + r], r < rows.
template <class T>
PPKERNELS_LOOP void store_tile(const float* tile, int64_t width, const SpmmOutput& out, int64_t n,
                               int64_t rows) {
  for (int64_t b = 0; b < out.count; b += kLanes) {
    const int64_t numbers = least(kLanes, out.count - b);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const float* from = tile + r * width + b;
      T* to = (T*)out.data + b * out.stride + n + r;
      const int64_t left = least(kLanes, rows - r);
      f32v block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * width);
      transpose(block);
      if (left == kLanes && numbers == kLanes) {
        for (int c = 0; c < kLanes; ++c) store<false>(to + c * out.stride, block[c]);
      } else {
        for (int64_t c = 0; c < numbers; ++c) store_first(to + c * out.stride, block[c], left);
      }
    }
  }
}

template <int V, class Index, class Value>
PPKERNELS_LOOP void multiply_rows(const int32_t* offsets, const Index* columns, const Value value,
                                  const float* panel, const float* bias, const SpmmOutput& out,
                                  int64_t begin, int64_t end) {
  constexpr int64_t kWidth = V * kLanes;
  alignas(64) float tile[kTileRows * kWidth];
  for (int64_t n = begin; n < end; n += kTileRows) {
    const int64_t rows = least(kTileRows, end - n);
    for (int64_t r = 0; r < rows; ++r) {
      Sums<V> sums;
      if (bias != nullptr) {
        for (int v = 0; v < V; ++v) sums.even[v] = splat(bias[n + r]);
      }
      accumulate(sums, Strided<Index>{panel, columns, kWidth}, value, offsets[n + r],
                 offsets[n + r + 1]);
      for (int v = 0; v < V; ++v) store<false>(tile + r * kWidth + v * kLanes, sums[v]);
    }
    for (int64_t r = rows; r % kLanes != 0; ++r) {
      for (int v = 0; v < V; ++v) store<false>(tile + r * kWidth + v * kLanes, f32v{});
    }
    out.type == Type::kFloat32 ? store_tile<float>(tile, kWidth, out, n, rows)
                               : store_tile<bf16>(tile, kWidth, out, n, rows);
  }
}

// Calls `body` with the columns and the values of the entries as their own types.
template <class Body>
inline void with_types(const SpmmEntries& w, const Body& body) {
  const auto with_columns = [&](auto* columns) {
    if (w.type == Type::kFloat32) {
      const auto* values = (const float*)w.values;
      w.order ? body(columns, Ordered<float>{values, w.order})
              : body(columns, Direct<float>{values});
    } else {
      const auto* values = (const bf16*)w.values;
      w.order ? body(columns, Ordered<bf16>{values, w.order}) : body(columns, Direct<bf16>{values});
    }
  };
  w.indices.wide ? with_columns((const int32_t*)w.indices.columns)
                 : with_columns((const uint16_t*)w.indices.columns);
}

// Calls `body` with the vectors that a panel is wide, as a constant.
template <int V>
struct Vectors {
  static constexpr int count = V;
};
template <class Body>
inline void with_vectors(int64_t width, const Body& body) {
  switch (width / kLanes) {
    case 1:
      return body(Vectors<1>{});
    case 2:
      return body(Vectors<2>{});
    case 3:
      return body(Vectors<3>{});
    default:
      return body(Vectors<4>{});
  }
}

void multiply_entry(const SpmmEntries& w, const float* panel, int64_t width, const float* bias,
                    const SpmmOutput& out, int64_t begin, int64_t end) {
  with_types(w, [&](auto* columns, auto value) {
    with_vectors(width, [&](auto vectors) {
      multiply_rows<vectors.count>(w.indices.offsets, columns, value, panel, bias, out, begin, end);
    });
  });
}

// ---- grad_values

template <bool kAdd, int V, class Index>
PPKERNELS_LOOP void sample_tile(const int32_t* offsets, const Index* columns, const float* panel,
                                const float* tile, float* sums, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = V * kLanes;
  for (int64_t n = begin; n < end; ++n, tile += kWidth) {
    f32v g[V];
    for (int v = 0; v < V; ++v) g[v] = load(tile + v * kLanes);
    sample<kAdd>(g, Strided<Index>{panel, columns, kWidth}, sums, offsets[n], offsets[n + 1]);
  }
}

template <int V, class Index>
void sample_rows(const SpmmEntries& w, const Index* columns, const float* panel,
                 const SpmmMatrix& g, int64_t first, int64_t count, float* sums, bool add,
                 int64_t begin, int64_t end) {
  constexpr int64_t kWidth = V * kLanes;
  alignas(64) float tile[kTileRows * kWidth];
  for (int64_t n = begin; n < end; n += kTileRows) {
    const int64_t stop = least(n + kTileRows, end);
    pack_entry(g, first, count, n, stop, kWidth, tile);
    add ? sample_tile<true, V>(w.indices.offsets, columns, panel, tile, sums, n, stop)
        : sample_tile<false, V>(w.indices.offsets, columns, panel, tile, sums, n, stop);
  }
}

void sample_entry(const SpmmEntries& w, const float* panel, int64_t width, const SpmmMatrix& g,
                  int64_t first, int64_t count, float* sums, bool add, int64_t begin, int64_t end) {
  with_vectors(width, [&](auto vectors) {
    constexpr int V = vectors.count;
    w.indices.wide ? sample_rows<V>(w, (const int32_t*)w.indices.columns, panel, g, first, count,
                                    sums, add, begin, end)
                   : sample_rows<V>(w, (const uint16_t*)w.indices.columns, panel, g, first, count,
                                    sums, add, begin, end);
  });
}

// ---- a batch of one

// Element e of each kind of values, and four of them.
template <class T>
PPKERNELS_INLINE float one(const Direct<T>& value, int64_t e) {
  return as_float(value.values[e]);
}
template <class T>
PPKERNELS_INLINE float one(const Ordered<T>& value, int64_t e) {
  return as_float(value.values[value.order[e]]);
}

template <class Value>
PPKERNELS_INLINE f32x4 four(const Value& value, int64_t e) {
  return f32x4{one(value, e), one(value, e + 1), one(value, e + 2), one(value, e + 3)};
}
PPKERNELS_INLINE f32x4 four(const Direct<float>& value, int64_t e) {
  return load_bits<f32x4>(value.values + e);
}

template <class Index>
PPKERNELS_INLINE f32x4 four_of(const float* x, const Index* columns, int64_t e) {
  return f32x4{x[columns[e]], x[columns[e + 1]], x[columns[e + 2]], x[columns[e + 3]]};
}

// Σ value[e]·x[column[e]]: in 16 chains, whatever the instruction set.
template <class Index, class Value>
PPKERNELS_INLINE float dot(const Index* columns, const Value value, const float* x, int64_t begin,
                           int64_t end) {
  f32x4 sums[4] = {};
  int64_t e = begin;
  for (; e + 16 <= end; e += 16) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      sums[q] = fma(four(value, e + 4 * q), four_of(x, columns, e + 4 * q), sums[q]);
  }
#pragma GCC unroll 3
  for (int q = 0; q < 3; ++q) {
    if (e + 4 > end) break;
    sums[q] = fma(four(value, e), four_of(x, columns, e), sums[q]);
    e += 4;
  }
  f32x4 a = {}, b = {};
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) {
    if (e + k >= end) break;
    a[k] = one(value, e + k);
    b[k] = x[columns[e + k]];
  }
  sums[3] = fma(a, b, sums[3]);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T, class Index, class Value>
PPKERNELS_LOOP void multiply_row_by_row(const int32_t* offsets, const Index* columns,
                                        const Value value, const float* x, const float* bias,
                                        T* out, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t rows = least(kLanes, end - n);
    alignas(64) float tile[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = dot(columns, value, x, offsets[n + r], offsets[n + r + 1]);
      tile[r] = bias != nullptr ? sum + bias[n + r] : sum;
    }
    store_first(out + n, load(tile), rows);
  }
}

void multiply_one_entry(const SpmmEntries& w, const float* x, const float* bias,
                        const SpmmOutput& out, int64_t begin, int64_t end) {
  with_types(w, [&](auto* columns, auto value) {
    out.type == Type::kFloat32 ? multiply_row_by_row(w.indices.offsets, columns, value, x, bias,
                                                     (float*)out.data, begin, end)
                               : multiply_row_by_row(w.indices.offsets, columns, value, x, bias,
                                                     (bf16*)out.data, begin, end);
  });
}

template <class Index>
PPKERNELS_LOOP void sample_row_by_row(const int32_t* offsets, const Index* columns, const float* x,
                                      const SpmmMatrix& g, float* sums, int64_t begin,
                                      int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t place = n * g.column_stride;
    const float here = g.type == Type::kFloat32 ? ((const float*)g.data)[place]
                                                : as_float(((const bf16*)g.data)[place]);
    int64_t e = offsets[n];
    for (; e + 4 <= offsets[n + 1]; e += 4) {
      const f32x4 products = here * four_of(x, columns, e);
      __builtin_memcpy(sums + e, &products, sizeof(products));
    }
    for (; e < offsets[n + 1]; ++e) sums[e] = here * x[columns[e]];
  }
}

void sample_one_entry(const SpmmEntries& w, const float* x, const SpmmMatrix& g, float* sums,
                      int64_t begin, int64_t end) {
  w.indices.wide ? sample_row_by_row(w.indices.offsets, (const int32_t*)w.indices.columns, x, g,
                                     sums, begin, end)
                 : sample_row_by_row(w.indices.offsets, (const uint16_t*)w.indices.columns, x, g,
                                     sums, begin, end);
}

// ---- values

template <class T>
PPKERNELS_LOOP void gather_values(const T* values, const int32_t* order, float* out, int64_t begin,
                                  int64_t end) {
  for (int64_t e = begin; e < end; ++e) out[e] = as_float(values[order[e]]);
}

void gather_entry(const SpmmEntries& w, float* out, int64_t begin, int64_t end) {
  w.type == Type::kFloat32 ? gather_values((const float*)w.values, w.order, out, begin, end)
                           : gather_values((const bf16*)w.values, w.order, out, begin, end);
}

template <class T>
PPKERNELS_LOOP void widen_row(const T* x, int64_t stride, int64_t n, float* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t count = least(kLanes, n - i);
      store_first(out + i, load_first(x + i, count), count);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = as_float(x[i * stride]);
  }
}

void widen_entry(const SpmmMatrix& x, int64_t n, float* out) {
  x.type == Type::kFloat32 ? widen_row((const float*)x.data, x.column_stride, n, out)
                           : widen_row((const bf16*)x.data, x.column_stride, n, out);
}

PPKERNELS_LOOP void narrow_entry(const float* from, void* to, int64_t n) {
  auto* out = (bf16*)to;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = least(kLanes, n - i);
    store_first(out + i, load_first(from + i, count), count);
  }
}

}  // namespace

extern const SpmmKernels kSpmm;
const SpmmKernels kSpmm = {kLanes,       pack_entry,         multiply_entry,
                           sample_entry, multiply_one_entry, sample_one_entry,
                           gather_entry, widen_entry,        narrow_entry};

}  // namespace ppkernels::PPKERNELS_ISA
