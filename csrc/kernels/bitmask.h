// Masks of one bit an entry, over raw memory.
//
// Entry i of a mask is bit i % 8 of byte i / 8 of its `words`; a set bit means kept. A mask of n
// entries has (n + 7) / 8 bytes, and the bits behind its last entry are 0. Each function does its
// work in one thread and reads and writes no byte outside of what it says.
#pragma once

#include <stdint.h>

#include "kernels/isa.h"

namespace ppkernels {

struct BitmaskKernels {
  // words = the mask of n entries that are set where the byte of `mask` is not 0.
  void (*pack)(const uint8_t* mask, uint8_t* words, int64_t n);

  // mask[i] = 1 where bit i is set and 0 elsewhere, for i < n.
  void (*unpack)(const uint8_t* words, uint8_t* mask, int64_t n);

  // The number of bits set in `bytes` bytes.
  int64_t (*count)(const uint8_t* words, int64_t bytes);

  // out[i] = weight[i] where bit i is set and +0 elsewhere, for i < n; no arithmetic, so that NaN
  // and inf under a 0 bit give 0 and all others keep their bits. Pointers need the element's own
  // alignment. `out` may be `weight` or be apart from it. `stream`: write around the cache; then
  // `out` must not be `weight`, and its address must be a multiple of 64.
  void (*apply)(Type type, const void* weight, const uint8_t* words, void* out, int64_t n,
                bool stream);

  // The mask of a tensor in the order of its memory: bit m of `out` = the bit of `words` that
  // belongs to the element at offset m, for begin <= m < end. The tensor is dense and of `dims`
  // dimensions; `words` counts its elements in row-major order of `shape`. `begin` is a multiple
  // of 8; `words` and `out` are whole masks, apart from each other, and `out` is written in bytes
  // begin / 8 ... (end − 1) / 8, the bits from `end` on as 0.
  void (*arrange)(const uint8_t* words, uint8_t* out, int64_t begin, int64_t end, int dims,
                  const int64_t* shape, const int64_t* strides);
};

// The kernels of one instruction set, which must be available.
const BitmaskKernels& bitmask_kernels(Isa isa);

}  // namespace ppkernels
