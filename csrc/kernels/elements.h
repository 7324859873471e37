// Elements of tensors as bytes: their types, and where they lie. For what is compiled once.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/isa.h"

namespace ppkernels {

inline int64_t element_bytes(Type type) {
  switch (type) {
    case Type::kFloat32:
      return 4;
    case Type::kFloat64:
      return 8;
    case Type::kBFloat16:
    case Type::kFloat16:
      return 2;
  }
  return 0;
}

// The bits of ∞ in an element type; those of NaN are larger.
inline uint64_t infinity(Type type) {
  switch (type) {
    case Type::kFloat32:
      return 0x7f800000u;
    case Type::kFloat64:
      return 0x7ff0000000000000u;
    case Type::kBFloat16:
      return 0x7f80u;
    case Type::kFloat16:
      return 0x7c00u;
  }
  return 0;
}

// A tensor's elements, whatever its strides; where they are not in order they are copied, a chunk
// at a time.
class Elements {
 public:
  Elements(Type type, const void* data, int dims, const int64_t* shape, const int64_t* strides)
      : data_((const char*)data), bytes_(element_bytes(type)) {
    for (int d = 0; d < dims; ++d) {
      count_ *= shape[d];
      if (shape[d] == 1) continue;
      if (!dims_.empty() && dims_.back().stride == strides[d] * shape[d]) {
        dims_.back() = {dims_.back().size * shape[d], strides[d]};
      } else {
        dims_.push_back({shape[d], strides[d]});
      }
    }
    in_order_ = dims_.empty() || (dims_.size() == 1 && dims_[0].stride == 1);
  }

  int64_t count() const { return count_; }

  // Element i, as bytes.
  const char* at(int64_t i) const {
    if (in_order_) return data_ + i * bytes_;
    int64_t offset = 0;
    for (size_t d = dims_.size(); d-- > 0;) {
      offset += i % dims_[d].size * dims_[d].stride;
      i /= dims_[d].size;
    }
    return data_ + offset * bytes_;
  }

  // The elements begin ... end − 1: in place, or in `buffer`.
  const void* chunk(int64_t begin, int64_t end, void* buffer) const {
    if (in_order_) return at(begin);
    if (bytes_ == 8) {
      copy((uint64_t*)buffer, begin, end);
    } else if (bytes_ == 4) {
      copy((uint32_t*)buffer, begin, end);
    } else {
      copy((uint16_t*)buffer, begin, end);
    }
    return buffer;
  }

 private:
  struct Dim {
    int64_t size, stride;
  };

  template <class U>
  void copy(U* out, int64_t begin, int64_t end) const {
    const int64_t size = dims_.back().size, step = dims_.back().stride * bytes_;
    while (begin < end) {
      const char* from = at(begin);
      const int64_t run = std::min(size - begin % size, end - begin);
      for (int64_t k = 0; k < run; ++k) std::memcpy(out + k, from + k * step, sizeof(U));
      begin += run;
      out += run;
    }
  }

  const char* data_;
  int64_t bytes_, count_ = 1;
  std::vector<Dim> dims_;
  bool in_order_;
};

}  // namespace ppkernels
