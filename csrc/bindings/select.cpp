// Op `select`: the CPU kernels under the schema of ppkernels/ops/select/op.py.
#include "kernels/select.h"

#include <vector>

#include "bindings/masks.h"
#include "bindings/tensors.h"
#include "kernels/selection.h"

namespace ppkernels::bindings {
namespace {

using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "topk_bits_";

void check_length(const char* name, size_t length, size_t tensors) {
  require(length == tensors, kOp, ": ", name, " must have an entry for each of the ", tensors,
          " tensors, got ", length);
}

int64_t bits_in(const Tensor& words) {
  return bitmask_kernels(isa()).count((const uint8_t*)words.const_data_ptr(), words.numel());
}

SelectTensor select_tensor(const Tensor& tensor, const Tensor& words, const Tensor* within,
                           double alpha) {
  SelectTensor t{};
  require(tensor.is_cpu(), kOp, ": tensors must be on the CPU, as the words are");
  t.type = type_of(kOp, tensor);
  t.data = tensor.const_data_ptr();
  t.dims = int(tensor.dim());
  t.shape = tensor.sizes().data();
  t.strides = tensor.strides().data();
  t.candidates = tensor.numel();
  check_words(kOp, words, tensor.numel());
  t.words = static_cast<uint8_t*>(words.mutable_data_ptr());
  if (within != nullptr && within->numel() != 0) {
    check_words(kOp, *within, tensor.numel());
    t.within = static_cast<const uint8_t*>(within->const_data_ptr());
    t.candidates = bits_in(*within);
  }
  require(alpha >= 1 && std::isfinite(alpha), kOp, ": alphas must be finite numbers >= 1, got ",
          alpha);
  t.alpha = alpha;
  return t;
}

void check_counts(const std::vector<int64_t>& counts, const std::vector<SelectTensor>& tensors) {
  const bool is_one = counts.size() == 1;
  require(is_one || counts.size() == tensors.size(), kOp, ": counts must be one number, or one ",
          "for each of the ", tensors.size(), " tensors, got ", counts.size());
  int64_t all = 0;
  for (const SelectTensor& t : tensors) all += t.candidates;
  for (size_t i = 0; i < counts.size(); ++i) {
    const int64_t candidates = is_one ? all : tensors[i].candidates;
    require(counts[i] >= 0 && counts[i] <= candidates, kOp, ": counts must lie between 0 and the ",
            candidates, " entries that may be kept, got ", counts[i]);
  }
}

Tensor topk_bits(Tensors words, Tensors tensors, std::vector<int64_t> counts,
                 std::vector<double> alphas, Tensors within) {
  check_length("words", words.size(), tensors.size());
  check_length("alphas", alphas.size(), tensors.size());
  if (!within.empty()) check_length("within", within.size(), tensors.size());
  std::vector<SelectTensor> all;
  for (size_t i = 0; i < tensors.size(); ++i) {
    all.push_back(
        select_tensor(tensors[i], words[i], within.empty() ? nullptr : &within[i], alphas[i]));
  }
  check_counts(counts, all);
  Tensor first_nan = torch::stable::new_empty(words[0], {}, ScalarType::Long);
  const int64_t found = select_largest(select_kernels(isa()), all, counts, in_threads<PartBody>);
  require(found != kChanged, kOp, ": the tensors were written to while they were read");
  *first_nan.mutable_data_ptr<int64_t>() = found;
  return first_nan;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) { m.impl("topk_bits_", TORCH_BOX(&topk_bits)); }

}  // namespace ppkernels::bindings
