// Op `sparse_conv2d`: the CPU kernels under the schemas of ppkernels/ops/sparse_conv/op.py.
#include <optional>
#include <vector>

#include "bindings/sparse.h"
#include "kernels/convolution.h"

namespace ppkernels::bindings {
namespace {

using Pair = std::vector<int64_t>;

void check_pair(const char* op, const char* name, const Pair& pair, int64_t least) {
  const bool fits = pair.size() == 2 && pair[0] >= least && pair[1] >= least;
  if (fits) return;
  std::ostringstream text;
  for (size_t d = 0; d < pair.size(); ++d) text << (d > 0 ? ", " : "") << pair[d];
  require(false, op, ": ", name, " must be two numbers >= ", least, ", got (", text.str(), ")");
}

// Images, or values, as a block of memory.
struct Operand {
  Operand(const char* op, const char* name, const Tensor& t, int64_t dims)
      : type(kernel_type(op, name, t)), tensor(torch::stable::contiguous(t)) {
    require(t.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ",
            described(t));
  }
  TypedMemory memory() const { return {type, tensor.const_data_ptr()}; }

  Type type;
  Tensor tensor;
};

// Indices are trusted in what they say, and checked for what they are.
SparseIndices indices_of(const char* op, const Tensor& offsets, const char* name,
                         const Tensor& columns) {
  check_index(op, "offsets", offsets, ScalarType::Int, ScalarType::Int);
  check_index(op, name, columns, ScalarType::UInt16, ScalarType::Int);
  require(offsets.numel() > 0, op, ": offsets must have an element for each row and one more");
  const int32_t* ends = offsets.const_data_ptr<int32_t>();
  const int64_t count = columns.numel(), last = ends[offsets.numel() - 1];
  require(ends[0] == 0 && last == count, op,
          ": offsets must begin with 0 and end with the number of entries, ", count, ", got ",
          ends[0], " and ", last);
  return {ends, columns.const_data_ptr(), columns.scalar_type() == ScalarType::Int, count};
}

void check_values(const char* op, const Operand& values, int64_t count) {
  require(values.tensor.numel() == count, op, ": values must have shape (", count,
          "), one for each entry, got ", described(values.tensor));
}

// The sizes of a convolution of `images` images of `input` by a weight [features, channels, ...].
Convolution sizes_of(const char* op, int64_t images, int64_t channels, int64_t features,
                     const Pair& input, const Pair& kernel, const Pair& stride, const Pair& padding,
                     const Pair& dilation) {
  check_pair(op, "input_size", input, 0);
  check_pair(op, "kernel_size", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  Convolution c;
  c.images = images;
  c.channels = channels;
  c.features = features;
  for (size_t d = 0; d < 2; ++d) {
    c.input[d] = input[d];
    c.kernel[d] = kernel[d];
    c.stride[d] = stride[d];
    c.padding[d] = padding[d];
    c.dilation[d] = dilation[d];
    const int64_t room = input[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    require(room >= 0, op, ": the kernel, of size ", kernel[d], " and dilation ", dilation[d],
            ", is larger than the input, of size ", input[d], " and padding ", padding[d]);
    c.output[d] = room / stride[d] + 1;
  }
  return c;
}

void check_sizes(const char* op, const char* name, const Tensor& t, const int64_t (&wanted)[4]) {
  bool fits = true;
  for (int64_t d = 0; d < 4; ++d) fits = fits && t.size(d) == wanted[d];
  if (fits) return;
  require(false, op, ": ", name, " must have shape (", wanted[0], ", ", wanted[1], ", ", wanted[2],
          ", ", wanted[3], "), got ", described(t));
}

void threads(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  if (n <= grain) return body(0, n);
  torch::stable::parallel_for(0, n, grain, body);
}

void check_done(const char* op, bool is_done) {
  require(is_done, op,
          ": one row of the images, with all channels and padding, has 2^31 or more "
          "numbers");
}

Tensor sparse_conv2d(const Tensor& input, const Tensor& values, const Tensor& offsets,
                     const Tensor& columns, std::optional<Tensor> bias, Pair kernel_size,
                     Pair stride, Pair padding, Pair dilation) {
  constexpr const char* kOp = "sparse_conv2d";
  const Operand x(kOp, "input", input, 4), v(kOp, "values", values, 1);
  const SparseIndices indices = indices_of(kOp, offsets, "columns", columns);
  check_values(kOp, v, indices.count);
  const Convolution sizes =
      sizes_of(kOp, input.size(0), input.size(1), offsets.numel() - 1,
               {input.size(2), input.size(3)}, kernel_size, stride, padding, dilation);
  const Bias b(kOp, bias, sizes.features);
  Tensor out = torch::stable::new_empty(
      input, {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  check_done(kOp, convolution(sparse_conv_kernels(isa()), sizes, x.memory(), v.memory(), indices,
                              b.start(), {x.type, out.mutable_data_ptr()}, threads));
  return out;
}

Tensor sparse_conv2d_grad_input(const Tensor& grad_output, const Tensor& values,
                                const Tensor& offsets, const Tensor& rows, const Tensor& order,
                                Pair input_size, Pair kernel_size, Pair stride, Pair padding,
                                Pair dilation) {
  constexpr const char* kOp = "sparse_conv2d_grad_input";
  const Operand g(kOp, "grad_output", grad_output, 4), v(kOp, "values", values, 1);
  const SparseIndices indices = indices_of(kOp, offsets, "rows", rows);
  check_values(kOp, v, indices.count);
  check_index(kOp, "order", order, ScalarType::Int, ScalarType::Int);
  require(order.numel() == indices.count, kOp, ": order must have ", indices.count,
          " elements, got ", described(order));
  Convolution sizes = sizes_of(kOp, grad_output.size(0), 0, grad_output.size(1), input_size,
                               kernel_size, stride, padding, dilation);
  require((offsets.numel() - 1) % sizes.taps() == 0, kOp, ": offsets must be of whole channels of ",
          sizes.taps(), " columns, got ", offsets.numel() - 1, " columns");
  sizes.channels = (offsets.numel() - 1) / sizes.taps();
  check_sizes(kOp, "grad_output", grad_output,
              {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  Tensor out = torch::stable::new_empty(
      grad_output, {sizes.images, sizes.channels, sizes.input[0], sizes.input[1]});
  check_done(kOp, convolution_grad_input(sparse_conv_kernels(isa()), sizes, g.memory(), v.memory(),
                                         indices, order.const_data_ptr<int32_t>(),
                                         {g.type, out.mutable_data_ptr()}, threads));
  return out;
}

// `values` gives the dtype.
Tensor sparse_conv2d_grad_values(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& values, const Tensor& offsets, const Tensor& columns,
                                 Pair kernel_size, Pair stride, Pair padding, Pair dilation) {
  constexpr const char* kOp = "sparse_conv2d_grad_values";
  const Operand g(kOp, "grad_output", grad_output, 4), x(kOp, "input", input, 4);
  const Type type = kernel_type(kOp, "values", values);
  const SparseIndices indices = indices_of(kOp, offsets, "columns", columns);
  const Convolution sizes =
      sizes_of(kOp, input.size(0), input.size(1), offsets.numel() - 1,
               {input.size(2), input.size(3)}, kernel_size, stride, padding, dilation);
  check_sizes(kOp, "grad_output", grad_output,
              {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  Tensor out = torch::stable::new_empty(values, {indices.count});
  check_done(kOp, convolution_grad_values(sparse_conv_kernels(isa()), sizes, g.memory(), x.memory(),
                                          indices, {type, out.mutable_data_ptr()}, threads));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("sparse_conv2d_grad_input", TORCH_BOX(&sparse_conv2d_grad_input));
  m.impl("sparse_conv2d_grad_values", TORCH_BOX(&sparse_conv2d_grad_values));
}

}  // namespace ppkernels::bindings
