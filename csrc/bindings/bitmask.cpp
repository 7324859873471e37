// Op `bitmask`: the CPU kernels under the schemas of ppkernels/ops/bitmask/op.py.
#include "kernels/bitmask.h"

#include <atomic>
#include <vector>

#include "bindings/masks.h"

namespace ppkernels::bindings {
namespace {

const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
uint8_t* mutable_bytes_of(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

Tensor pack_bits(const Tensor& mask_) {
  require(mask_.scalar_type() == ScalarType::Bool, "pack_bits: mask must be a bool tensor, got ",
          described(mask_));
  const Tensor mask = torch::stable::contiguous(mask_);
  const int64_t n = mask.numel();
  Tensor words = torch::stable::new_empty(mask, {mask_bytes(n)}, ScalarType::Byte);
  const auto kernel = bitmask_kernels(isa()).pack;
  const uint8_t* from = bytes_of(mask);
  uint8_t* to = mutable_bytes_of(words);
  for_each_mask_part(
      n, [&](int64_t begin, int64_t end) { kernel(from + begin, to + begin / 8, end - begin); });
  return words;
}

Tensor unpack_bits(const Tensor& words, const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  check_words("unpack_bits", words, n);
  Tensor mask = torch::stable::new_empty(words, shape, ScalarType::Bool);
  const auto kernel = bitmask_kernels(isa()).unpack;
  const uint8_t* from = bytes_of(words);
  uint8_t* to = mutable_bytes_of(mask);
  for_each_mask_part(
      n, [&](int64_t begin, int64_t end) { kernel(from + begin / 8, to + begin, end - begin); });
  return mask;
}

Tensor count_bits(const Tensor& words) {
  check_words("count_bits", words, 8 * words.numel());
  Tensor count = torch::stable::new_empty(words, {}, ScalarType::Long);
  const auto kernel = bitmask_kernels(isa()).count;
  const uint8_t* from = bytes_of(words);
  std::atomic<int64_t> total{0};
  for_each_part(words.numel(),
                [&](int64_t begin, int64_t end) { total += kernel(from + begin, end - begin); });
  *count.mutable_data_ptr<int64_t>() = total;
  return count;
}

Tensor apply_mask(const Tensor& weight, const Tensor& words) {
  const Type type = type_of("apply_mask", weight);
  check_words("apply_mask", words, weight.numel());
  const Tensor out = empty_as(weight);
  const Tensor x = arranged_like(weight, out), bits = arranged_mask(words, out);
  const auto kernel = bitmask_kernels(isa()).apply;
  const auto from = memory(x);
  const auto to = mutable_memory(out);
  const uint8_t* kept = bytes_of(bits);
  const bool stream = should_stream_masked(out, {&x});
  for_each_mask_part(x.numel(), [&](int64_t begin, int64_t end) {
    kernel(type, from.at(begin), kept + begin / 8, to.at(begin), end - begin, stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits));
  m.impl("count_bits", TORCH_BOX(&count_bits));
  m.impl("apply_mask", TORCH_BOX(&apply_mask));
}

}  // namespace ppkernels::bindings
