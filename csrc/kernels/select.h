// The selection's passes over raw memory, each in one thread.
//
// Weights are ranked by keys, integers that order as |θ| does (`Ranking`). Within one tensor they
// order as the bits of |x| do, so that a pass compares only those with bounds, 64 elements at a
// time, and computes keys where it meets an element between the bounds.
//
// ppkernels/ops/select/reference.py is the specification; kernels/selection.h puts the passes
// together.
#pragma once

#include <stdint.h>

#include "kernels/isa.h"

namespace ppkernels {

// What is ranked: |x| itself, as the bits of a float64; or α·log2|x|, a float64 whose bits are
// changed so that unsigned integers order as the numbers do. NaN has no key.
struct Ranking {
  bool by_log;
  double alpha;
};

// Bits of |x| in the tensor's own type that part its elements, in ascending order.
struct SelectBounds {
  uint64_t low, after_low, high, after_high;
};

// How many elements there are with |x| in [low, after_low), [after_low, high), [high, after_high),
// and from after_high on; and whether there is a NaN.
struct SelectCounts {
  int64_t at_low, between, at_high, above;
  bool has_nan;
};

// Elements to a call at most.
constexpr int64_t kSelectChunk = 4096;

struct SelectKernels {
  // keys[i] = the key of elements[i], for i < n.
  void (*keys)(Type type, const void* elements, int64_t n, const Ranking& ranking, uint64_t* keys);

  // Counts n <= kSelectChunk elements, and
  // - writes words, (n + 7) / 8 bytes: bit i is set where |elements[i]| >= high;
  // - lists the elements between the bounds: their index and their key, in ascending order of the
  //   index; both lists have place for n.
  // `within` is null or n bits: an element whose bit is 0 is as if it were not there.
  SelectCounts (*sweep)(Type type, const void* elements, int64_t n, const uint8_t* within,
                        const Ranking& ranking, const SelectBounds& bounds, uint8_t* words,
                        uint32_t* indices, uint64_t* keys);

  // Of the elements with |x| in [first, end) sets the bits of the first `quota` ones and clears
  // those of the others; no other bit of words changes. Returns what is left of the quota.
  int64_t (*settle)(Type type, const void* elements, int64_t n, const uint8_t* within,
                    uint64_t first, uint64_t end, int64_t quota, uint8_t* words);
};

// The kernels of one instruction set, which must be available.
const SelectKernels& select_kernels(Isa isa);

}  // namespace ppkernels
