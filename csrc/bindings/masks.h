// Masks of one bit an entry, as ops take them: `words`, 1-dim uint8, in row-major order of a shape.
#pragma once

#include <optional>

#include "bindings/tensors.h"
#include "kernels/bitmask.h"

namespace ppkernels::bindings {

inline int64_t mask_bytes(int64_t entries) { return (entries + 7) / 8; }

inline void check_words(const char* op, const Tensor& words, int64_t entries) {
  const bool fits = words.is_cpu() && words.scalar_type() == ScalarType::Byte && words.dim() == 1 &&
                    words.is_contiguous() && words.numel() == mask_bytes(entries);
  if (fits) return;
  require(false, op, ": words must be a contiguous uint8 CPU tensor of ", mask_bytes(entries),
          " bytes, one bit for each of ", entries, " entries, got ", described(words));
}

// Runs `body(begin, end)` over the entries of a mask, if there is one; `begin` is a multiple of
// 512, so that parts share no byte of the words and no cache line of what lies beside them.
template <class Body>
inline void for_each_mask_part(int64_t entries, const Body& body) {
  constexpr int64_t kBlock = 512;
  in_threads((entries + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    body(begin * kBlock, std::min(end * kBlock, entries));
  });
}

// `words` in the order of `weight`'s memory, which is dense: bit m belongs to the element at offset
// m. The words themselves where that is row-major order, else a copy.
inline Tensor arranged_mask(const Tensor& words, const Tensor& weight) {
  if (weight.is_contiguous()) return words;
  Tensor arranged = empty_as(words);
  const auto kernel = bitmask_kernels(isa()).arrange;
  const auto* from = static_cast<const uint8_t*>(words.const_data_ptr());
  auto* to = static_cast<uint8_t*>(arranged.mutable_data_ptr());
  const int dims = int(weight.dim());
  const int64_t *shape = weight.sizes().data(), *strides = weight.strides().data();
  for_each_mask_part(weight.numel(), [&](int64_t begin, int64_t end) {
    kernel(from, to, begin, end, dims, shape, strides);
  });
  return arranged;
}

// As `should_stream`, where the kernel reads a mask beside the inputs: vectors then begin where the
// bytes of the mask do, and memory that is not PyTorch's own may start anywhere.
inline bool should_stream_masked(const Tensor& out, std::initializer_list<const Tensor*> inputs) {
  return should_stream(out, inputs) && uintptr_t(out.const_data_ptr()) % 64 == 0;
}

// A mask that an op may go without, as its kernel takes it.
class OptionalMask {
 public:
  // `words` for the elements of `layout`, which is dense, in the order of its memory.
  OptionalMask(const char* op, const std::optional<Tensor>& words, const Tensor& layout) {
    if (!words.has_value()) return;
    check_words(op, *words, layout.numel());
    arranged_ = arranged_mask(*words, layout);
    start_ = static_cast<const uint8_t*>(arranged_->const_data_ptr());
  }

  // The words from element `begin` on, a multiple of 8; null without a mask.
  const uint8_t* at(int64_t begin) const { return start_ ? start_ + begin / 8 : nullptr; }

  bool should_stream(const Tensor& out, std::initializer_list<const Tensor*> inputs) const {
    return start_ ? should_stream_masked(out, inputs) : bindings::should_stream(out, inputs);
  }

 private:
  std::optional<Tensor> arranged_;
  const uint8_t* start_ = nullptr;
};

}  // namespace ppkernels::bindings
