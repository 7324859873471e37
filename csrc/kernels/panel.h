// The inner loops of products with a sparse weight: entries of one row × vectors of a panel.
//
// A panel is memory in which each column of the weight has its operand, kLanes·V floats side by
// side: numbers of a batch for a linear layer, pixels for a convolution. Row n of the weight has
// the entries offsets[n] ... offsets[n + 1] − 1, entry e its column and its value. Two things are
// done with a row:
//
//     accumulate   sums[v] += Σ_e value(e) · operand(e)[v]          the forward and grad_input
//     sample       out[e] = Σ_v Σ_lanes g[v] · operand(e)[v]        grad_values
//
// Where an operand lies and where a value stands are policies, a pointer or two each; pass them by
// value, made on the spot, so that they stay in registers. Call these functions in one that is a
// PPKERNELS_LOOP, so that all of it is one function.
//
// What bounds both is the way from L2: a row of 64 floats, four lines, serves one entry, and its
// next use is a row of the weight away.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// ---- where the operand of an entry lies

// A panel [K][stride]: the operand of column k begins at start + k·stride. A stride that is a
// constant where the policy is made becomes a shift.
template <class Index>
struct Strided {
  const float* start;
  const Index* columns;
  int64_t stride;
  PPKERNELS_INLINE const float* operator[](int64_t e) const {
    return start + (int64_t)columns[e] * stride;
  }
};

// ---- where the value of an entry stands; T is float or bf16

template <class T>
struct Direct {
  const T* values;
  PPKERNELS_INLINE f32v operator[](int64_t e) const { return splat(values + e); }
};

// Those of a transposed topology, whose entry e is entry order[e] of the values.
template <class T>
struct Ordered {
  const T* values;
  const int32_t* order;
  PPKERNELS_INLINE f32v operator[](int64_t e) const { return splat(values + order[e]); }
};

// ---- accumulate

// V vectors of sums, each in two parts, of every second entry: twice as many chains of additions
// that do not wait for each other. From eight vectors on there are enough of them in one part, and
// no registers for two; `odd` is not used then.
template <int V, int kParts = 2>
struct Sums {
  f32v even[V] = {}, odd[V] = {};

  PPKERNELS_INLINE f32v& second(int v) { return kParts == 1 ? even[v] : odd[v]; }
  PPKERNELS_INLINE f32v operator[](int v) const { return kParts == 1 ? even[v] : even[v] + odd[v]; }
};

// sums += Σ value[e] · operand[e], begin <= e < end. The first entry goes to the even sums, the
// next one to the odd, and so on, so a result depends on where a row is cut into segments, and on
// nothing else: call it once for each segment, with the same sums.
template <int V, int kParts, class Operand, class Value>
PPKERNELS_INLINE void accumulate(Sums<V, kParts>& sums, const Operand operand, const Value value,
                                 int64_t begin, int64_t end) {
  int64_t e = begin;
  for (; e + 1 < end; e += 2) {
    const float *x = operand[e], *y = operand[e + 1];
    const f32v a = value[e], b = value[e + 1];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      sums.even[v] = fma(a, load(x + v * kLanes), sums.even[v]);
      sums.second(v) = fma(b, load(y + v * kLanes), sums.second(v));
    }
  }
  if (e >= end) return;
  const float* x = operand[e];
  const f32v a = value[e];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sums.even[v] = fma(a, load(x + v * kLanes), sums.even[v]);
}

// ---- sample

// out[e] = dot(e), or with `kAdd` out[e] += dot(e), begin <= e < end, where dot(e) is the vector
// whose lanes are still to be added up: four entries at a time.
template <bool kAdd, class Dot>
PPKERNELS_INLINE void sample_by(const Dot& dot, float* out, int64_t begin, int64_t end) {
  int64_t e = begin;
  for (; e + 4 <= end; e += 4) {
    f32x4 four = sums_of(dot(e), dot(e + 1), dot(e + 2), dot(e + 3));
    if (kAdd) four = four + load_bits<f32x4>(out + e);
    __builtin_memcpy(out + e, &four, sizeof(four));
  }
  if (e >= end) return;
  const int64_t second = e + 1 < end ? e + 1 : e, third = e + 2 < end ? e + 2 : e;
  const f32x4 four = sums_of(dot(e), dot(second), dot(third), f32v{});
  for (int k = 0; e + k < end; ++k) out[e + k] = kAdd ? out[e + k] + four[k] : four[k];
}

// out[e] = Σ g · operand[e], begin <= e < end, over the lanes of V vectors; with `kAdd` the sum is
// added to out[e]. `out` begins at entry 0. An entry's bits do not depend on begin and end.
template <bool kAdd, int V, class Operand>
PPKERNELS_INLINE void sample(const f32v (&g)[V], const Operand operand, float* out, int64_t begin,
                             int64_t end) {
  const auto dot = [&](int64_t e) {
    const float* x = operand[e];
    f32v sum = g[0] * load(x);
#pragma GCC unroll 16
    for (int v = 1; v < V; ++v) sum = fma(g[v], load(x + v * kLanes), sum);
    return sum;
  };
  sample_by<kAdd>(dot, out, begin, end);
}

}  // namespace ppkernels::PPKERNELS_ISA
