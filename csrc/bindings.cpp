// The only file that sees torch (through its stable ABI): checks, layouts, threads, registration.
//
// Schemas live with the ops in Python; this file registers the CPU kernels under them.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/isa.h"
#include "kernels/power.h"

namespace {

using ppkernels::Isa;
using ppkernels::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An error in a user's terms. (STD_TORCH_CHECK would put this file and line in front of it.)
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message.precision(17);
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// ---- the instruction set, once per process

constexpr const char* kIsaNames[ppkernels::kIsaCount] = {"baseline", "avx2", "avx512"};

Isa choose_isa() {
  const char* wanted = std::getenv("PPKERNELS_CPU");
  if (wanted == nullptr || *wanted == '\0') return ppkernels::best_isa();
  for (int i = 0; i < ppkernels::kIsaCount; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    require(ppkernels::is_available(Isa(i)), "PPKERNELS_CPU is ", wanted,
            ", which this processor or this build of ppkernels does not have; the best "
            "available is ",
            kIsaNames[int(ppkernels::best_isa())]);
    return Isa(i);
  }
  require(false, "PPKERNELS_CPU is ", wanted, "; it must be baseline, avx2 or avx512");
  return ppkernels::best_isa();
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

int64_t cpu_capability() { return int64_t(isa()); }

// ---- tensors

Type type_of(const char* op, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Type::kFloat32;
  if (type == ScalarType::Double) return Type::kFloat64;
  if (type == ScalarType::BFloat16) return Type::kBFloat16;
  require(type == ScalarType::Half, op, ": tensors must be float32, float64, bfloat16 or float16");
  return Type::kFloat16;
}

double exponent_of(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu() && t.scalar_type() == ScalarType::Double && t.dim() == 0, op, ": ", name,
          " must be a 0-dim float64 tensor on the CPU, as the weight is");
  const double value = *t.const_data_ptr<double>();
  require(value >= 1 && std::isfinite(value), op, ": ", name, " must be a finite number >= 1, got ",
          value);
  return value;
}

std::string described(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d > 0 ? ", " : "") << t.size(d);
  text << ") " << torch::headeronly::toString(t.scalar_type());
  return text.str();
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& weight) {
  bool equal = t.dim() == weight.dim() && t.scalar_type() == weight.scalar_type() && t.is_cpu();
  for (int64_t d = 0; equal && d < t.dim(); ++d) equal = t.size(d) == weight.size(d);
  if (equal) return;
  require(false, op, ": ", name, " must be a CPU tensor like the weight, ", described(weight),
          ", got ", described(t));
}

// Whether the elements fill one block of memory, in any order of dimensions.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  // Dimensions already found are bits of `covered`; more of them than bits, and a copy will do.
  if (t.dim() > 63) return false;
  int64_t expected = 1, covered = 0;
  for (int64_t found = 0; found < t.dim(); ++found) {
    int64_t next = -1;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if ((covered >> d) & 1) continue;
      if (t.size(d) == 1 || t.stride(d) == expected) {
        next = d;
        break;
      }
    }
    if (next < 0) return false;
    covered |= int64_t(1) << next;
    expected *= t.size(next);
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `t` as a block of memory in the element order of `layout`, which is dense; a copy if need be.
Tensor arranged_like(const Tensor& t, const Tensor& layout) {
  if (same_strides(t, layout)) return t;
  Tensor copy = torch::stable::empty_like(layout);
  torch::stable::copy_(copy, t);
  return copy;
}

// As torch::stable::empty_like, which costs half a microsecond more: it goes through the
// dispatcher.
Tensor empty_as(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::empty_like(t);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(t.dim(), t.sizes().data(),
                                                         t.strides().data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Whether two blocks of memory share bytes without being the same block.
bool overlap_partly(const Tensor& a, const Tensor& b) {
  const char *p = (const char*)a.const_data_ptr(), *q = (const char*)b.const_data_ptr();
  const int64_t p_bytes = a.numel() * a.element_size(), q_bytes = b.numel() * b.element_size();
  return p != q && p < q + q_bytes && q < p + p_bytes;
}

// ---- threads and cache

// One thread below this many elements, as PyTorch's own elementwise ops have it.
constexpr int64_t kGrain = 1 << 15;

// Outputs from this size go around the cache. Measured: csrc/README.md, "Streaming stores".
constexpr int64_t kStreamBytes = int64_t(8) << 20;

bool should_stream(const Tensor& out, std::initializer_list<const Tensor*> inputs) {
  for (const Tensor* in : inputs) {
    if (in->const_data_ptr() == out.const_data_ptr()) return false;
  }
  return out.numel() * int64_t(out.element_size()) >= kStreamBytes;
}

// A dense tensor's memory by element; the tensor is asked for it once, before the threads start.
template <class Byte>
struct Memory {
  Byte* start;
  int64_t element_bytes;
  Byte* at(int64_t i) const { return start + i * element_bytes; }
};

Memory<const char> memory(const Tensor& t) {
  return {static_cast<const char*>(t.const_data_ptr()), int64_t(t.element_size())};
}

Memory<char> mutable_memory(const Tensor& t) {
  return {static_cast<char*>(t.mutable_data_ptr()), int64_t(t.element_size())};
}

template <class Body>
void for_each_part(int64_t n, const Body& body) {
  if (n <= kGrain) {
    if (n > 0) body(0, n);
    return;
  }
  torch::stable::parallel_for(0, n, kGrain, body);
}

// ---- op power

// out = sign(x)·|x|^exponent; both dense, in the same element order.
void signed_power_into(const Tensor& out, const Tensor& x, Type type, double exponent) {
  const auto kernel = ppkernels::power_kernels(isa()).signed_power;
  const bool stream = should_stream(out, {&x});
  const auto to = mutable_memory(out);
  const auto from = memory(x);
  for_each_part(x.numel(), [&](int64_t begin, int64_t end) {
    kernel(type, exponent, from.at(begin), to.at(begin), end - begin, stream);
  });
}

Tensor signed_power(const char* op, const Tensor& x, double exponent) {
  const Type type = type_of(op, x);
  Tensor out = empty_as(x);
  signed_power_into(out, arranged_like(x, out), type, exponent);
  return out;
}

Tensor power(const Tensor& weight, const Tensor& alpha) {
  return signed_power("power", weight, exponent_of("power", "alpha", alpha));
}

void power_out(const Tensor& weight, const Tensor& alpha, const Tensor& out) {
  const double exponent = exponent_of("power", "alpha", alpha);
  const Type type = type_of("power", weight);
  check_like("power", "out", out, weight);
  if (is_dense(out)) {
    const Tensor x = arranged_like(weight, out);
    if (!overlap_partly(x, out)) {
      signed_power_into(out, x, type, exponent);
      return;
    }
  }
  torch::stable::copy_(const_cast<Tensor&>(out), signed_power("power", weight, exponent));
}

Tensor inverse_power(const Tensor& theta, const Tensor& alpha) {
  const double exponent = 1 / exponent_of("inverse_power", "alpha", alpha);
  return signed_power("inverse_power", theta, exponent);
}

Tensor rebase(const Tensor& weight, const Tensor& alpha_from, const Tensor& alpha_to) {
  const double exponent =
      exponent_of("rebase", "alpha_from", alpha_from) / exponent_of("rebase", "alpha_to", alpha_to);
  return signed_power("rebase", weight, exponent);
}

void power_backward_into(const Tensor& out, const Tensor& grad_theta, const Tensor& weight,
                         Type type, double alpha) {
  const auto kernel = ppkernels::power_kernels(isa()).power_backward;
  const bool stream = should_stream(out, {&grad_theta, &weight});
  const auto to = mutable_memory(out);
  const auto g = memory(grad_theta), w = memory(weight);
  for_each_part(weight.numel(), [&](int64_t begin, int64_t end) {
    kernel(type, alpha, g.at(begin), w.at(begin), to.at(begin), end - begin, stream);
  });
}

Tensor power_backward(const Tensor& grad_theta, const Tensor& weight, const Tensor& alpha_) {
  const double alpha = exponent_of("power_backward", "alpha", alpha_);
  const Type type = type_of("power_backward", weight);
  check_like("power_backward", "grad_theta", grad_theta, weight);
  Tensor out = empty_as(weight);
  power_backward_into(out, arranged_like(grad_theta, out), arranged_like(weight, out), type, alpha);
  return out;
}

void power_backward_out(const Tensor& grad_theta, const Tensor& weight, const Tensor& alpha_,
                        const Tensor& out) {
  const double alpha = exponent_of("power_backward", "alpha", alpha_);
  const Type type = type_of("power_backward", weight);
  check_like("power_backward", "grad_theta", grad_theta, weight);
  check_like("power_backward", "out", out, weight);
  if (is_dense(out)) {
    const Tensor g = arranged_like(grad_theta, out), w = arranged_like(weight, out);
    if (!overlap_partly(g, out) && !overlap_partly(w, out)) {
      power_backward_into(out, g, w, type, alpha);
      return;
    }
  }
  torch::stable::copy_(const_cast<Tensor&>(out), power_backward(grad_theta, weight, alpha_));
}

Tensor power_double_backward(const Tensor& grad_grad_weight, const Tensor& grad_theta,
                             const Tensor& weight, const Tensor& alpha_) {
  const double alpha = exponent_of("power_double_backward", "alpha", alpha_);
  const Type type = type_of("power_double_backward", weight);
  check_like("power_double_backward", "grad_grad_weight", grad_grad_weight, weight);
  check_like("power_double_backward", "grad_theta", grad_theta, weight);
  Tensor out = torch::stable::empty_like(weight);
  const Tensor h = arranged_like(grad_grad_weight, out), g = arranged_like(grad_theta, out),
               w = arranged_like(weight, out);
  const auto kernel = ppkernels::power_kernels(isa()).power_double_backward;
  const auto to = mutable_memory(out);
  const auto from_h = memory(h), from_g = memory(g), from_w = memory(w);
  for_each_part(w.numel(), [&](int64_t begin, int64_t end) {
    kernel(type, alpha, from_h.at(begin), from_g.at(begin), from_w.at(begin), to.at(begin),
           end - begin);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ppkernels, m) { m.def("cpu_capability() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("power", TORCH_BOX(&power));
  m.impl("power_out", TORCH_BOX(&power_out));
  m.impl("power_backward", TORCH_BOX(&power_backward));
  m.impl("power_backward_out", TORCH_BOX(&power_backward_out));
  m.impl("power_double_backward", TORCH_BOX(&power_double_backward));
  m.impl("inverse_power", TORCH_BOX(&inverse_power));
  m.impl("rebase", TORCH_BOX(&rebase));
}

// Importing ppkernels._C loads this file's registrations; there is nothing else in the module.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  // A wrong PPKERNELS_CPU is an error of the import, not of the first op.
  try {
    isa();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return PyModule_Create(&module);
}
