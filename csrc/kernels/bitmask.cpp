// Compiled once per instruction set (CMakeLists.txt), each in its own namespace.
#include "kernels/bitmask.h"

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {
namespace {

void pack_entry(const uint8_t* mask, uint8_t* words, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint32_t pair = nonzero_bits(mask + i);
    words[i >> 3] = (uint8_t)pair;
    words[(i >> 3) + 1] = (uint8_t)(pair >> 8);
  }
  for (; i < n; i += 8) {
    uint32_t word = 0;
    for (int64_t b = 0; b < 8 && i + b < n; ++b) word |= (uint32_t)(mask[i + b] != 0) << b;
    words[i >> 3] = (uint8_t)word;
  }
}

void unpack_entry(const uint8_t* words, uint8_t* mask, int64_t n) {
  typedef uint8_t u8x8 __attribute__((vector_size(8)));
  const u8x8 each = {1, 2, 4, 8, 16, 32, 64, 128};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const u8x8 is_set = (u8x8)(((u8x8{} + words[i >> 3]) & each) == each) & 1;
    __builtin_memcpy(mask + i, &is_set, sizeof(is_set));
  }
  for (; i < n; ++i) mask[i] = (uint8_t)bit(words, i);
}

int64_t count_entry(const uint8_t* words, int64_t bytes) {
  int64_t count = 0, j = 0;
  for (; j + 8 <= bytes; j += 8) count += __builtin_popcountll(load_bits<uint64_t>(words + j));
  for (; j < bytes; ++j) count += __builtin_popcount(words[j]);
  return count;
}

// ---- the masked weight: one vector at p, whose first entry is entry i of the mask

inline u32v kept(const uint32_t* p, const uint8_t* words, int64_t i) {
  return load_bits<u32v>(p) & (u32v)lane_mask(words, i);
}

inline u16v kept(const uint16_t* p, const uint8_t* words, int64_t i) {
  return load_bits<u16v>(p) & __builtin_convertvector((u32v)lane_mask(words, i), u16v);
}

inline u64v kept(const uint64_t* p, const uint8_t* words, int64_t i) {
  return load_bits<u64v>(p) & wide_lane_mask(words, i);
}

template <bool kStream, class U>
void apply_to(const U* weight, const uint8_t* words, U* out, int64_t n) {
  constexpr int64_t kStep = sizeof(kept(weight, words, 0)) / sizeof(U);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store_bits<kStream>(out + i, kept(weight + i, words, i));
  for (; i < n; ++i) out[i] = bit(words, i) ? weight[i] : U(0);
  if (kStream) finish_streaming();
}

template <class U>
void apply_as(const void* weight, const uint8_t* words, void* out, int64_t n, bool stream) {
  stream ? apply_to<true>((const U*)weight, words, (U*)out, n)
         : apply_to<false>((const U*)weight, words, (U*)out, n);
}

void apply_entry(Type type, const void* weight, const uint8_t* words, void* out, int64_t n,
                 bool stream) {
  switch (type) {
    case Type::kFloat32:
      return apply_as<uint32_t>(weight, words, out, n, stream);
    case Type::kBFloat16:
    case Type::kFloat16:
      return apply_as<uint16_t>(weight, words, out, n, stream);
    case Type::kFloat64:
      return apply_as<uint64_t>(weight, words, out, n, stream);
  }
}

// ---- a mask in memory order

// A walk through a dense tensor's memory that knows where in row-major order it is.
class Walk {
 public:
  Walk(int64_t start, int dims, const int64_t* shape, const int64_t* strides) {
    int64_t step = 1;
    for (int d = dims - 1; d >= 0; --d) {
      if (shape[d] > 1) insert({shape[d], step, strides[d], 0});
      step *= shape[d];
    }
    if (count_ == 0) insert({1, 1, 1, 0});
    for (int k = count_ - 1; k >= 0; --k) {
      place_[k].index = start % place_[k].size;
      start /= place_[k].size;
      position_ += place_[k].index * place_[k].step;
    }
  }

  // Index of the current element in row-major order, and what it grows by at the next ones.
  int64_t position() const { return position_; }
  int64_t step() const { return place_[count_ - 1].step; }
  // How many elements from here on are `step` apart.
  int64_t run() const { return place_[count_ - 1].size - place_[count_ - 1].index; }

  // Goes `n` <= run() elements on.
  void advance(int64_t n) {
    position_ += n * step();
    place_[count_ - 1].index += n;
    for (int k = count_ - 1; k > 0 && place_[k].index == place_[k].size; --k) {
      place_[k].index = 0;
      position_ += place_[k - 1].step - place_[k].size * place_[k].step;
      ++place_[k - 1].index;
    }
  }

 private:
  struct Place {
    int64_t size, step, stride, index;
  };

  // Keeps the densest dimension last.
  void insert(const Place& place) {
    int k = count_++;
    for (; k > 0 && place_[k - 1].stride < place.stride; --k) place_[k] = place_[k - 1];
    place_[k] = place;
  }

  // 63 dimensions of two elements each would fill more than the address space.
  Place place_[64];
  int count_ = 0;
  int64_t position_ = 0;
};

// The bits at `position` and at the next seven places, `step` apart.
inline uint32_t eight_bits(const uint8_t* words, int64_t position, int64_t step) {
  uint32_t word = 0;
  for (int b = 0; b < 8; ++b) word |= bit(words, position + b * step) << b;
  return word;
}

void arrange_entry(const uint8_t* words, uint8_t* out, int64_t begin, int64_t end, int dims,
                   const int64_t* shape, const int64_t* strides) {
  if (begin >= end) return;
  Walk walk(begin, dims, shape, strides);
  const int64_t step = walk.step();
  uint32_t word = 0;  // bits of a byte that is not full yet
  for (int64_t m = begin; m < end;) {
    const int64_t rest = end - m, run = walk.run() < rest ? walk.run() : rest;
    const int64_t stop = m + run;
    int64_t position = walk.position();
    while (m < stop) {
      if ((m & 7) == 0 && stop - m >= 8) {
        out[m >> 3] = (uint8_t)eight_bits(words, position, step);
        m += 8;
        position += 8 * step;
        continue;
      }
      word |= bit(words, position) << (m & 7);
      ++m;
      position += step;
      if ((m & 7) != 0) continue;
      out[(m - 1) >> 3] = (uint8_t)word;
      word = 0;
    }
    walk.advance(run);
  }
  if (end & 7) out[end >> 3] = (uint8_t)word;
}

}  // namespace

extern const BitmaskKernels kBitmask;
const BitmaskKernels kBitmask = {pack_entry, unpack_entry, count_entry, apply_entry, arrange_entry};

}  // namespace ppkernels::PPKERNELS_ISA
