// Op `topology`: the CPU kernels under the schemas of ppkernels/ops/topology/op.py.
#include "kernels/topology.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/indices.h"
#include "bindings/masks.h"

namespace ppkernels::bindings {
namespace {

const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }

Tensor new_1d(const Tensor& like, int64_t size, ScalarType type) {
  return torch::stable::new_empty(like, {size}, type);
}

// ---- from and to the bits of a mask

std::tuple<Tensor, Tensor> topology_of_mask(const Tensor& words, int64_t rows,
                                            int64_t in_features) {
  constexpr const char* kOp = "topology_of_mask";
  require(rows >= 0 && in_features >= 0, kOp, ": rows and in_features must be 0 or more, got ",
          rows, " and ", in_features);
  check_words(kOp, words, rows * in_features);
  const TopologyKernels& kernels = topology_kernels(isa());
  const uint8_t* bits = bytes_of(words);
  std::vector<int64_t> counts(static_cast<size_t>(rows));
  // Both passes read words, a bit an entry of the weight, or one number a row.
  const Cuts cut = even_cuts(rows, threads_for(rows * (1 + in_features / 64)));
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t) {
    kernels.count_rows(bits, in_features, begin, end, counts.data());
  });

  Tensor offsets = new_1d(words, rows + 1, ScalarType::Int);
  int32_t* ends = offsets.mutable_data_ptr<int32_t>();
  int64_t entries = 0;
  for (int64_t n = 0; n < rows; ++n) {
    ends[n] = int32_t(entries);
    entries += counts[size_t(n)];
    require(entries < kIndexLimit, kOp,
            ": a topology can have 2^31 - 1 entries, the mask has more");
  }
  ends[rows] = int32_t(entries);

  Tensor columns = new_1d(words, entries, index_type(in_features));
  void* to = columns.mutable_data_ptr();
  const bool wide = columns.scalar_type() == ScalarType::Int;
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t) {
    kernels.columns_of(bits, in_features, ends, begin, end, to, wide);
  });
  return {offsets, columns};
}

Tensor mask_of_topology(const Tensor& offsets, const Tensor& columns, int64_t in_features) {
  const Topology topology = spanning("mask_of_topology", offsets, columns, in_features);
  Tensor words = new_1d(offsets, mask_bytes(topology.rows * in_features), ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(words.mutable_data_ptr());
  const auto kernel = topology_kernels(isa()).bits_of;
  // Eight rows are a whole number of bytes.
  const Cuts cut = cuts_of(topology, 8);
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t) {
    kernel(topology.indices, in_features, begin, end, to);
  });
  return words;
}

// ---- column by column

// In how many parts the entries are put into columns: each counts in numbers of its own.
int64_t transposing_parts(const Topology& topology) {
  const int64_t most = topology.count / (1 + 2 * topology.limit);
  return std::clamp(most, int64_t(1), threads_for(topology.count));
}

std::tuple<Tensor, Tensor, Tensor> transpose_topology(const Tensor& offsets, const Tensor& columns,
                                                      int64_t in_features, int64_t taps) {
  constexpr const char* kOp = "transpose_topology";
  const Topology topology = spanning(kOp, offsets, columns, in_features);
  require(taps >= 0 && topology.rows * taps <= kIndexLimit, kOp,
          ": rows * taps must be at most 2^31, got ", topology.rows, " * ", taps);
  require(taps > 0 || topology.count == 0, kOp, ": taps must be a divisor of in_features, got 0");
  const TopologyKernels& kernels = topology_kernels(isa());
  const int64_t parts = transposing_parts(topology);
  const Cuts cut = equal_cuts(costs_of(topology), parts);
  // next[p·K + k]: how many entries part p has in column k, then where the next of them goes.
  std::vector<int32_t> next(static_cast<size_t>(parts * in_features), 0);
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t p) {
    kernels.count_columns(topology.indices, begin, end, next.data() + p * in_features);
  });

  Tensor ends = new_1d(offsets, in_features + 1, ScalarType::Int);
  int32_t *end = ends.mutable_data_ptr<int32_t>(), at = 0;
  for (int64_t k = 0; k < in_features; ++k) {
    end[k] = at;
    for (int64_t p = 0; p < parts; ++p) {
      int32_t& place = next[size_t(p * in_features + k)];
      const int32_t count = place;
      place = at;
      at += count;
    }
  }
  end[in_features] = at;

  Tensor rows = new_1d(offsets, topology.count, index_type(topology.rows * taps));
  Tensor order = new_1d(offsets, topology.count, ScalarType::Int);
  void* to = rows.mutable_data_ptr();
  int32_t* positions = order.mutable_data_ptr<int32_t>();
  const bool wide = rows.scalar_type() == ScalarType::Int;
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t p) {
    kernels.transpose(topology.indices, in_features, taps, begin, end,
                      next.data() + p * in_features, to, wide, positions);
  });
  return {ends, rows, order};
}

// ---- from and to a weight

// Where the elements of a weight of any strides lie, as the matrix of its rows.
class Layout {
 public:
  explicit Layout(const Tensor& weight) {
    const int64_t bytes = weight.element_size();
    layout_ = {bytes, weight.dim() > 0 ? weight.stride(0) * bytes : 0, bytes, nullptr};
    // The inner dimensions as one, if there is a step that fits all of them.
    int64_t features = 1, step = 0;
    bool is_one = true;
    for (int64_t d = weight.dim() - 1; d > 0; --d) {
      if (weight.size(d) == 1) continue;
      if (features == 1) step = weight.stride(d);
      is_one = is_one && weight.stride(d) == step * features;
      features *= weight.size(d);
    }
    if (features > 1) layout_.column_bytes = step * bytes;
    if (!is_one) fill_table(weight, features, bytes);
  }

  const WeightLayout& get() const { return layout_; }

 private:
  void fill_table(const Tensor& weight, int64_t features, int64_t bytes) {
    table_.assign(static_cast<size_t>(features), 0);
    int64_t run = 1;  // columns until the index of dimension d grows
    for (int64_t d = weight.dim() - 1; d > 0; --d) {
      for (int64_t k = 0; k < features; ++k) {
        table_[size_t(k)] += k / run % weight.size(d) * weight.stride(d) * bytes;
      }
      run *= weight.size(d);
    }
    layout_.table = table_.data();
  }

  WeightLayout layout_;
  std::vector<int64_t> table_;
};

void check_element(const char* op, const char* name, const Tensor& t) {
  const int64_t bytes = t.element_size();
  require(t.is_cpu() && (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8), op, ": ", name,
          " must be a CPU tensor with elements of 1, 2, 4 or 8 bytes, got ", described(t));
}

Tensor gather_kept(const Tensor& weight, const Tensor& offsets, const Tensor& columns) {
  constexpr const char* kOp = "gather_kept";
  check_element(kOp, "weight", weight);
  require(weight.dim() >= 2 && weight.size(0) == offsets.numel() - 1, kOp,
          ": weight must have a row for each of the topology's, ", offsets.numel() - 1, ", got ",
          described(weight));
  int64_t in_features = 1;
  for (int64_t d = 1; d < weight.dim(); ++d) in_features *= weight.size(d);
  const Topology topology = spanning(kOp, offsets, columns, in_features);
  const Layout layout(weight);
  Tensor values = torch::stable::new_empty(weight, {topology.count});
  const void* from = weight.const_data_ptr();
  void* to = values.mutable_data_ptr();
  const auto kernel = topology_kernels(isa()).gather;
  for_each_part(cuts_of(topology), [&](int64_t begin, int64_t end, int64_t) {
    kernel(topology.indices, from, layout.get(), begin, end, to);
  });
  return values;
}

Tensor scatter_kept(const Tensor& values, const Tensor& offsets, const Tensor& columns,
                    int64_t in_features) {
  constexpr const char* kOp = "scatter_kept";
  check_element(kOp, "values", values);
  const Topology topology = spanning(kOp, offsets, columns, in_features);
  topology.check_values(kOp, values);
  const Tensor in_order = torch::stable::contiguous(values);
  Tensor weight = torch::stable::new_empty(values, {topology.rows, in_features});
  const void* from = in_order.const_data_ptr();
  void* to = weight.mutable_data_ptr();
  const int64_t bytes = values.element_size();
  const auto kernel = topology_kernels(isa()).scatter;
  // Zeros are most of the work, and each row has as many.
  const Cuts cut = even_cuts(topology.rows, threads_for(weight.numel()));
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t) {
    kernel(topology.indices, in_features, from, bytes, begin, end, to);
  });
  return weight;
}

// ---- entries dropped and grown

using Changed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Changed change_topology(const Tensor& offsets, const Tensor& columns, int64_t in_features,
                        const Tensor& drop_, const Tensor& grow_) {
  constexpr const char* kOp = "change_topology";
  const Topology topology = spanning(kOp, offsets, columns, in_features);
  const Tensor drop = torch::stable::contiguous(drop_), grow = torch::stable::contiguous(grow_);
  check_list(kOp, "drop", drop, ScalarType::Long);
  check_list(kOp, "grow", grow, ScalarType::Long);
  const int64_t *dropped = drop.const_data_ptr<int64_t>(), *grown = grow.const_data_ptr<int64_t>();
  const int64_t count = topology.count - drop.numel() + grow.numel();
  require(count >= 0 && count < kIndexLimit, kOp, ": a topology can have 2^31 - 1 entries, got ",
          topology.count, " - ", drop.numel(), " + ", grow.numel());

  Tensor new_offsets = new_1d(offsets, topology.rows + 1, ScalarType::Int);
  Tensor new_columns = new_1d(offsets, count, columns.scalar_type());
  Tensor origin = new_1d(offsets, count, ScalarType::Long);
  Tensor refused = torch::stable::new_empty(offsets, {}, ScalarType::Long);
  int32_t* ends = new_offsets.mutable_data_ptr<int32_t>();
  void* to = new_columns.mutable_data_ptr();
  int64_t* from = origin.mutable_data_ptr<int64_t>();
  ends[0] = 0;
  const auto kernel = topology_kernels(isa()).change;
  // What lies in the rows before row n, of both lists.
  const auto drops_before = [&](int64_t n) {
    const int64_t* end = dropped + drop.numel();
    return std::lower_bound(dropped, end, int64_t(topology.indices.offsets[n])) - dropped;
  };
  const auto grows_before = [&](int64_t n) {
    return std::lower_bound(grown, grown + grow.numel(), n * in_features) - grown;
  };
  const Cuts cut = cuts_of(topology);
  std::vector<int64_t> twice(cut.size(), -1);
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t p) {
    const int64_t d = drops_before(begin), g = grows_before(begin);
    const int64_t at = topology.indices.offsets[begin] - d + g;
    twice[size_t(p)] =
        kernel(topology.indices, in_features, begin, end, dropped + d, drops_before(end) - d,
               grown + g, grows_before(end) - g, at, ends, to, from);
  });
  const auto place = std::find_if(twice.begin(), twice.end() - 1, [](int64_t p) { return p >= 0; });
  *refused.mutable_data_ptr<int64_t>() = *place;
  return {new_offsets, new_columns, origin, refused};
}

// ---- what is wrong

Tensor topology_fault(const Tensor& offsets, const Tensor& columns, int64_t in_features) {
  const Topology topology("topology_fault", offsets, columns, in_features);
  Tensor fault = torch::stable::new_empty(offsets, {}, ScalarType::Long);
  const auto kernel = topology_kernels(isa()).fault;
  TopologyFault worst = topology.spans() ? TopologyFault::kNone : TopologyFault::kOffsets;
  // By rows: what the offsets say of the entries is not known to be true.
  const Cuts cut = even_cuts(topology.rows, threads_for(topology.rows + topology.count));
  std::vector<TopologyFault> found(cut.size(), TopologyFault::kNone);
  for_each_part(cut, [&](int64_t begin, int64_t end, int64_t p) {
    found[size_t(p)] = kernel(topology.indices, in_features, begin, end);
  });
  for (TopologyFault each : found) {
    const bool is_first =
        each != TopologyFault::kNone && (worst == TopologyFault::kNone || each < worst);
    if (is_first) worst = each;
  }
  *fault.mutable_data_ptr<int64_t>() = int64_t(worst);
  return fault;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("topology_of_mask", TORCH_BOX(&topology_of_mask));
  m.impl("mask_of_topology", TORCH_BOX(&mask_of_topology));
  m.impl("transpose_topology", TORCH_BOX(&transpose_topology));
  m.impl("gather_kept", TORCH_BOX(&gather_kept));
  m.impl("scatter_kept", TORCH_BOX(&scatter_kept));
  m.impl("change_topology", TORCH_BOX(&change_topology));
  m.impl("topology_fault", TORCH_BOX(&topology_fault));
}

}  // namespace ppkernels::bindings
