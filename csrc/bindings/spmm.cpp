// Op `spmm`: the CPU kernels under the schemas of ppkernels/ops/spmm/op.py.
#include "kernels/spmm.h"

#include <algorithm>
#include <optional>
#include <vector>

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

// A weight in compressed rows, its indices checked but for what they say.
struct Weight {
  Weight(const char* op, const Tensor& offsets_, const Tensor& columns_) {
    check_index(op, "offsets", offsets_, ScalarType::Int, ScalarType::Int);
    check_index(op, "columns", columns_, ScalarType::UInt16, ScalarType::Int);
    require(offsets_.numel() >= 1, op, ": offsets must have an element for each row and one more");
    rows = offsets_.numel() - 1;
    count = columns_.numel();
    entries.offsets = static_cast<const int32_t*>(offsets_.const_data_ptr());
    entries.columns = columns_.const_data_ptr();
    entries.wide = columns_.scalar_type() == ScalarType::Int;
    require(entries.offsets[0] == 0 && entries.offsets[rows] == count, op,
            ": offsets must begin with 0 and end with the number of entries, ", count, ", got ",
            entries.offsets[0], " and ", entries.offsets[rows]);
  }

  void set_values(const char* op, const Tensor& t) {
    entries.type = kernel_type(op, "values", t);
    require(t.dim() == 1 && t.numel() == count, op, ": values must have shape (", count,
            "), one for each entry, got ", described(t));
    values = torch::stable::contiguous(t);
    entries.values = values->const_data_ptr();
  }

  void set_order(const char* op, const Tensor& t) {
    check_index(op, "order", t, ScalarType::Int, ScalarType::Int);
    require(t.numel() == count, op, ": order must have ", count, " elements, got ", described(t));
    entries.order = static_cast<const int32_t*>(t.const_data_ptr());
  }

  SpmmEntries entries = {};
  int64_t rows = 0, count = 0;
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

// Less than this many multiply-adds are not worth a second thread.
constexpr int64_t kWorkPerThread = int64_t(1) << 18;
// A row of the weight costs as much as this many of its entries, before it has any.
constexpr int64_t kRowCost = 8;
// Parts begin at such rows, so that two threads share no line of the output.
constexpr int64_t kRowBlock = 16;

int64_t threads_for(int64_t work) {
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  return std::clamp(work / kWorkPerThread, int64_t(1), threads);
}

// Values through an order are put in order first where enough panels read them: from two panels on
// where the values leave L2, else from this many on. Measured: ops/spmm/README.md.
constexpr int64_t kCachedValues = int64_t(2) << 20;
constexpr int64_t kPanelsPerGather = 8;

// The first row of part `part` of `parts`, which have about as many entries each.
int64_t row_of_part(const Weight& w, int64_t part, int64_t parts) {
  if (part >= parts) return w.rows;
  const int64_t wanted = (w.count + w.rows * kRowCost) * part / parts;
  int64_t low = 0, high = w.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (w.entries.offsets[middle] + middle * kRowCost < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return std::min((low + kRowBlock / 2) / kRowBlock * kRowBlock, w.rows);
}

template <class Body>
void for_each_unit(int64_t units, const Body& body) {
  if (units == 1) return body(0, 1);
  torch::stable::parallel_for(0, units, 1, body);
}

// Panels over a batch.
struct Panels {
  int64_t batch, width, count;
  Panels(int64_t batch_, int64_t width_)
      : batch(batch_), width(width_), count((batch_ + width_ - 1) / width_) {}
  int64_t first(int64_t p) const { return p * width; }
  int64_t numbers(int64_t p) const { return std::min(width, batch - p * width); }
};

thread_local Scratch panel_scratch, call_scratch;

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// out [batch, rows] = x·θᵀ + bias.
void multiply(const Batch& x, const Weight& w, const float* bias, const Tensor& out) {
  const SpmmKernels& kernels = spmm_kernels(isa());
  const SpmmOutput to = {x.matrix.type, out.mutable_data_ptr(), w.rows, x.count};
  if (x.count == 0 || w.rows == 0) return;
  if (x.count == 1) {
    const int64_t parts = threads_for(w.count * 16);
    const float* row = static_cast<const float*>(x.matrix.data);
    if (x.matrix.type != Type::kFloat32 || x.matrix.column_stride != 1) {
      float* copy = call_scratch.floats(x.features);
      kernels.widen(x.matrix, x.features, copy);
      row = copy;
    }
    return for_each_unit(parts, [&](int64_t begin, int64_t end) {
      kernels.multiply_one(w.entries, row, bias, to, row_of_part(w, begin, parts),
                           row_of_part(w, end, parts));
    });
  }
  const int64_t threads = threads_for(w.count * x.count);
  int64_t width = std::min(4 * kernels.lanes, rounded_up(x.count, kernels.lanes));
  static const char* force = std::getenv("PPW");
  if (force) width = std::min<int64_t>(width, std::atoi(force));
  const Panels panels(x.count, width);
  const int64_t parts = panels.count % threads == 0 || panels.count >= 8 * threads ? 1 : threads;
  const bool gathers = w.entries.order != nullptr &&
                       panels.count >= (w.count * 4 > kCachedValues ? 2 : kPanelsPerGather);
  SpmmEntries entries = w.entries;
  if (gathers) {
    float* values = call_scratch.floats(w.count);
    for_each_part(w.count, [&](int64_t begin, int64_t end) {
      kernels.gather(w.entries, values, begin, end);
    });
    entries.type = Type::kFloat32;
    entries.values = values;
    entries.order = nullptr;
  }
  const int64_t element_bytes = x.matrix.type == Type::kFloat32 ? 4 : 2;
  for_each_unit(panels.count * parts, [&](int64_t begin, int64_t end) {
    float* panel = panel_scratch.floats(x.features * width);
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t p = unit / parts, part = unit % parts;
      const int64_t numbers = panels.numbers(p), last = rounded_up(numbers, kernels.lanes);
      if (p != packed) {
        kernels.pack(x.matrix, panels.first(p), numbers, 0, x.features, last, panel);
        packed = p;
      }
      SpmmOutput here = to;
      here.data = static_cast<char*>(to.data) + panels.first(p) * to.stride * element_bytes;
      here.count = numbers;
      kernels.multiply(entries, panel, last, bias, here, row_of_part(w, part, parts),
                       row_of_part(w, part + 1, parts));
    }
  });
}

Tensor spmm(const Tensor& input, const Tensor& values, const Tensor& offsets, const Tensor& columns,
            const std::optional<Tensor>& bias) {
  const Batch x("spmm", "input", input);
  Weight w("spmm", offsets, columns);
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
  Weight w(op, offsets, rows);
  w.set_values(op, values);
  w.set_order(op, order);
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
    const int64_t parts = threads_for(w.count * 16);
    const float* row = static_cast<const float*>(x.matrix.data);
    if (x.matrix.type != Type::kFloat32 || x.matrix.column_stride != 1) {
      float* copy = panel_scratch.floats(x.features);
      kernels.widen(x.matrix, x.features, copy);
      row = copy;
    }
    return for_each_unit(parts, [&](int64_t begin, int64_t end) {
      kernels.sample_one(w.entries, row, g.matrix, sums, row_of_part(w, begin, parts),
                         row_of_part(w, end, parts));
    });
  }
  const int64_t parts = threads_for(w.count * x.count);
  const Panels panels(x.count, std::min(4 * kernels.lanes, rounded_up(x.count, kernels.lanes)));
  for_each_unit(parts, [&](int64_t begin, int64_t end) {
    const int64_t first_row = row_of_part(w, begin, parts), last_row = row_of_part(w, end, parts);
    if (first_row >= last_row) return;
    float* panel = panel_scratch.floats(x.features * panels.width);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t first = panels.first(p), numbers = panels.numbers(p);
      const int64_t width = rounded_up(numbers, kernels.lanes);
      kernels.pack(x.matrix, first, numbers, 0, x.features, width, panel);
      kernels.sample(w.entries, panel, width, g.matrix, first, numbers, sums, p > 0, first_row,
                     last_row);
    }
  });
}

Tensor spmm_grad_values(const Tensor& grad_output, const Tensor& input, const Tensor& values,
                        const Tensor& offsets, const Tensor& columns) {
  const char* op = "spmm_grad_values";
  const Batch x(op, "input", input), g(op, "grad_output", grad_output);
  const Weight w(op, offsets, columns);
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
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("spmm_grad_input", TORCH_BOX(&spmm_grad_input));
  m.impl("spmm_grad_values", TORCH_BOX(&spmm_grad_values));
}

}  // namespace ppkernels::bindings
