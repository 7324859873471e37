// Op `power`: the CPU kernels under the schemas of ppkernels/ops/power/op.py.
#include "kernels/power.h"

#include <optional>

#include "bindings/masks.h"

namespace ppkernels::bindings {
namespace {

using Words = std::optional<Tensor>;

// out = sign(x)·|x|^exponent, masked; both dense, in the same element order.
void signed_power_into(const char* op, const Tensor& out, const Tensor& x, const Words& words,
                       Type type, double exponent) {
  const auto kernel = power_kernels(isa()).signed_power;
  const OptionalMask mask(op, words, out);
  const bool stream = mask.should_stream(out, {&x});
  const auto to = mutable_memory(out);
  const auto from = memory(x);
  for_each_mask_part(x.numel(), [&](int64_t begin, int64_t end) {
    kernel(type, exponent, from.at(begin), mask.at(begin), to.at(begin), end - begin, stream);
  });
}

Tensor signed_power(const char* op, const Tensor& x, const Words& words, double exponent) {
  const Type type = type_of(op, x);
  Tensor out = empty_as(x);
  signed_power_into(op, out, arranged_like(x, out), words, type, exponent);
  return out;
}

Tensor power(const Tensor& weight, const Tensor& alpha, Words words) {
  return signed_power("power", weight, words, exponent_of("power", "alpha", alpha));
}

void power_out(const Tensor& weight, const Tensor& alpha, const Tensor& out, Words words) {
  const double exponent = exponent_of("power", "alpha", alpha);
  const Type type = type_of("power", weight);
  check_like("power", "out", out, weight);
  if (is_dense(out)) {
    const Tensor x = arranged_like(weight, out);
    if (!overlap_partly(x, out)) {
      signed_power_into("power", out, x, words, type, exponent);
      return;
    }
  }
  torch::stable::copy_(const_cast<Tensor&>(out), signed_power("power", weight, words, exponent));
}

Tensor inverse_power(const Tensor& theta, const Tensor& alpha) {
  const double exponent = 1 / exponent_of("inverse_power", "alpha", alpha);
  return signed_power("inverse_power", theta, std::nullopt, exponent);
}

Tensor rebase(const Tensor& weight, const Tensor& alpha_from, const Tensor& alpha_to) {
  const double exponent =
      exponent_of("rebase", "alpha_from", alpha_from) / exponent_of("rebase", "alpha_to", alpha_to);
  return signed_power("rebase", weight, std::nullopt, exponent);
}

void power_backward_into(const Tensor& out, const Tensor& grad_theta, const Tensor& weight,
                         const Words& words, Type type, double alpha) {
  const auto kernel = power_kernels(isa()).power_backward;
  const OptionalMask mask("power_backward", words, out);
  const bool stream = mask.should_stream(out, {&grad_theta, &weight});
  const auto to = mutable_memory(out);
  const auto g = memory(grad_theta), w = memory(weight);
  for_each_mask_part(weight.numel(), [&](int64_t begin, int64_t end) {
    kernel(type, alpha, g.at(begin), w.at(begin), mask.at(begin), to.at(begin), end - begin,
           stream);
  });
}

Tensor power_backward(const Tensor& grad_theta, const Tensor& weight, const Tensor& alpha_,
                      Words words) {
  const double alpha = exponent_of("power_backward", "alpha", alpha_);
  const Type type = type_of("power_backward", weight);
  check_like("power_backward", "grad_theta", grad_theta, weight);
  Tensor out = empty_as(weight);
  power_backward_into(out, arranged_like(grad_theta, out), arranged_like(weight, out), words, type,
                      alpha);
  return out;
}

void power_backward_out(const Tensor& grad_theta, const Tensor& weight, const Tensor& alpha_,
                        const Tensor& out, Words words) {
  const double alpha = exponent_of("power_backward", "alpha", alpha_);
  const Type type = type_of("power_backward", weight);
  check_like("power_backward", "grad_theta", grad_theta, weight);
  check_like("power_backward", "out", out, weight);
  if (is_dense(out)) {
    const Tensor g = arranged_like(grad_theta, out), w = arranged_like(weight, out);
    if (!overlap_partly(g, out) && !overlap_partly(w, out)) {
      power_backward_into(out, g, w, words, type, alpha);
      return;
    }
  }
  torch::stable::copy_(const_cast<Tensor&>(out), power_backward(grad_theta, weight, alpha_, words));
}

Tensor power_double_backward(const Tensor& grad_grad_weight, const Tensor& grad_theta,
                             const Tensor& weight, const Tensor& alpha_, Words words) {
  const double alpha = exponent_of("power_double_backward", "alpha", alpha_);
  const Type type = type_of("power_double_backward", weight);
  check_like("power_double_backward", "grad_grad_weight", grad_grad_weight, weight);
  check_like("power_double_backward", "grad_theta", grad_theta, weight);
  Tensor out = torch::stable::empty_like(weight);
  const Tensor h = arranged_like(grad_grad_weight, out), g = arranged_like(grad_theta, out),
               w = arranged_like(weight, out);
  const auto kernel = power_kernels(isa()).power_double_backward;
  const OptionalMask mask("power_double_backward", words, out);
  const auto to = mutable_memory(out);
  const auto from_h = memory(h), from_g = memory(g), from_w = memory(w);
  for_each_mask_part(w.numel(), [&](int64_t begin, int64_t end) {
    kernel(type, alpha, from_h.at(begin), from_g.at(begin), from_w.at(begin), mask.at(begin),
           to.at(begin), end - begin);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("power", TORCH_BOX(&power));
  m.impl("power_out", TORCH_BOX(&power_out));
  m.impl("power_backward", TORCH_BOX(&power_backward));
  m.impl("power_backward_out", TORCH_BOX(&power_backward_out));
  m.impl("power_double_backward", TORCH_BOX(&power_double_backward));
  m.impl("inverse_power", TORCH_BOX(&inverse_power));
  m.impl("rebase", TORCH_BOX(&rebase));
}

}  // namespace ppkernels::bindings
