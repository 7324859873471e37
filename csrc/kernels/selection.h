// The selection of the largest elements of one or many tensors, on top of the passes of select.h.
//
// Compiled once: it knows neither instruction sets nor torch, and gets its threads from the caller.
// How it goes about it: Note [Selection by a sample] in selection.cpp.
#pragma once

#include <stdint.h>

#include <vector>

#include "kernels/parallel.h"
#include "kernels/select.h"

namespace ppkernels {

struct SelectTensor {
  Type type;
  // Its elements lie where shape and strides, counted in elements, say; both have `dims` numbers.
  const void* data;
  int dims;
  const int64_t *shape, *strides;
  // Which elements may be kept, in row-major order, or null; and how many those are.
  const uint8_t* within;
  int64_t candidates;
  // Written whole: a bit for each element in row-major order, and 0 behind the last one.
  uint8_t* words;
  double alpha;
};

// The bits of the counts[0] largest elements of all tensors, or of the counts[i] largest of tensor
// i. No count is larger than the candidates it is of. The bits depend on the tensors alone, not on
// threads or instruction sets.
//
// Returns the index of the first tensor in which there is a NaN, else −1. With a NaN the words mean
// nothing. Where the elements are written to meanwhile, the words mean nothing either, but nothing
// else is touched; kChanged is returned if that is noticed.
//
// Memory besides: for each count of N elements at most 12 bytes, or 24 while a list grows, for each
// of 4096 + N/16 elements (and a chunk of select.h for each thread), and 16 bytes for each
// of N^(2/3).
constexpr int64_t kChanged = -2;
int64_t select_largest(const SelectKernels& kernels, const std::vector<SelectTensor>& tensors,
                       const std::vector<int64_t>& counts, const ParallelFor& parallel_for);

}  // namespace ppkernels
