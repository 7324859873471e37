// Compiled once per instruction set (CMakeLists.txt), each in its own namespace.
#include "kernels/statistics.h"

#include <math.h>

#include "kernels/bitmask.h"
#include "kernels/power.h"
#include "simd/doubles.h"

namespace ppkernels::PPKERNELS_ISA {

extern const BitmaskKernels kBitmask;
extern const PowerKernels kPower;

namespace {

// A block goes through the cache in pieces of so many elements: θ is computed into a buffer, and
// whoever comes after the first pass finds them near.
constexpr int64_t kPiece = 2048;

// The lanes of the sums, whatever the instruction set: Note [The order of the sums].
constexpr int kSumLanes = 16;
// Vectors of doubles that hold them.
constexpr int kWide = kSumLanes / kDoubles;

// Each pass counts the elements whose size is below so many limits.
constexpr int kLimits = 4;

// ---- which elements are looked at

// The first `n` elements at p, a part of a block that begins at a multiple of kSumLanes, and their
// bits; null: all of them.
template <class T>
struct Piece {
  const T* p;
  const uint8_t* words;
  int64_t n;
};

// What is left of a piece behind its last whole group of kSumLanes, as one with a mask.
template <class T>
class Rest {
 public:
  explicit Rest(const Piece<T>& piece) {
    const int64_t begin = piece.n / kSumLanes * kSumLanes, count = piece.n - begin;
    for (int64_t k = 0; k < count; ++k) {
      values_[k] = piece.p[begin + k];
      const uint32_t is_kept = piece.words == nullptr ? 1 : bit(piece.words, begin + k);
      words_[k / 8] = (uint8_t)(words_[k / 8] | is_kept << (k % 8));
    }
  }

  Piece<T> group() const { return {values_, words_, kSumLanes}; }

 private:
  T values_[kSumLanes] = {};
  uint8_t words_[kSumLanes / 8] = {};
};

// body(group) for each group of kSumLanes elements, the last one filled up with what no bit is set
// for. `body` takes whether there is a mask as a template argument.
template <class T, class Body>
PPKERNELS_INLINE void for_each_group(const Piece<T>& piece, Body& body) {
  int64_t i = 0;
  if (piece.words == nullptr) {
    for (; i + kSumLanes <= piece.n; i += kSumLanes) body.template add<false>(piece.p + i, nullptr);
  } else {
    for (; i + kSumLanes <= piece.n; i += kSumLanes)
      body.template add<true>(piece.p + i, piece.words + i / 8);
  }
  if (i == piece.n) return;
  const Rest<T> rest(piece);
  body.template add<true>(rest.group().p, rest.group().words);
}

// ---- counts below limits

template <class T>
class Below {
  using Lanes = typename LanesOf<T>::Type;
  using V = typename Lanes::V;
  using I = typename Lanes::I;

 public:
  explicit Below(const typename Lanes::Integer* limits) {
    for (int k = 0; k < kLimits; ++k) {
      limits_[k] = I{} + limits[k];
      found_[k] = I{};
    }
  }

  template <bool kMasked>
  PPKERNELS_INLINE void add_vector(V magnitude, I kept) {
    for (int k = 0; k < kLimits; ++k) {
      const I is_below = (I)bits(magnitude) < limits_[k];
      found_[k] -= kMasked ? is_below & kept : is_below;
    }
  }

  template <bool kMasked>
  PPKERNELS_INLINE void add(const T* p, const uint8_t* words) {
    for (int i = 0; i < kSumLanes; i += Lanes::kCount)
      add_vector<kMasked>(abs(load(p + i)), kMasked ? Lanes::kept(words, i) : I{});
  }

  // A lane counts at most the elements of a piece.
  int64_t found(int k) const {
    int64_t count = 0;
    for (int i = 0; i < Lanes::kCount; ++i) count += found_[k][i];
    return count;
  }

 private:
  I limits_[kLimits], found_[kLimits];
};

// ---- extremes and sums, with the first counts: what reads a piece first

template <class T>
class Sums {
  using Lanes = typename LanesOf<T>::Type;
  using V = typename Lanes::V;
  using I = typename Lanes::I;

 public:
  Sums() : least_(Lanes::splat(INFINITY)), largest_(Lanes::splat(-INFINITY)) {
    for (int j = 0; j < kWide; ++j) sum_[j] = sum_abs_[j] = sum_square_[j] = f64v{};
  }

  template <bool kMasked>
  PPKERNELS_INLINE void add(const T* p, const uint8_t* words, Below<T>& below) {
    for (int i = 0; i < kSumLanes; i += Lanes::kCount) {
      V x = load(p + i);
      I kept = {};
      if constexpr (kMasked) {
        kept = Lanes::kept(words, i);
        least_ = lesser(least_, kept ? x : Lanes::splat(INFINITY));
        largest_ = greater(largest_, kept ? x : Lanes::splat(-INFINITY));
        x = (V)((I)x & kept);
      } else {
        least_ = lesser(least_, x);
        largest_ = greater(largest_, x);
      }
      below.template add_vector<kMasked>(abs(x), kept);
      f64v wide[Lanes::kCount / kDoubles];
      widen(x, wide);
      for (int k = 0; k < Lanes::kCount / kDoubles; ++k) {
        const int j = i / kDoubles + k;
        sum_[j] += wide[k];
        sum_abs_[j] += abs(wide[k]);
        sum_square_[j] += wide[k] * wide[k];
      }
    }
  }

  Moments result() const {
    double least = INFINITY, largest = -INFINITY;
    for (int i = 0; i < Lanes::kCount; ++i) {
      least = least_[i] < least ? least_[i] : least;
      largest = largest_[i] > largest ? largest_[i] : largest;
    }
    // + 0.0 makes +0 of −0.
    return {least + 0.0, largest + 0.0, folded(sum_), folded(sum_abs_), folded(sum_square_)};
  }

 private:
  static double folded(const f64v* lanes) {
    double sum[kSumLanes];
    __builtin_memcpy(sum, lanes, sizeof(sum));
    for (int width = kSumLanes / 2; width > 0; width /= 2) {
      for (int k = 0; k < width; ++k) sum[k] += sum[k + width];
    }
    return sum[0];
  }

  V least_, largest_;
  f64v sum_[kWide], sum_abs_[kWide], sum_square_[kWide];
};

// Both for one group, as `for_each_group` calls it.
template <class T>
struct SumsAndBelow {
  Sums<T> sums;
  Below<T> below;
  template <bool kMasked>
  PPKERNELS_INLINE void add(const T* p, const uint8_t* words) {
    sums.template add<kMasked>(p, words, below);
  }
};

// ---- the histogram

// The bins of a piece, an element each: first all of them, then the counting, so that the elements
// of a vector are read back from memory, and not taken out of it one by one.
template <class T>
class Places {
  using Lanes = typename LanesOf<T>::Type;
  typedef int32_t Whole __attribute__((vector_size(kDoubles * 4)));

 public:
  explicit Places(const StatisticsQuery& query)
      : low_(splat_double(query.low)), high_(splat_double(query.high)),
        per_width_(splat_double(query.per_width)), last_(splat_double((double)(query.bins - 1))),
        none_(splat_double((double)query.bins)) {}

  template <bool kMasked>
  PPKERNELS_INLINE void add(const T* p, const uint8_t* words) {
    f64v x[kWide];
    for (int i = 0; i < kSumLanes; i += Lanes::kCount) widen(load(p + i), x + i / kDoubles);
    for (int j = 0; j < kWide; ++j) {
      i64v is_inside = (x[j] >= low_) & (x[j] <= high_);
      if constexpr (kMasked) is_inside &= (i64v)wide_lane_mask(words, j * kDoubles);
      const f64v place = lesser((x[j] - low_) * per_width_, last_);
      const Whole whole = __builtin_convertvector(is_inside ? place : none_, Whole);
      __builtin_memcpy(places_ + found_ + j * kDoubles, &whole, sizeof(whole));
    }
    found_ += kSumLanes;
  }

  // Neighbours in different histograms of `stride` counts each: kHistograms.
  void count(int64_t* histograms, int64_t stride) const {
    static_assert(kSumLanes % kHistograms == 0);
    for (int64_t i = 0; i < found_; i += kHistograms) {
      for (int k = 0; k < kHistograms; ++k) ++histograms[k * stride + places_[i + k]];
    }
  }

 private:
  f64v low_, high_, per_width_, last_, none_;
  int64_t found_ = 0;
  uint32_t places_[kPiece];
};

// ---- passes over a piece

template <class T>
PPKERNELS_LOOP void sum_and_count(const Piece<T> piece, SumsAndBelow<T>& total) {
  SumsAndBelow<T> here = total;  // in registers, as what the stores might alias is not
  for_each_group(piece, here);
  total = here;
}

template <class T>
PPKERNELS_LOOP void count_below(const Piece<T> piece, Below<T>& below) {
  Below<T> here = below;
  for_each_group(piece, here);
  below = here;
}

template <class T>
PPKERNELS_LOOP void count_places(const Piece<T> piece, const StatisticsQuery& query,
                                 int64_t* histograms) {
  Places<T> places(query);
  for_each_group(piece, places);
  places.count(histograms, query.bins + 1);
}

int64_t entries_of(const uint8_t* words, int64_t n) {
  if (words == nullptr) return n;
  int64_t count = kBitmask.count(words, n / 8);
  for (int64_t i = n / 8 * 8; i < n; ++i) count += bit(words, i);
  return count;
}

// ---- a block

// The limits of ε from `first` on; those behind the last are below nothing.
template <class T>
struct Limits {
  using Lanes = typename LanesOf<T>::Type;
  Limits(const StatisticsQuery& query, int64_t first, int count) {
    for (int k = 0; k < count && first + k < query.epsilon_count; ++k) {
      const double epsilon = query.epsilons[first + k];
      values[kLimits - count + k] = epsilon > 0 ? Lanes::limit(epsilon) : 0;
    }
  }
  typename Lanes::Integer values[kLimits] = {};
};

template <class T>
void block_of(const StatisticsQuery& query, const void* x_, const uint8_t* words, int64_t n,
              Moments* moments, int64_t* counts, int64_t* histograms) {
  using Lanes = typename LanesOf<T>::Type;
  const T* x = (const T*)x_;
  // The first pass counts what is no NaN, and the first few ε.
  constexpr int kFirst = kLimits - 1;
  Limits<T> first(query, 0, kFirst);
  first.values[0] = Lanes::kAboveInfinity;
  SumsAndBelow<T> total = {Sums<T>(), Below<T>(first.values)};
  T theta[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = n - i < kPiece ? n - i : kPiece;
    Piece<T> piece = {x + i, words == nullptr ? nullptr : words + i / 8, count};
    if (query.alpha != 1) {
      kPower.signed_power(query.type, query.alpha, piece.p, nullptr, theta, count, false);
      piece.p = theta;
    }
    sum_and_count(piece, total);
    for (int64_t e = kFirst; e < query.epsilon_count; e += kLimits) {
      Below<T> below(Limits<T>(query, e, kLimits).values);
      count_below(piece, below);
      for (int k = 0; k < kLimits && e + k < query.epsilon_count; ++k)
        counts[2 + e + k] += below.found(k);
    }
    if (query.bins > 0) count_places(piece, query, histograms);
  }
  const int64_t entries = entries_of(words, n);
  counts[0] += entries;
  counts[1] += entries - total.below.found(0);
  for (int k = 0; k < kFirst && k < query.epsilon_count; ++k)
    counts[2 + k] += total.below.found(1 + k);
  *moments = total.sums.result();
}

void block_entry(const StatisticsQuery& query, const void* x, const uint8_t* words, int64_t n,
                 Moments* moments, int64_t* counts, int64_t* histograms) {
  switch (query.type) {
    case Type::kFloat32:
      return block_of<float>(query, x, words, n, moments, counts, histograms);
    case Type::kBFloat16:
      return block_of<bf16>(query, x, words, n, moments, counts, histograms);
    case Type::kFloat16:
      return block_of<f16>(query, x, words, n, moments, counts, histograms);
    case Type::kFloat64:
      return block_of<double>(query, x, words, n, moments, counts, histograms);
  }
}

}  // namespace

extern const StatisticsKernels kStatistics;
const StatisticsKernels kStatistics = {block_entry};

}  // namespace ppkernels::PPKERNELS_ISA
