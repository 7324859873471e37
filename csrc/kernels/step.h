// The optimizer's step of one weight, plain or powered, in one pass over raw memory.
//
// A call steps elements begin to end of one tensor in one thread: it reads gradient, weight and
// states once and writes weight and states once, in place. What a tensor's memory holds is in
// `StepTensor`, in element order; blocks do not overlap. `begin` is a multiple of kStepAlignment,
// and so is `end` unless it is the tensor's own. Arithmetic is float32, float64 for float64.
//
// What is not finite in weight, gradient or first state shows in the weight. Instruction sets agree
// on every bit but those of a weight that is not finite, and its states.
//
// ppkernels/ops/step/reference.py is the specification; csrc/kernels/step.cpp says how it is met.
#pragma once

#include <stdint.h>

#include "kernels/isa.h"

namespace ppkernels {

constexpr int64_t kStepAlignment = 64;

struct StepTensor {
  // Of weight and grad; of the states and the master copy: equal, or float32 beside a half type.
  Type type, state_type;
  void* weight;
  // The weight in state_type, or null. Where its rounding is not what `weight` holds, somebody has
  // overwritten the weight, and the weight counts.
  void* master;
  const void* grad;
  // SGD: momentum buffer, or null. Adam: first moment, second moment, its maximum or null.
  void* states[3];
  // One bit an element, as `lane_mask` reads it, in the memory order of the weight; where it is 0,
  // weight, master and states keep their bits. Null: all 1.
  const uint8_t* mask;
  // The exponent, finite and >= 1; 1 is the plain step.
  double alpha;
  // The weight is φ and the gradient ∂L/∂φ: the plain step, but for decay on θ.
  bool holds_phi;
  // Adam: 1 − β^t.
  double bias_correction1, bias_correction2;
};

struct StepOptions {
  double lr;
  // What gradients are multiplied by first: ±1 over the loss scale.
  double grad_factor;
  // λ; decoupled, lr·λ is below 1.
  double weight_decay;
  bool decoupled, decay_of_phi;
  // The chain rule, or else the virtual one.
  bool chain;
};

struct SgdOptions : StepOptions {
  double momentum, dampening;
  bool nesterov;
};

struct AdamOptions : StepOptions {
  double beta1, beta2, eps;
};

struct StepKernels {
  void (*sgd)(const SgdOptions& options, const StepTensor& tensor, int64_t begin, int64_t end);
  void (*adam)(const AdamOptions& options, const StepTensor& tensor, int64_t begin, int64_t end);
};

// The kernels of one instruction set, which must be available.
const StepKernels& step_kernels(Isa isa);

}  // namespace ppkernels
