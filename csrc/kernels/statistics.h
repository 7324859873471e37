// How the powered weight is distributed: extremes, sums, counts and a histogram, over raw memory.
//
// θ = sign(x)·|x|^α is what op `power` makes of x, rounded to its type, bit for bit; for α = 1 it
// is x itself. Nothing but the results is written. Each call does its work in one thread.
#pragma once

#include <stdint.h>

#include "kernels/isa.h"

namespace ppkernels {

// Note [The order of the sums]
//
// The elements, in the order of their memory, fall into blocks of kStatisticsBlock. Within a block,
// element i belongs to lane i mod 16. A lane adds its elements in order, in float64, from +0 on;
// an element that the mask leaves out adds +0. Then lane k adds lane k + 8 for k < 8, then k + 4
// for k < 4, k + 2, k + 1, and lane 0 has the block's sum. Blocks are added in order, from +0 on.
//
// So the sums depend on the number of elements and their order, and neither on threads nor on the
// instruction set. θ² is exact for all types but float64, where it is rounded before it is added.
constexpr int64_t kStatisticsBlock = 1 << 15;

struct Moments {
  double min, max, sum, sum_abs, sum_square;
};

struct StatisticsQuery {
  // Of the elements. Finite and >= 1.
  Type type;
  double alpha;
  // Entries with |θ| < ε are counted for each ε.
  const double* epsilons;
  int64_t epsilon_count;
  // The histogram, none of 0 bins; `per_width` = bins / (high − low). All finite, low < high, fewer
  // than 2^31 bins.
  int64_t bins;
  double low, high, per_width;
};

// Histograms of a call, each with a bin more behind the last, for the entries in none. Neighbours
// count in different ones, so that an increment need not wait for that of its neighbour.
constexpr int kHistograms = 4;

struct StatisticsKernels {
  // The entries of one block: x[i] for i < n <= kStatisticsBlock, where bit i of `words` is set;
  // null: all.
  //   moments     written; of no entries inf, −inf, 0, 0, 0. Where there is a NaN, of no meaning.
  //   counts      entries, NaNs, and those below each ε: added to.
  //   histograms  kHistograms·(bins + 1) numbers, added to; their sum is the histogram. Not read
  //               without bins.
  // Of `words`, the bytes of n bits are read; x needs the element's own alignment. Subnormal
  // numbers under torch.set_flush_denormal: as in kernels/power.h.
  void (*block)(const StatisticsQuery& query, const void* x, const uint8_t* words, int64_t n,
                Moments* moments, int64_t* counts, int64_t* histograms);
};

// The kernels of one instruction set, which must be available.
const StatisticsKernels& statistics_kernels(Isa isa);

}  // namespace ppkernels
