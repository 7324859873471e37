// The products of a sparse weight [N, K] with a batch, over raw memory.
//
// The weight is `entries` of N rows; of its transpose, for grad_input, the rows are columns. A
// batch is cut into panels of up to four vectors of its numbers, and a thread packs a panel's
// operand [K, width] into memory of its own, column by column, before it multiplies: the loops then
// read whole vectors, wherever the entries stand (kernels/panel.h).
//
// Each function does its work in one thread and reads and writes no byte outside of what it says.
// Columns are trusted: they must be below K. Sums are float32, products are added to them by fma in
// an order that hangs on the row's entries alone: a number of `multiply` has the same bits beside
// any others, in a panel of any width, on every instruction set (but for the baseline's fma:
// csrc/README). Those of `sample` hang on the lanes of the instruction set.
#pragma once

#include <stdint.h>

#include "kernels/indices.h"
#include "kernels/isa.h"

namespace ppkernels {

// A matrix [rows, columns] of float32 or bfloat16; strides in elements. One of the two is 1, or
// there is but one number along it.
struct SpmmMatrix {
  Type type;
  const void* data;
  int64_t row_stride, column_stride;
};

// A weight: where its entries stand, and what they are. Entry e has values[e], or values[order[e]]
// if there is an order.
struct SpmmEntries {
  SparseIndices indices;
  Type type;  // of the values: float32 or bfloat16
  const void* values;
  const int32_t* order;  // or null
};

// What `multiply` writes: out[b·stride + n] for the panel's `count` numbers b of the batch.
struct SpmmOutput {
  Type type;  // float32 or bfloat16
  void* data;
  int64_t stride, count;
};

struct SpmmKernels {
  // Vectors of this many floats; a panel's width is one, two, three or four of them.
  int64_t lanes;

  // panel[(k − begin)·width + b] = x[first + b, k] for b < count and 0 for count <= b < width,
  // begin <= k < end. `panel` must be aligned to 64 bytes.
  void (*pack)(const SpmmMatrix& x, int64_t first, int64_t count, int64_t begin, int64_t end,
               int64_t width, float* panel);

  // out[b, n] = bias[n] + Σ_e value[e]·panel[column[e]·width + b] over the entries of row n,
  // begin <= n < end; `bias` may be null.
  void (*multiply)(const SpmmEntries& entries, const float* panel, int64_t width, const float* bias,
                   const SpmmOutput& out, int64_t begin, int64_t end);

  // sums[e] = Σ_b g[first + b, n]·panel[column[e]·width + b], b < count, over the entries of the
  // rows begin <= n < end; with `add` that is added to sums[e]. Of `entries` values are not read.
  void (*sample)(const SpmmEntries& entries, const float* panel, int64_t width, const SpmmMatrix& g,
                 int64_t first, int64_t count, float* sums, bool add, int64_t begin, int64_t end);

  // The same two for a batch of one, vectors along the entries, no panel: x [K] is in float32.
  void (*multiply_one)(const SpmmEntries& entries, const float* x, const float* bias,
                       const SpmmOutput& out, int64_t begin, int64_t end);
  void (*sample_one)(const SpmmEntries& entries, const float* x, const SpmmMatrix& g, float* sums,
                     int64_t begin, int64_t end);

  // out[e] = values[order[e]] as float32 (order may not be null), begin <= e < end.
  void (*gather)(const SpmmEntries& entries, float* out, int64_t begin, int64_t end);

  // out[i] = x[0, i] as float32, i < n.
  void (*widen)(const SpmmMatrix& x, int64_t n, float* out);

  // to[i] = from[i] in bfloat16, to nearest even, i < n.
  void (*narrow)(const float* from, void* to, int64_t n);
};

// The kernels of one instruction set, which must be available.
const SpmmKernels& spmm_kernels(Isa isa);

}  // namespace ppkernels
