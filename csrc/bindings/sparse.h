// Arguments of the products with a sparse weight, checked: their types, and the bias.
#pragma once

#include <optional>

#include "bindings/tensors.h"

namespace ppkernels::bindings {

inline Type kernel_type(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu(), op, ": ", name, " must be on the CPU");
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Type::kFloat32;
  require(type == ScalarType::BFloat16, op, ": ", name, " must be float32 or bfloat16, got ",
          described(t));
  return Type::kBFloat16;
}

// The bias in float32, or null.
class Bias {
 public:
  Bias(const char* op, const std::optional<Tensor>& bias, int64_t rows) {
    if (!bias.has_value()) return;
    require(bias->is_cpu() && bias->dim() == 1 && bias->numel() == rows, op,
            ": bias must be a CPU tensor of shape (", rows, "), got ", described(*bias));
    tensor_ = bias->scalar_type() == ScalarType::Float
                  ? torch::stable::contiguous(*bias)
                  : torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
    start_ = static_cast<const float*>(tensor_->const_data_ptr());
  }
  const float* start() const { return start_; }

 private:
  std::optional<Tensor> tensor_;
  const float* start_ = nullptr;
};

}  // namespace ppkernels::bindings
