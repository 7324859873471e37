// Picks the kernels of an instruction set.
#include "kernels/bitmask.h"
#include "kernels/isa.h"
#include "kernels/power.h"
#include "kernels/select.h"
#include "kernels/sparse_conv.h"
#include "kernels/spmm.h"
#include "kernels/statistics.h"
#include "kernels/step.h"

namespace ppkernels {

// What every instruction set's objects define.
#define PPKERNELS_DECLARE                     \
  extern const BitmaskKernels kBitmask;       \
  extern const PowerKernels kPower;           \
  extern const SelectKernels kSelect;         \
  extern const SparseConvKernels kSparseConv; \
  extern const SpmmKernels kSpmm;             \
  extern const StatisticsKernels kStatistics; \
  extern const StepKernels kStep;

namespace baseline {
PPKERNELS_DECLARE
}  // namespace baseline
#if defined(PPKERNELS_HAVE_AVX2)
namespace avx2 {
PPKERNELS_DECLARE
}  // namespace avx2
#endif
#if defined(PPKERNELS_HAVE_AVX512)
namespace avx512 {
PPKERNELS_DECLARE
}  // namespace avx512
#endif

bool is_available(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
#if defined(PPKERNELS_HAVE_AVX2)
      // Every processor with AVX2 has F16C; old compilers cannot ask for it.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
#else
      return false;
#endif
    case Isa::kAvx512:
#if defined(PPKERNELS_HAVE_AVX512)
      return is_available(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
#else
      return false;
#endif
  }
  return false;
}

Isa best_isa() {
  if (is_available(Isa::kAvx512)) return Isa::kAvx512;
  if (is_available(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kBaseline;
}

#if defined(PPKERNELS_HAVE_AVX2)
#define PPKERNELS_IF_AVX2(kernels) \
  if (isa == Isa::kAvx2) return avx2::kernels;
#else
#define PPKERNELS_IF_AVX2(kernels)
#endif
#if defined(PPKERNELS_HAVE_AVX512)
#define PPKERNELS_IF_AVX512(kernels) \
  if (isa == Isa::kAvx512) return avx512::kernels;
#else
#define PPKERNELS_IF_AVX512(kernels)
#endif
// The body of a function that gives the kernels of `isa`.
#define PPKERNELS_PICK(kernels) \
  PPKERNELS_IF_AVX512(kernels)  \
  PPKERNELS_IF_AVX2(kernels)    \
  return baseline::kernels;

const BitmaskKernels& bitmask_kernels(Isa isa) { PPKERNELS_PICK(kBitmask) }
const PowerKernels& power_kernels(Isa isa) { PPKERNELS_PICK(kPower) }
const SelectKernels& select_kernels(Isa isa) { PPKERNELS_PICK(kSelect) }
const SparseConvKernels& sparse_conv_kernels(Isa isa) { PPKERNELS_PICK(kSparseConv) }
const SpmmKernels& spmm_kernels(Isa isa) { PPKERNELS_PICK(kSpmm) }
const StatisticsKernels& statistics_kernels(Isa isa) { PPKERNELS_PICK(kStatistics) }
const StepKernels& step_kernels(Isa isa) { PPKERNELS_PICK(kStep) }

}  // namespace ppkernels
