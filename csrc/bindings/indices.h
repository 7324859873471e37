// The indices of sparse weights, as ops take them: checks of their form, and threads over rows.
#pragma once

#include "bindings/tensors.h"
#include "kernels/cuts.h"
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

// An entry moved or counted is as much work as a row without any.
inline RowCosts costs_of(const Topology& topology) {
  return {topology.indices.offsets, topology.rows, 1};
}

// A part for each thread; they begin at multiples of `step`.
inline Cuts cuts_of(const Topology& topology, int64_t step = 1) {
  const RowCosts costs = costs_of(topology);
  return equal_cuts(costs, threads_for(costs.all()), step);
}

// Runs body(begin, end, p) for the rows of each part.
template <class Body>
inline void for_each_part(const Cuts& cut, const Body& body) {
  in_threads(int64_t(cut.size()) - 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) body(cut[size_t(p)], cut[size_t(p + 1)], p);
  });
}

}  // namespace ppkernels::bindings
