// Op `sparse_conv2d`: the CPU kernels under the schemas of ppkernels/ops/sparse_conv/op.py.
#include <optional>
#include <vector>

#include "bindings/tensors.h"
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

// float32 or bfloat16, on the CPU.
void check_operand(const char* op, const char* name, const Tensor& t, int64_t dims) {
  const bool fits =
      t.is_cpu() && t.dim() == dims &&
      (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16);
  if (fits) return;
  require(false, op, ": ", name, " must be a float32 or bfloat16 CPU tensor of ", dims,
          dims == 1 ? " dimension" : " dimensions", ", got ", described(t));
}

void check_values(const char* op, const Tensor& values, int64_t count) {
  require(values.numel() == count, op, ": values must have shape (", count,
          "), one for each entry, got ", described(values));
}

TypedMemory memory_of(const char* op, const Tensor& t) {
  return {type_of(op, t), t.const_data_ptr()};
}

MutableMemory mutable_memory_of(const char* op, const Tensor& t) {
  return {type_of(op, t), t.mutable_data_ptr()};
}

// Indices are trusted in what they say, and checked for what they are.
SparseIndices indices_of(const char* op, const Tensor& offsets, const Tensor& columns) {
  const bool is_wide = columns.scalar_type() == ScalarType::Int;
  const bool fits = offsets.is_cpu() && offsets.scalar_type() == ScalarType::Int &&
                    offsets.dim() == 1 && offsets.numel() > 0 && offsets.is_contiguous() &&
                    columns.is_cpu() && columns.dim() == 1 && columns.is_contiguous() &&
                    (is_wide || columns.scalar_type() == ScalarType::UInt16);
  if (!fits) {
    require(false, op, ": offsets must be a contiguous int32 CPU tensor, and the other indices ",
            "contiguous int32 or uint16, each of one dimension, got ", described(offsets), " and ",
            described(columns));
  }
  const int32_t* ends = offsets.const_data_ptr<int32_t>();
  require(ends[offsets.numel() - 1] == columns.numel(), op, ": offsets end with ",
          ends[offsets.numel() - 1], ", but there are ", columns.numel(), " entries");
  return {ends, columns.const_data_ptr(), is_wide, columns.numel()};
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
  check_operand(kOp, "input", input, 4);
  check_operand(kOp, "values", values, 1);
  const SparseIndices indices = indices_of(kOp, offsets, columns);
  check_values(kOp, values, indices.count);
  const Convolution sizes =
      sizes_of(kOp, input.size(0), input.size(1), offsets.numel() - 1,
               {input.size(2), input.size(3)}, kernel_size, stride, padding, dilation);
  std::optional<Tensor> wide_bias;
  if (bias.has_value()) {
    require(bias->is_cpu() && bias->dim() == 1 && bias->numel() == sizes.features, kOp,
            ": bias must be a CPU tensor of shape (", sizes.features, "), got ", described(*bias));
    wide_bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  }
  const Tensor x = torch::stable::contiguous(input), v = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(
      input, {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  check_done(kOp,
             convolution(sparse_conv_kernels(isa()), sizes, memory_of(kOp, x), memory_of(kOp, v),
                         indices, wide_bias ? wide_bias->const_data_ptr<float>() : nullptr,
                         mutable_memory_of(kOp, out), threads));
  return out;
}

Tensor sparse_conv2d_grad_input(const Tensor& grad_output, const Tensor& values,
                                const Tensor& offsets, const Tensor& rows, const Tensor& order,
                                Pair input_size, Pair kernel_size, Pair stride, Pair padding,
                                Pair dilation) {
  constexpr const char* kOp = "sparse_conv2d_grad_input";
  check_operand(kOp, "grad_output", grad_output, 4);
  check_operand(kOp, "values", values, 1);
  const SparseIndices indices = indices_of(kOp, offsets, rows);
  check_values(kOp, values, indices.count);
  require(order.is_cpu() && order.scalar_type() == ScalarType::Int && order.dim() == 1 &&
              order.is_contiguous() && order.numel() == indices.count,
          kOp, ": order must be a contiguous int32 CPU tensor of ", indices.count, " numbers, got ",
          described(order));
  Convolution sizes = sizes_of(kOp, grad_output.size(0), 0, grad_output.size(1), input_size,
                               kernel_size, stride, padding, dilation);
  require((offsets.numel() - 1) % sizes.taps() == 0, kOp, ": offsets must be of whole channels of ",
          sizes.taps(), " columns, got ", offsets.numel() - 1, " columns");
  sizes.channels = (offsets.numel() - 1) / sizes.taps();
  check_sizes(kOp, "grad_output", grad_output,
              {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  const Tensor g = torch::stable::contiguous(grad_output), v = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(
      grad_output, {sizes.images, sizes.channels, sizes.input[0], sizes.input[1]});
  check_done(kOp,
             convolution_grad_input(sparse_conv_kernels(isa()), sizes, memory_of(kOp, g),
                                    memory_of(kOp, v), indices, order.const_data_ptr<int32_t>(),
                                    mutable_memory_of(kOp, out), threads));
  return out;
}

Tensor sparse_conv2d_grad_values(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& values, const Tensor& offsets, const Tensor& columns,
                                 Pair kernel_size, Pair stride, Pair padding, Pair dilation) {
  constexpr const char* kOp = "sparse_conv2d_grad_values";
  check_operand(kOp, "grad_output", grad_output, 4);
  check_operand(kOp, "input", input, 4);
  check_operand(kOp, "values", values, 1);  // for its dtype alone
  const SparseIndices indices = indices_of(kOp, offsets, columns);
  const Convolution sizes =
      sizes_of(kOp, input.size(0), input.size(1), offsets.numel() - 1,
               {input.size(2), input.size(3)}, kernel_size, stride, padding, dilation);
  check_sizes(kOp, "grad_output", grad_output,
              {sizes.images, sizes.features, sizes.output[0], sizes.output[1]});
  const Tensor g = torch::stable::contiguous(grad_output), x = torch::stable::contiguous(input);
  Tensor out = torch::stable::new_empty(values, {indices.count});
  check_done(kOp, convolution_grad_values(sparse_conv_kernels(isa()), sizes, memory_of(kOp, g),
                                          memory_of(kOp, x), indices, mutable_memory_of(kOp, out),
                                          threads));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("sparse_conv2d_grad_input", TORCH_BOX(&sparse_conv2d_grad_input));
  m.impl("sparse_conv2d_grad_values", TORCH_BOX(&sparse_conv2d_grad_values));
}

}  // namespace ppkernels::bindings
