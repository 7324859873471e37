// What the bindings of every op share: errors, checks, layouts, threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/isa.h"

namespace ppkernels::bindings {

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

// The instruction set of this process: the best one, or what PPKERNELS_CPU names.
Isa isa();

// ---- tensors

inline Type type_of(const char* op, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Type::kFloat32;
  if (type == ScalarType::Double) return Type::kFloat64;
  if (type == ScalarType::BFloat16) return Type::kBFloat16;
  require(type == ScalarType::Half, op, ": tensors must be float32, float64, bfloat16 or float16");
  return Type::kFloat16;
}

inline double exponent_of(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu() && t.scalar_type() == ScalarType::Double && t.dim() == 0, op, ": ", name,
          " must be a 0-dim float64 tensor on the CPU, as the weight is");
  const double value = *t.const_data_ptr<double>();
  require(value >= 1 && std::isfinite(value), op, ": ", name, " must be a finite number >= 1, got ",
          value);
  return value;
}

inline std::string described(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d > 0 ? ", " : "") << t.size(d);
  text << ") " << torch::headeronly::toString(t.scalar_type());
  return text.str();
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto p = a.sizes(), q = b.sizes();
  if (p.size() != q.size()) return false;
  for (size_t d = 0; d < p.size(); ++d) {
    if (p[d] != q[d]) return false;
  }
  return true;
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& weight) {
  if (t.scalar_type() == weight.scalar_type() && t.is_cpu() && same_sizes(t, weight)) return;
  require(false, op, ": ", name, " must be a CPU tensor like the weight, ", described(weight),
          ", got ", described(t));
}

// Whether the elements fill one block of memory, in any order of dimensions.
inline bool is_dense(const Tensor& t) {
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

inline bool same_strides(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// New memory of the sizes and strides of `layout`, which is dense, and of the dtype of `t`.
inline Tensor empty_in(const Tensor& layout, const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(layout.dim(), layout.sizes().data(),
                                                         layout.strides().data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// `t` as a block of memory in the element order of `layout`, which is dense; a copy if need be.
inline Tensor arranged_like(const Tensor& t, const Tensor& layout) {
  if (same_strides(t, layout)) return t;
  Tensor copy = empty_in(layout, t);
  torch::stable::copy_(copy, t);
  return copy;
}

// As torch::stable::empty_like, which costs half a microsecond more: it goes through the
// dispatcher.
inline Tensor empty_as(const Tensor& t) {
  return t.is_contiguous() ? empty_in(t, t) : torch::stable::empty_like(t);
}

// Whether two blocks of memory share bytes without being the same block.
inline bool overlap_partly(const Tensor& a, const Tensor& b) {
  const char *p = (const char*)a.const_data_ptr(), *q = (const char*)b.const_data_ptr();
  const int64_t p_bytes = a.numel() * a.element_size(), q_bytes = b.numel() * b.element_size();
  return p != q && p < q + q_bytes && q < p + p_bytes;
}

// ---- threads and cache

// One thread below this many elements, as PyTorch's own elementwise ops have it.
inline constexpr int64_t kGrain = 1 << 15;

// Outputs from this size go around the cache. Measured: csrc/README.md, "Streaming stores".
inline constexpr int64_t kStreamBytes = int64_t(8) << 20;

inline bool should_stream(const Tensor& out, std::initializer_list<const Tensor*> inputs) {
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

inline Memory<const char> memory(const Tensor& t) {
  return {static_cast<const char*>(t.const_data_ptr()), int64_t(t.element_size())};
}

inline Memory<char> mutable_memory(const Tensor& t) {
  return {static_cast<char*>(t.mutable_data_ptr()), int64_t(t.element_size())};
}

// How many threads `work` is worth, if each of them has `grain` of it.
inline int64_t threads_for(int64_t work, int64_t grain = kGrain) {
  return std::clamp(work / grain, int64_t(1), int64_t(torch::stable::get_num_threads()));
}

// Runs body(begin, end) for parts of 0 ... n − 1, each of `grain` or more, in torch's threads; in
// this one where there is but one part.
template <class Body>
inline void in_threads(int64_t n, int64_t grain, const Body& body) {
  if (n > grain) {
    torch::stable::parallel_for(0, n, grain, body);
  } else if (n > 0) {
    body(0, n);
  }
}

template <class Body>
inline void for_each_part(int64_t n, const Body& body) {
  in_threads(n, kGrain, body);
}

}  // namespace ppkernels::bindings
