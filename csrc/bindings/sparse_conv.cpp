// Op `sparse_conv2d`: the CPU kernels under the schemas of ppkernels/ops/sparse_conv/op.py.
#include <optional>
#include <vector>

#include "bindings/indices.h"
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

// The sizes of a convolution of `images` images of `input`, but for its channels and features.
Convolution sizes_of(const char* op, int64_t images, const Pair& input, const Pair& kernel,
                     const Pair& stride, const Pair& padding, const Pair& dilation) {
  check_pair(op, "input_size", input, 0);
  check_pair(op, "kernel_size", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  Convolution c = {};
  c.images = images;
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
  Convolution sizes = sizes_of(kOp, input.size(0), {input.size(2), input.size(3)}, kernel_size,
                               stride, padding, dilation);
  sizes.channels = input.size(1);
  const Topology topology = spanning(kOp, offsets, columns, sizes.channels * sizes.taps());
  topology.check_values(kOp, values);
  sizes.features = topology.rows;
  const Bias b(kOp, bias, sizes.features);
  Tensor out = torch::stable::new_empty(
      input, {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  check_done(
      kOp, convolution(sparse_conv_kernels(isa()), sizes, x.memory(), v.memory(), topology.indices,
                       b.start(), {x.type, out.mutable_data_ptr()}, in_threads<PartBody>));
  return out;
}

Tensor sparse_conv2d_grad_input(const Tensor& grad_output, const Tensor& values,
                                const Tensor& offsets, const Tensor& rows, const Tensor& order,
                                Pair input_size, Pair kernel_size, Pair stride, Pair padding,
                                Pair dilation) {
  constexpr const char* kOp = "sparse_conv2d_grad_input";
  const Operand g(kOp, "grad_output", grad_output, 4), v(kOp, "values", values, 1);
  Convolution sizes =
      sizes_of(kOp, grad_output.size(0), input_size, kernel_size, stride, padding, dilation);
  sizes.features = grad_output.size(1);
  const Topology transposed = spanning(kOp, offsets, rows, sizes.features * sizes.taps(), "rows");
  transposed.check_values(kOp, values);
  const int32_t* positions = transposed.checked_order(kOp, order);
  require(transposed.rows % sizes.taps() == 0, kOp, ": offsets must be of whole channels of ",
          sizes.taps(), " columns, got ", transposed.rows, " columns");
  sizes.channels = transposed.rows / sizes.taps();
  check_sizes(kOp, "grad_output", grad_output,
              {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  Tensor out = torch::stable::new_empty(
      grad_output, {sizes.images, sizes.channels, sizes.input[0], sizes.input[1]});
  check_done(kOp, convolution_grad_input(sparse_conv_kernels(isa()), sizes, g.memory(), v.memory(),
                                         transposed.indices, positions,
                                         {g.type, out.mutable_data_ptr()}, in_threads<PartBody>));
  return out;
}

// `values` gives the dtype.
Tensor sparse_conv2d_grad_values(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& values, const Tensor& offsets, const Tensor& columns,
                                 Pair kernel_size, Pair stride, Pair padding, Pair dilation) {
  constexpr const char* kOp = "sparse_conv2d_grad_values";
  const Operand g(kOp, "grad_output", grad_output, 4), x(kOp, "input", input, 4);
  const Type type = kernel_type(kOp, "values", values);
  Convolution sizes = sizes_of(kOp, input.size(0), {input.size(2), input.size(3)}, kernel_size,
                               stride, padding, dilation);
  sizes.channels = input.size(1);
  const Topology topology = spanning(kOp, offsets, columns, sizes.channels * sizes.taps());
  sizes.features = topology.rows;
  check_sizes(kOp, "grad_output", grad_output,
              {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  Tensor out = torch::stable::new_empty(values, {topology.count});
  check_done(kOp, convolution_grad_values(sparse_conv_kernels(isa()), sizes, g.memory(), x.memory(),
                                          topology.indices, {type, out.mutable_data_ptr()},
                                          in_threads<PartBody>));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("sparse_conv2d_grad_input", TORCH_BOX(&sparse_conv2d_grad_input));
  m.impl("sparse_conv2d_grad_values", TORCH_BOX(&sparse_conv2d_grad_values));
}

}  // namespace ppkernels::bindings
