// The indices of sparse weights, as ops take them: checks of their form, and threads over rows.
#pragma once

#include <algorithm>
#include <vector>

#include "bindings/tensors.h"
#include "kernels/indices.h"

namespace ppkernels::bindings {

// Indices are 32 bits wide.
inline constexpr int64_t kIndexLimit = int64_t(1) << 31;

inline ScalarType index_type(int64_t limit) {
  return limit <= int64_t(1) << 16 ? ScalarType::UInt16 : ScalarType::Int;
}

inline void check_list(const char* op, const char* name, const Tensor& t, ScalarType type) {
  if (t.is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.is_contiguous()) return;
  require(false, op, ": ", name, " must be a contiguous 1-dim CPU tensor of ",
          torch::headeronly::toString(type), ", got ", described(t));
}

// A topology's indices as kernels take them. Their form is checked; that they are in range and in
// order is trusted, since `pp.Topology` checks it, once.
class Topology {
 public:
  // Columns are below `limit`: K. A transposed topology has rows in their place, below N·taps, and
  // its errors call them by that `name`.
  Topology(const char* op, const Tensor& offsets, const Tensor& columns, int64_t limit_,
           const char* name = "columns")
      : limit(limit_), rows(offsets.numel() - 1), count(columns.numel()) {
    require(limit >= 0 && limit <= kIndexLimit, op, ": the limit of ", name,
            " must be in 0 ... 2^31, got ", limit);
    check_list(op, "offsets", offsets, ScalarType::Int);
    check_list(op, name, columns, index_type(limit));
    require(rows >= 0, op, ": offsets must have a number for each row and one more, got none");
    indices = {offsets.const_data_ptr<int32_t>(), columns.const_data_ptr(),
               columns.scalar_type() == ScalarType::Int, count};
  }

  // Whether the offsets go from the first to the last entry.
  bool spans() const { return indices.offsets[0] == 0 && indices.offsets[rows] == count; }

  void check_values(const char* op, const Tensor& values) const {
    require(values.dim() == 1 && values.numel() == count, op, ": values must have shape (", count,
            "), one for each entry, got ", described(values));
  }

  // The positions of a transposed topology's entries among the values.
  const int32_t* checked_order(const char* op, const Tensor& order) const {
    check_list(op, "order", order, ScalarType::Int);
    require(order.numel() == count, op, ": order must have shape (", count,
            "), one for each entry, got ", described(order));
    return order.const_data_ptr<int32_t>();
  }

  int64_t limit, rows, count;
  SparseIndices indices;
};

// The same for ops that read memory by what the offsets say.
inline Topology spanning(const char* op, const Tensor& offsets, const Tensor& columns,
                         int64_t limit, const char* name = "columns") {
  const Topology topology(op, offsets, columns, limit, name);
  const int32_t* ends = topology.indices.offsets;
  require(topology.spans(), op, ": offsets must begin with 0 and end with the number of ", name,
          ", ", topology.count, ", got ", ends[0], " and ", ends[topology.rows]);
  return topology;
}

// ---- threads

// Rows cut into parts, one for each thread at most: part p is rows cut[p] ... cut[p + 1] − 1.
using Cuts = std::vector<int64_t>;

// How many threads a pass over `work` numbers is worth.
inline int64_t parts_of(int64_t work) {
  return std::clamp(work / kGrain, int64_t(1), int64_t(torch::stable::get_num_threads()));
}

// Parts of as many rows each.
inline Cuts even_cuts(int64_t rows, int64_t parts) {
  Cuts cut;
  for (int64_t p = 0; p <= parts; ++p) cut.push_back(rows * p / parts);
  return cut;
}

// Parts of as many entries each, a row counted as one more; they begin at multiples of `step`.
inline Cuts cuts_of(const Topology& topology, int64_t parts, int64_t step = 1) {
  const int32_t* offsets = topology.indices.offsets;
  const int64_t all = topology.rows + topology.count;
  Cuts cut = {0};
  for (int64_t p = 1; p < parts; ++p) {
    int64_t low = cut.back(), high = topology.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + offsets[middle] < all * p / parts) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    cut.push_back(std::min((low + step - 1) / step * step, topology.rows));
  }
  cut.push_back(topology.rows);
  return cut;
}

inline Cuts cuts_of(const Topology& topology) {
  return cuts_of(topology, parts_of(topology.rows + topology.count));
}

// Runs body(begin, end, p) for each part, in as many threads.
template <class Body>
inline void for_each_part_of(const Cuts& cut, const Body& body) {
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) body(cut[size_t(p)], cut[size_t(p + 1)], p);
  };
  const int64_t parts = int64_t(cut.size()) - 1;
  if (parts == 1) return run(0, 1);
  torch::stable::parallel_for(0, parts, 1, run);
}

}  // namespace ppkernels::bindings
