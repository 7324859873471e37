// Op `statistics`: the CPU kernels under the schema of ppkernels/ops/statistics/op.py.
#include "kernels/statistics.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/masks.h"

namespace ppkernels::bindings {
namespace {

constexpr const char* kOp = "statistics";
// The first two counts: entries, and NaNs among them.
constexpr int64_t kFirstCounts = 2;

void check_bins(int64_t bins, double low, double high) {
  require(bins >= 0 && bins < std::numeric_limits<int32_t>::max(), kOp,
          ": bins must be a number from 0 to 2^31 - 2, got ", bins);
  const bool fits =
      low < high && std::isfinite(high - low) && std::isfinite(double(bins) / (high - low));
  require(bins == 0 || fits, kOp,
          ": low must be below high, and their difference finite, also as its inverse; got ", low,
          " and ", high);
}

// Counts of one thread, or of all.
struct Counts {
  explicit Counts(const StatisticsQuery& query)
      : first(size_t(kFirstCounts + query.epsilon_count)),
        histograms(query.bins > 0 ? size_t(kHistograms * (query.bins + 1)) : 0) {}

  // `counts` is first, epsilons, bins.
  void add_to(int64_t* counts, int64_t bins) const {
    for (size_t k = 0; k < first.size(); ++k) counts[k] += first[k];
    for (int64_t b = 0; b < bins; ++b) {
      for (int k = 0; k < kHistograms; ++k)
        counts[int64_t(first.size()) + b] += histograms[size_t(k * (bins + 1) + b)];
    }
  }

  std::vector<int64_t> first, histograms;
};

// The moments of all blocks, in order; of no meaning where there is a NaN.
Moments total_of(const std::vector<Moments>& blocks) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  Moments total = {kInf, -kInf, 0, 0, 0};
  for (const Moments& block : blocks) {
    total.min = std::min(total.min, block.min);
    total.max = std::max(total.max, block.max);
    total.sum += block.sum;
    total.sum_abs += block.sum_abs;
    total.sum_square += block.sum_square;
  }
  return total;
}

void write(const Moments& total, bool has_nan, double* out) {
  const double values[] = {total.min, total.max, total.sum, total.sum_abs, total.sum_square};
  for (double value : values) *out++ = has_nan ? std::numeric_limits<double>::quiet_NaN() : value;
}

std::tuple<Tensor, Tensor> statistics(const Tensor& weight, const Tensor& alpha,
                                      std::vector<double> epsilons, int64_t bins, double low,
                                      double high, std::optional<Tensor> words) {
  const Type type = type_of(kOp, weight);
  const double exponent = exponent_of(kOp, "alpha", alpha);
  check_bins(bins, low, high);
  const StatisticsQuery query = {type,
                                 exponent,
                                 epsilons.data(),
                                 int64_t(epsilons.size()),
                                 bins,
                                 low,
                                 high,
                                 double(bins) / (high - low)};
  // A dense weight in the order of its memory, any other in row-major order.
  const Tensor x = is_dense(weight) ? weight : torch::stable::contiguous(weight);
  const OptionalMask mask(kOp, words, x);
  const auto from = memory(x);
  const int64_t n = x.numel(), blocks = (n + kStatisticsBlock - 1) / kStatisticsBlock;
  const int64_t count = kFirstCounts + query.epsilon_count + bins;

  Tensor moments = torch::stable::new_empty(weight, {5}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(weight, {count}, ScalarType::Long);
  int64_t* to = counts.mutable_data_ptr<int64_t>();
  std::fill_n(to, count, int64_t(0));
  std::vector<Moments> of_block(static_cast<size_t>(blocks));
  std::mutex adding;
  const auto kernel = statistics_kernels(isa()).block;
  const auto part = [&](int64_t begin, int64_t end) {
    Counts here(query);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t i = b * kStatisticsBlock;
      kernel(query, from.at(i), mask.at(i), std::min(kStatisticsBlock, n - i), &of_block[size_t(b)],
             here.first.data(), here.histograms.data());
    }
    const std::lock_guard<std::mutex> lock(adding);
    here.add_to(to, bins);
  };
  in_threads(blocks, 1, part);
  write(total_of(of_block), to[1] > 0, moments.mutable_data_ptr<double>());
  return {moments, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) { m.impl("statistics", TORCH_BOX(&statistics)); }

}  // namespace ppkernels::bindings
