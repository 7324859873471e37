// θ = φ·|φ|^(α−1) and its gradients, over raw memory.
//
// Each function reads n elements from every input and writes n to `out`, all of one `type`, in one
// thread. Pointers need the element's own alignment. `out` may be one of the inputs or be apart
// from all of them; other overlap is not allowed. `words` is a mask of the n elements in their
// order (kernels/bitmask.h), or null: where the bit is 0, the result is +0, whatever the inputs
// are. `stream`: write around the cache; then `out` must be none of the inputs, and with a mask its
// address must be a multiple of 64. float32 and the half types are computed in float32, float64 in
// float64.
// Zeros, infinities and NaN: see each formula; subnormal inputs count with their full
// value, unless the thread flushes them (torch.set_flush_denormal): then as 0 or as some number
// below 2^-126, which of the two depends on the instruction set.
#pragma once

#include <stdint.h>

#include "kernels/isa.h"

namespace ppkernels {

struct PowerKernels {
  // out = sign(x)·|x|^exponent, exponent > 0. ±0, ±inf and NaN give themselves.
  // float32, where the exact value is normal: exponents 0.5, 1 and 2 correctly rounded, others up
  // to 8 within 1 ULP (simd/README.md has the figures).
  void (*signed_power)(Type type, double exponent, const void* x, const uint8_t* words, void* out,
                       int64_t n, bool stream);

  // out = grad · α|weight|^(α−1), α >= 1; the factor at weight = 0 is 0, for α = 1 it is 1.
  void (*power_backward)(Type type, double alpha, const void* grad, const void* weight,
                         const uint8_t* words, void* out, int64_t n, bool stream);

  // out = grad_grad · grad · α(α−1)·sign(weight)|weight|^(α−2), and 0 where weight = 0 or α = 1;
  // NaN where weight is NaN and α > 1.
  void (*power_double_backward)(Type type, double alpha, const void* grad_grad, const void* grad,
                                const void* weight, const uint8_t* words, void* out, int64_t n);
};

// The kernels of one instruction set, which must be available.
const PowerKernels& power_kernels(Isa isa);

}  // namespace ppkernels
