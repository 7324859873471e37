// The statistics kernels over raw memory, against loops that take one element at a time in the
// order that kernels/statistics.h states: every bit of the sums, on every instruction set. Buffers
// are heap blocks of exactly the size in use, so that the address sanitizer sees any step outside.
#include "kernels/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "kernels/power.h"
#include "values.h"

namespace {

using ppkernels::kHistograms;
using ppkernels::kStatisticsBlock;
using ppkernels::Moments;
using ppkernels::StatisticsQuery;
using ppkernels::Type;
using ppkernels_test::bfloat_value;
using ppkernels_test::from_bits;
using ppkernels_test::half_value;
using ppkernels_test::kInf;
using ppkernels_test::kNaN;
using ppkernels_test::Random;
using ppkernels_test::to_bits;

ppkernels::Isa isa;

constexpr Type kTypes[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};
// Around a vector, the lanes of the sums, a piece that is powered at once, and a block.
constexpr int64_t kSizes[] = {0,  1,  7,    8,    15,   16,   17,    31,
                              33, 64, 2047, 2048, 2049, 5001, 32753, kStatisticsBlock};

size_t bytes_of(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }

using Bytes = std::vector<uint8_t>;

void put(Bytes& to, Type type, size_t i, double value) {
  const float single = float(value);
  const uint16_t upper = uint16_t(to_bits(single) >> 16);
  if (type == Type::kFloat64) std::memcpy(to.data() + 8 * i, &value, 8);
  if (type == Type::kFloat32) std::memcpy(to.data() + 4 * i, &single, 4);
  if (type == Type::kBFloat16) std::memcpy(to.data() + 2 * i, &upper, 2);
}

double get(const Bytes& from, Type type, size_t i) {
  double value;
  float single;
  uint16_t half;
  if (type == Type::kFloat64) return std::memcpy(&value, from.data() + 8 * i, 8), value;
  if (type == Type::kFloat32) return std::memcpy(&single, from.data() + 4 * i, 4), double(single);
  std::memcpy(&half, from.data() + 2 * i, 2);
  return type == Type::kBFloat16 ? bfloat_value(half) : half_value(half);
}

// Weights of a usual size; with `special`, zeros, subnormals, infinities and, at 2, NaN among them.
Bytes drawn(Type type, int64_t n, uint64_t seed, int special) {
  const double rare[] = {0.0, -0.0, 0x1p-149, -0x1p-1074, kInf, -double(kInf), kNaN};
  Bytes x(size_t(n) * bytes_of(type));
  Random random{seed};
  for (size_t i = 0; i < size_t(n); ++i) {
    const bool is_rare = special > 0 && random.next() % 5 == 0;
    const double value = is_rare ? rare[random.next() % (special > 1 ? 7 : 6)]
                                 : random.centered() * (1 + random.next() * 0x1p-32);
    if (type != Type::kFloat16) {
      put(x, type, i, value);
      continue;
    }
    // Of all half floats, those that `special` allows.
    uint16_t half = uint16_t(random.next());
    if (!is_rare && (half & 0x7c00) == 0x7c00) half &= 0x83ff;
    if (special < 2 && std::isnan(half_value(half))) half = 0x7c00;
    std::memcpy(x.data() + 2 * i, &half, 2);
  }
  return x;
}

struct Result {
  Moments moments;
  std::vector<int64_t> counts, histogram;
};

Result called(ppkernels::Isa set, const StatisticsQuery& query, const Bytes& x, const Bytes* words,
              int64_t n) {
  Result r = {{kNaN, kNaN, kNaN, kNaN, kNaN},
              std::vector<int64_t>(size_t(2 + query.epsilon_count)),
              std::vector<int64_t>(size_t(query.bins))};
  std::vector<int64_t> histograms(query.bins > 0 ? size_t(kHistograms * (query.bins + 1)) : 0);
  ppkernels::statistics_kernels(set).block(query, x.data(), words ? words->data() : nullptr, n,
                                           &r.moments, r.counts.data(), histograms.data());
  int64_t all = 0;
  for (int64_t count : histograms) all += count;
  for (size_t b = 0; b < r.histogram.size(); ++b) {
    for (size_t k = 0; k < size_t(kHistograms); ++k)
      r.histogram[b] += histograms[k * (r.histogram.size() + 1) + b];
  }
  CHECK(query.bins == 0 || all >= n, "%d of %d elements are in no bin, not even the last",
        int(n - all), int(n));
  return r;
}

double folded(std::vector<double> lanes) {
  for (size_t width = 8; width > 0; width /= 2) {
    for (size_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

// The same by the definition, from the θ of op `power`.
Result expected(const StatisticsQuery& query, const Bytes& x, const Bytes* words, int64_t n) {
  Bytes theta(x.size());
  ppkernels::power_kernels(isa).signed_power(query.type, query.alpha, x.data(), nullptr,
                                             theta.data(), n, false);
  Result r = {{kInf, -kInf, 0, 0, 0},
              std::vector<int64_t>(size_t(2 + query.epsilon_count)),
              std::vector<int64_t>(size_t(query.bins))};
  std::vector<double> sum(16), sum_abs(16), sum_square(16);
  for (size_t i = 0; i < size_t(n); ++i) {
    if (words && !((*words)[i / 8] >> (i % 8) & 1)) continue;
    const double value = get(theta, query.type, i);
    ++r.counts[0];
    r.counts[1] += std::isnan(value);
    for (size_t e = 0; e < size_t(query.epsilon_count); ++e)
      r.counts[2 + e] += std::fabs(value) < query.epsilons[e];
    if (value < r.moments.min) r.moments.min = value + 0.0;
    if (value > r.moments.max) r.moments.max = value + 0.0;
    sum[i % 16] += value;
    sum_abs[i % 16] += std::fabs(value);
    sum_square[i % 16] += value * value;
    if (query.bins > 0 && value >= query.low && value <= query.high) {
      const auto place = size_t((value - query.low) * query.per_width);
      ++r.histogram[std::min(place, r.histogram.size() - 1)];
    }
  }
  r.moments.sum = folded(sum);
  r.moments.sum_abs = folded(sum_abs);
  r.moments.sum_square = folded(sum_square);
  return r;
}

bool same(double a, double b) {
  uint64_t p, q;
  std::memcpy(&p, &a, sizeof p);
  std::memcpy(&q, &b, sizeof q);
  return p == q || (a != a && b != b);
}

void check_equal(const char* what, const StatisticsQuery& query, int64_t n, const Result& came,
                 const Result& wanted) {
  const double a[] = {came.moments.min, came.moments.max, came.moments.sum, came.moments.sum_abs,
                      came.moments.sum_square};
  const double b[] = {wanted.moments.min, wanted.moments.max, wanted.moments.sum,
                      wanted.moments.sum_abs, wanted.moments.sum_square};
  for (int k = 0; k < 5 && wanted.counts[1] == 0; ++k) {
    CHECK(same(a[k], b[k]), "%s: type %d, alpha %g, %d elements: moment %d is %a, not %a", what,
          int(query.type), query.alpha, int(n), k, a[k], b[k]);
  }
  for (size_t k = 0; k < wanted.counts.size(); ++k) {
    CHECK(came.counts[k] == wanted.counts[k],
          "%s: type %d, alpha %g, %d elements: count %d is %d, not %d", what, int(query.type),
          query.alpha, int(n), int(k), int(came.counts[k]), int(wanted.counts[k]));
  }
  for (size_t b_ = 0; b_ < wanted.histogram.size(); ++b_) {
    CHECK(came.histogram[b_] == wanted.histogram[b_],
          "%s: type %d, alpha %g, %d elements: bin %d has %d, not %d", what, int(query.type),
          query.alpha, int(n), int(b_), int(came.histogram[b_]), int(wanted.histogram[b_]));
  }
}

// ---- checks

// More than are counted in one pass, or in two; the ends of the number line among them.
const std::vector<double> kEpsilons = {1e-3,  0.25, 0.1,  0,    -1,    0x1p-149, 1e-60,
                                       1e300, 0.5,  kInf, kNaN, 65504, 0x1p-126};

void test_blocks() {
  uint64_t seed = 0;
  for (Type type : kTypes) {
    for (double alpha : {1.0, 1.25, 1.5, 2.0, 150.0}) {
      for (int64_t n : kSizes) {
        for (int special : {0, 1, 2}) {
          const Bytes x = drawn(type, n, ++seed, special);
          Bytes words(size_t((n + 7) / 8));
          Random random{seed};
          // The bits behind the last entry are not looked at.
          for (uint8_t& byte : words) byte = uint8_t(random.next());
          const int64_t count = int64_t(seed % (kEpsilons.size() + 1)), bins = seed % 3 * 7;
          const StatisticsQuery query = {type,  alpha, kEpsilons.data(),   count, bins,
                                         -0.25, 0.3,   double(bins) / 0.55};
          for (const Bytes* mask : {(const Bytes*)nullptr, (const Bytes*)&words}) {
            const Result came = called(isa, query, x, mask, n);
            check_equal("definition", query, n, came, expected(query, x, mask, n));
            check_equal("baseline", query, n, came,
                        called(ppkernels::Isa::kBaseline, query, x, mask, n));
          }
        }
      }
    }
  }
}

// Each float32 next to ε counts as the comparison in float64 says.
void test_limits() {
  Random random;
  for (int round = 0; round < 2000; ++round) {
    const float f = from_bits(random.next() & 0x7fffffffu);
    if (!std::isfinite(f)) continue;
    const double up = double(from_bits(to_bits(f) + 1));
    for (double epsilon : {double(f), std::nextafter(double(f), 2.0 * kInf),
                           std::nextafter(double(f), -1.0), (double(f) + up) / 2}) {
      const StatisticsQuery query = {Type::kFloat32, 1, &epsilon, 1, 0, 0, 1, 0};
      Bytes x(8);
      put(x, Type::kFloat32, 0, f);
      put(x, Type::kFloat32, 1, -up);
      const int64_t wanted = (f < epsilon) + (up < epsilon);
      const Result r = called(isa, query, x, nullptr, 2);
      CHECK(r.counts[2] == wanted, "%a and %a: %d below %a, not %d", f, -up, int(r.counts[2]),
            epsilon, int(wanted));
    }
  }
}

// Any address, and results that are added to what is there.
void test_memory() {
  const Bytes x = drawn(Type::kFloat32, 100, 3, 1);
  const double epsilon = 0.1;
  const StatisticsQuery query = {Type::kFloat32, 1, &epsilon, 1, 2, -1, 1, 1};
  for (size_t offset = 0; offset < 5; ++offset) {
    const Bytes part(x.begin() + std::ptrdiff_t(4 * offset), x.end());
    const int64_t n = 100 - int64_t(offset);
    const Result wanted = expected(query, part, nullptr, n);
    Moments moments;
    int64_t counts[] = {10, 20, 30}, histograms[3 * kHistograms] = {5};
    ppkernels::statistics_kernels(isa).block(query, x.data() + 4 * offset, nullptr, n, &moments,
                                             counts, histograms);
    CHECK(same(moments.sum, wanted.moments.sum), "%a, not %a", moments.sum, wanted.moments.sum);
    for (int k = 0; k < 3; ++k)
      CHECK(counts[k] == 10 * (k + 1) + wanted.counts[size_t(k)], "count %d", k);
    int64_t first = -5;
    for (int k = 0; k < kHistograms; ++k) first += histograms[3 * k];
    CHECK(first == wanted.histogram[0], "first bin: %d", int(first));
  }
}

}  // namespace

int main() {
  isa = ppkernels_test::isa_under_test();
  test_blocks();
  test_limits();
  test_memory();
  std::printf("statistics: all checks passed\n");
  return 0;
}
