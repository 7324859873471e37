// Picks the kernels of an instruction set.
#include "kernels/bitmask.h"
#include "kernels/isa.h"
#include "kernels/power.h"

namespace ppkernels {

namespace baseline {
extern const BitmaskKernels kBitmask;
extern const PowerKernels kPower;
}  // namespace baseline
#if defined(PPKERNELS_HAVE_AVX2)
namespace avx2 {
extern const BitmaskKernels kBitmask;
extern const PowerKernels kPower;
}  // namespace avx2
#endif
#if defined(PPKERNELS_HAVE_AVX512)
namespace avx512 {
extern const BitmaskKernels kBitmask;
extern const PowerKernels kPower;
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

const BitmaskKernels& bitmask_kernels(Isa isa) {
#if defined(PPKERNELS_HAVE_AVX512)
  if (isa == Isa::kAvx512) return avx512::kBitmask;
#endif
#if defined(PPKERNELS_HAVE_AVX2)
  if (isa == Isa::kAvx2) return avx2::kBitmask;
#endif
  return baseline::kBitmask;
}

const PowerKernels& power_kernels(Isa isa) {
#if defined(PPKERNELS_HAVE_AVX512)
  if (isa == Isa::kAvx512) return avx512::kPower;
#endif
#if defined(PPKERNELS_HAVE_AVX2)
  if (isa == Isa::kAvx2) return avx2::kPower;
#endif
  return baseline::kPower;
}

}  // namespace ppkernels
