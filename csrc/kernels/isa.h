// Instruction sets and element types, as kernels and bindings name them.
#pragma once

#include <stdint.h>

namespace ppkernels {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kIsaCount = 3;

// Whether this build has kernels for the set and this processor runs them.
bool is_available(Isa isa);

// The best available one.
Isa best_isa();

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace ppkernels
