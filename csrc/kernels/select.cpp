// Compiled once per instruction set (CMakeLists.txt), each in its own namespace.
#include "kernels/select.h"

#include <stddef.h>

#include "simd/log2.h"
#include "simd/magnitude.h"
#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {
namespace {

// ---- 64 bits of a mask

// The bits i ... i + count − 1 of a mask, 0 < count <= 64; i is a multiple of 64.
uint64_t word_at(const uint8_t* words, int64_t i, int64_t count) {
  const uint8_t* p = words + (i >> 3);
  uint64_t word = 0;
  if (count == kWord) {
    for (int j = 0; j < 8; ++j) word |= (uint64_t)p[j] << (8 * j);
    return word;
  }
  for (int64_t j = 0; 8 * j < count; ++j) word |= (uint64_t)p[j] << (8 * j);
  return word & ((uint64_t(1) << count) - 1);
}

void set_word(uint8_t* words, int64_t i, int64_t count, uint64_t word) {
  uint8_t* p = words + (i >> 3);
  if (count == kWord) {
    for (int j = 0; j < 8; ++j) p[j] = (uint8_t)(word >> (8 * j));
    return;
  }
  for (int64_t j = 0; 8 * j < count; ++j) p[j] = (uint8_t)(word >> (8 * j));
}

// Which of these elements are there.
PPKERNELS_INLINE uint64_t present(const uint8_t* within, int64_t i, int64_t count) {
  if (within != nullptr) return word_at(within, i, count);
  return count == kWord ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// The elements from i on, 64 of them: in place, or the last few in front of zeros.
template <class U>
struct Block {
  PPKERNELS_INLINE Block(const U* elements, int64_t i, int64_t n)
      : count(n - i < kWord ? n - i : kWord), p(elements + i) {
    if (count == kWord) return;
    __builtin_memset(padded, 0, sizeof(padded));
    __builtin_memcpy(padded, p, (size_t)count * sizeof(U));
    p = padded;
  }
  Block(const Block&) = delete;

  int64_t count;
  const U* p;
  U padded[kWord];
};

// ---- keys

PPKERNELS_INLINE u64v key_of(f64v magnitude, const Ranking& ranking) {
  if (!ranking.by_log) return (u64v)magnitude;
  const u64v b = (u64v)(ranking.alpha * log2(magnitude));
  const u64v is_negative = (u64v)((i64v)b < 0);
  return b ^ (is_negative | 0x8000000000000000u);
}

inline void magnitudes(const double* p, double* out) {
  for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fabs(p[i]);
}
template <class T>
inline void magnitudes(const T* p, double* out) {
  const f32v x = abs(load(p));
  for (int i = 0; i < kLanes; ++i) out[i] = x[i];
}

template <class T>
void keys_of(const T* x, int64_t n, const Ranking& ranking, uint64_t* keys) {
  constexpr int kHalf = kLanes / 2;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    T padded[kLanes] = {};
    const T* p = x + i;
    if (count < kLanes) {
      for (int64_t k = 0; k < count; ++k) padded[k] = p[k];
      p = padded;
    }
    double wide[kLanes];
    magnitudes(p, wide);
    uint64_t found[kLanes];
    for (int k = 0; k < kLanes; k += kHalf) {
      store_bits<false>(found + k, key_of(load_bits<f64v>(wide + k), ranking));
    }
    for (int64_t k = 0; k < count; ++k) keys[i + k] = found[k];
  }
}

// ---- the pass

template <class U>
bool has_nan_within(const U* x, int64_t n, const uint8_t* within, U inf) {
  for (int64_t i = 0; i < n; i += kWord) {
    const Block<U> block(x, i, n);
    if (bits_at_least(block.p, (U)(inf + 1)) & present(within, i, block.count)) return true;
  }
  return false;
}

// Asks for the memory a page ahead of the 64 elements at p. Measured: ops/select/README.md.
template <class U>
PPKERNELS_INLINE void fetch_ahead(const U* p) {
  const uintptr_t ahead = (uintptr_t)p + 4096;
  for (unsigned k = 0; k < kWord * sizeof(U); k += 64) __builtin_prefetch((const void*)(ahead + k));
}

template <class T>
SelectCounts sweep_as(const T* elements, int64_t n, const uint8_t* within, const Ranking& ranking,
                      const SelectBounds& bounds, uint8_t* words, uint32_t* indices,
                      uint64_t* keys) {
  typedef typename BitsOf<T>::U U;
  const U* x = (const U*)elements;
  const U low = (U)bounds.low, after_low = (U)bounds.after_low;
  const U high = (U)bounds.high, after_high = (U)bounds.after_high;
  NanWatch<T> watch;
  T between[kSelectChunk];
  SelectCounts counts = {0, 0, 0, 0, false};
  for (int64_t i = 0; i < n; i += kWord) {
    const Block<U> block(x, i, n);
    fetch_ahead(x + i);
    const uint64_t there = present(within, i, block.count);
    const uint64_t from_low = bits_at_least(block.p, low) & there;
    const uint64_t above = bits_at_least(block.p, after_high) & there;
    watch.see(block.p);
    counts.above += __builtin_popcountll(above);
    uint64_t kept = above;
    if (from_low != above) {
      const uint64_t after = bits_at_least(block.p, after_low) & there;
      kept = bits_at_least(block.p, high) & there;
      counts.at_low += __builtin_popcountll(from_low ^ after);
      counts.at_high += __builtin_popcountll(kept ^ above);
      for (uint64_t rest = after ^ kept; rest != 0; rest &= rest - 1) {
        const int k = __builtin_ctzll(rest);
        indices[counts.between] = (uint32_t)(i + k);
        between[counts.between++] = elements[i + k];
      }
    }
    set_word(words, i, block.count, kept);
  }
  keys_of(between, counts.between, ranking, keys);
  counts.has_nan =
      watch.has_seen() && (within == nullptr || has_nan_within(x, n, within, BitsOf<T>::kInf));
  return counts;
}

// ---- ties

// The lowest `count` of the bits that are set.
uint64_t lowest_bits(uint64_t word, int64_t count) {
  uint64_t rest = word;
  for (; count > 0 && rest != 0; --count) rest &= rest - 1;
  return word ^ rest;
}

template <class T>
int64_t settle_as(const T* elements, int64_t n, const uint8_t* within, uint64_t first, uint64_t end,
                  int64_t quota, uint8_t* words) {
  typedef typename BitsOf<T>::U U;
  for (int64_t i = 0; i < n; i += kWord) {
    const Block<U> block((const U*)elements, i, n);
    const uint64_t equal = (bits_at_least(block.p, (U)first) & present(within, i, block.count)) &
                           ~bits_at_least(block.p, (U)end);
    if (equal == 0) continue;
    const int64_t count = __builtin_popcountll(equal);
    const uint64_t kept = count <= quota ? equal : lowest_bits(equal, quota);
    quota = count <= quota ? quota - count : 0;
    set_word(words, i, block.count, (word_at(words, i, block.count) & ~equal) | kept);
  }
  return quota;
}

// ---- entry points

void keys_entry(Type type, const void* x, int64_t n, const Ranking& ranking, uint64_t* keys) {
  switch (type) {
    case Type::kFloat32:
      return keys_of((const float*)x, n, ranking, keys);
    case Type::kFloat64:
      return keys_of((const double*)x, n, ranking, keys);
    case Type::kBFloat16:
      return keys_of((const bf16*)x, n, ranking, keys);
    case Type::kFloat16:
      return keys_of((const f16*)x, n, ranking, keys);
  }
}

SelectCounts sweep_entry(Type type, const void* x, int64_t n, const uint8_t* within,
                         const Ranking& ranking, const SelectBounds& bounds, uint8_t* words,
                         uint32_t* indices, uint64_t* keys) {
  switch (type) {
    case Type::kFloat32:
      return sweep_as((const float*)x, n, within, ranking, bounds, words, indices, keys);
    case Type::kFloat64:
      return sweep_as((const double*)x, n, within, ranking, bounds, words, indices, keys);
    case Type::kBFloat16:
      return sweep_as((const bf16*)x, n, within, ranking, bounds, words, indices, keys);
    case Type::kFloat16:
      return sweep_as((const f16*)x, n, within, ranking, bounds, words, indices, keys);
  }
  return {};
}

int64_t settle_entry(Type type, const void* x, int64_t n, const uint8_t* within, uint64_t first,
                     uint64_t end, int64_t quota, uint8_t* words) {
  switch (type) {
    case Type::kFloat32:
      return settle_as((const float*)x, n, within, first, end, quota, words);
    case Type::kFloat64:
      return settle_as((const double*)x, n, within, first, end, quota, words);
    case Type::kBFloat16:
      return settle_as((const bf16*)x, n, within, first, end, quota, words);
    case Type::kFloat16:
      return settle_as((const f16*)x, n, within, first, end, quota, words);
  }
  return quota;
}

}  // namespace

extern const SelectKernels kSelect;
const SelectKernels kSelect = {keys_entry, sweep_entry, settle_entry};

}  // namespace ppkernels::PPKERNELS_ISA
