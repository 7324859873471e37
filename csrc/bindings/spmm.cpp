// Op `spmm`: the CPU kernels under the schemas of ppkernels/ops/spmm/op.py.
#include "kernels/spmm.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings/indices.h"
#include "bindings/sparse.h"
#include "kernels/scratch.h"

namespace ppkernels::bindings {
namespace {

// ---- arguments

// An argument [..., features] as the matrix [batch, features].
struct Batch {
  Batch(const char* op, const char* name, const Tensor& t) : tensor(t) {
    matrix.type = kernel_type(op, name, t);
    require(t.dim() >= 1, op, ": ", name, " must have a dimension of features");
    features = t.size(t.dim() - 1);
    for (int64_t d = 0; d + 1 < t.dim(); ++d) count *= t.size(d);
    const int64_t row = t.dim() == 2 ? t.stride(0) : 1, column = t.stride(t.dim() - 1);
    if (t.dim() <= 2 && (column == 1 || features == 1)) {
      matrix.row_stride = row, matrix.column_stride = 1;
    } else if (t.dim() <= 2 && (row == 1 || count == 1)) {
      matrix.row_stride = 1, matrix.column_stride = column;
    } else {
      tensor = torch::stable::contiguous(t);
      matrix.row_stride = features, matrix.column_stride = 1;
    }
    matrix.data = tensor.const_data_ptr();
  }

  Tensor tensor;  // keeps the memory alive
  SpmmMatrix matrix = {};
  int64_t count = 1, features = 0;
};

// A weight: its indices, and what an op has of its values and their order.
struct Weight {
  explicit Weight(const Topology& topology_) : topology(topology_) {
    entries.indices = topology.indices;
  }

  void set_values(const char* op, const Tensor& t) {
    entries.type = kernel_type(op, "values", t);
    topology.check_values(op, t);
    values = torch::stable::contiguous(t);
    entries.values = values->const_data_ptr();
  }

  Topology topology;
  SpmmEntries entries = {};
  int64_t rows = topology.rows, count = topology.count;
  std::optional<Tensor> values;
};

Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max(sizes[d], int64_t(1));
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_of(const Tensor& like, int64_t features) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = features;
  return empty_of(like, sizes);
}

// ---- how the work is cut

// A thread more for this many products of an entry and a vector, some 25 µs of work: one that
// sleeps takes longer than that to wake up. Measured: ops/spmm/README.md.
constexpr int64_t kWorkPerThread = int64_t(1) << 16;
// A panel larger than this leaves L2, and narrower ones are faster.
constexpr int64_t kPanelBytes = int64_t(3) << 19;
// A row of the weight costs as much as this many of its entries, before it has any.
constexpr int64_t kRowCost = 8;
// Parts begin at such rows, so that two threads share no line of the output.
constexpr int64_t kRowBlock = 16;

// Values through an order are put in order first where enough panels read them: from two panels on
// where the values leave L2, else from this many on. Measured: ops/spmm/README.md.
constexpr int64_t kCachedValues = int64_t(2) << 20;
constexpr int64_t kPanelsPerGather = 8;
// From this many panels a thread on, panels are not cut: a thread without one waits for an eighth.
constexpr int64_t kPanelsAlone = 8;

RowCosts costs_of(const Weight& w) { return {w.entries.indices.offsets, w.rows, kRowCost}; }

int64_t threads_of(const Weight& w, int64_t vectors) {
  return threads_for(costs_of(w).all() * vectors, kWorkPerThread);
}

Cuts cuts_of(const Weight& w, int64_t parts) { return equal_cuts(costs_of(w), parts, kRowBlock); }

// A batch in panels.
struct Panels {
  Panels(const Batch& x, int64_t lanes_)
      : batch(x.count), lanes(lanes_), width(std::min(widest(x, lanes_), padded(x.count))) {}

  int64_t count() const { return (batch + width - 1) / width; }
  int64_t vectors() const { return padded(batch) / lanes; }
  int64_t first(int64_t p) const { return p * width; }
  int64_t numbers(int64_t p) const { return std::min(width, batch - p * width); }
  int64_t padded(int64_t numbers) const { return (numbers + lanes - 1) / lanes * lanes; }

  static int64_t widest(const Batch& x, int64_t lanes) {
    int64_t vectors = 4;
    while (vectors > 1 && x.features * vectors * lanes * int64_t(sizeof(float)) > kPanelBytes)
      vectors /= 2;
    return vectors * lanes;
  }

  int64_t batch, lanes, width;
};

thread_local Scratch panel_scratch, call_scratch;

// A batch of one in float32: its own memory, or a copy.
const float* single_row(const SpmmKernels& kernels, const Batch& x) {
  if (x.matrix.type == Type::kFloat32 && x.matrix.column_stride == 1)
    return static_cast<const float*>(x.matrix.data);
  float* copy = panel_scratch.floats(x.features);
  kernels.widen(x.matrix, x.features, copy);
  return copy;
}

// The entries with their values in order, where enough panels read them.
SpmmEntries ordered(const SpmmKernels& kernels, const Weight& w, int64_t panels) {
  const bool are_cached = w.count * int64_t(sizeof(float)) <= kCachedValues;
  if (w.entries.order == nullptr || panels < (are_cached ? kPanelsPerGather : 2)) return w.entries;
  float* values = call_scratch.floats(w.count);
  for_each_part(w.count,
                [&](int64_t begin, int64_t end) { kernels.gather(w.entries, values, begin, end); });
  SpmmEntries entries = w.entries;
  entries.type = Type::kFloat32;
  entries.values = values;
  entries.order = nullptr;
  return entries;
}

void multiply_one(const SpmmKernels& kernels, const Batch& x, const Weight& w, const float* bias,
                  const SpmmOutput& out) {
  const float* row = single_row(kernels, x);
  for_each_part(cuts_of(w, threads_of(w, 1)), [&](int64_t begin, int64_t end, int64_t) {
    kernels.multiply_one(w.entries, row, bias, out, begin, end);
  });
}

// out [batch, rows] = x·θᵀ + bias. A unit of work is a panel times a part of the rows; a thread
// packs the panels of its units for itself, which costs less than to fetch them from another core.
void multiply(const Batch& x, const Weight& w, const float* bias, const Tensor& out) {
  const SpmmKernels& kernels = spmm_kernels(isa());
  const SpmmOutput to = {x.matrix.type, out.mutable_data_ptr(), w.rows, x.count};
  if (x.count == 0 || w.rows == 0) return;
  if (x.count == 1) return multiply_one(kernels, x, w, bias, to);
  const Panels panels(x, kernels.lanes);
  const int64_t threads = threads_of(w, panels.vectors()), count = panels.count();
  const int64_t parts = count % threads == 0 || count >= kPanelsAlone * threads ? 1 : threads;
  const SpmmEntries entries = ordered(kernels, w, count);
  const int64_t row_bytes = w.rows * int64_t(out.element_size());
  const Cuts cut = cuts_of(w, parts);
  in_threads(count * parts, 1, [&](int64_t begin, int64_t end) {
    float* panel = panel_scratch.floats(x.features * panels.width);
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t p = unit / parts, part = unit % parts, first = panels.first(p);
      SpmmOutput here = to;
      here.data = static_cast<char*>(to.data) + first * row_bytes;
      here.count = panels.numbers(p);
      const int64_t width = panels.padded(here.count);
      if (p != packed) kernels.pack(x.matrix, first, here.count, 0, x.features, width, panel);
      packed = p;
      kernels.multiply(entries, panel, width, bias, here, cut[size_t(part)], cut[size_t(part + 1)]);
    }
    panel_scratch.trim();
  });
  call_scratch.trim();
}

Tensor spmm(const Tensor& input, const Tensor& values, const Tensor& offsets, const Tensor& columns,
            const std::optional<Tensor>& bias) {
  const Batch x("spmm", "input", input);
  Weight w(spanning("spmm", offsets, columns, x.features));
  w.set_values("spmm", values);
  const Bias b("spmm", bias, w.rows);
  Tensor out = empty_of(input, w.rows);
  multiply(x, w, b.start(), out);
  return out;
}

Tensor spmm_grad_input(const Tensor& grad_output, const Tensor& values, const Tensor& offsets,
                       const Tensor& rows, const Tensor& order) {
  const char* op = "spmm_grad_input";
  const Batch g(op, "grad_output", grad_output);
  Weight w(spanning(op, offsets, rows, g.features, "rows"));
  w.set_values(op, values);
  w.entries.order = w.topology.checked_order(op, order);
  Tensor out = empty_of(grad_output, w.rows);
  multiply(g, w, nullptr, out);
  return out;
}

// sums[e] = Σ_b g[b, n]·x[b, k].
void sample(const Batch& x, const Batch& g, const Weight& w, float* sums) {
  const SpmmKernels& kernels = spmm_kernels(isa());
  if (w.count == 0) return;
  if (x.count == 0) {
    std::fill_n(sums, w.count, 0.0f);
    return;
  }
  if (x.count == 1) {
    const float* row = single_row(kernels, x);
    return for_each_part(cuts_of(w, threads_of(w, 1)), [&](int64_t begin, int64_t end, int64_t) {
      kernels.sample_one(w.entries, row, g.matrix, sums, begin, end);
    });
  }
  const Panels panels(x, kernels.lanes);
  const int64_t parts = threads_of(w, panels.vectors());
  const Cuts cut = cuts_of(w, parts);
  in_threads(parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first_row = cut[size_t(begin)], last_row = cut[size_t(end)];
    if (first_row >= last_row) return;
    float* panel = panel_scratch.floats(x.features * panels.width);
    for (int64_t p = 0; p < panels.count(); ++p) {
      const int64_t first = panels.first(p), numbers = panels.numbers(p);
      const int64_t width = panels.padded(numbers);
      kernels.pack(x.matrix, first, numbers, 0, x.features, width, panel);
      kernels.sample(w.entries, panel, width, g.matrix, first, numbers, sums, p > 0, first_row,
                     last_row);
    }
    panel_scratch.trim();
  });
}

Tensor spmm_grad_values(const Tensor& grad_output, const Tensor& input, const Tensor& values,
                        const Tensor& offsets, const Tensor& columns) {
  const char* op = "spmm_grad_values";
  const Batch x(op, "input", input), g(op, "grad_output", grad_output);
  const Weight w(spanning(op, offsets, columns, x.features));
  require(g.count == x.count && g.features == w.rows, op, ": grad_output must be of ", x.count,
          " numbers and ", w.rows, " features, got ", described(grad_output));
  const Type type = kernel_type(op, "values", values);
  Tensor out = empty_of(values, std::vector<int64_t>{w.count});
  if (type == Type::kFloat32) {
    sample(x, g, w, static_cast<float*>(out.mutable_data_ptr()));
    return out;
  }
  float* sums = call_scratch.floats(w.count);
  sample(x, g, w, sums);
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto narrow = spmm_kernels(isa()).narrow;
  for_each_part(w.count, [&](int64_t begin, int64_t end) {
    narrow(sums + begin, to + 2 * begin, end - begin);
  });
  call_scratch.trim();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("spmm_grad_input", TORCH_BOX(&spmm_grad_input));
  m.impl("spmm_grad_values", TORCH_BOX(&spmm_grad_values));
}

}  // namespace ppkernels::bindings
