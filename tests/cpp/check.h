// What the test programs of the kernels share: the instruction set to test, and a failing check.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/isa.h"

namespace ppkernels_test {

// The set that PPKERNELS_CPU names (the best one without it). Ends the program with 77, "skipped",
// where this build or processor does not have it.
inline ppkernels::Isa isa_under_test() {
  const char* names[] = {"baseline", "avx2", "avx512"};
  const char* wanted = std::getenv("PPKERNELS_CPU");
  if (wanted == nullptr) return ppkernels::best_isa();
  for (int i = 0; i < ppkernels::kIsaCount; ++i) {
    if (std::strcmp(wanted, names[i]) != 0) continue;
    if (ppkernels::is_available(ppkernels::Isa(i))) return ppkernels::Isa(i);
    std::printf("skipped: no %s here\n", wanted);
    std::exit(77);
  }
  std::printf("PPKERNELS_CPU=%s is no instruction set\n", wanted);
  std::exit(1);
}

}  // namespace ppkernels_test

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (0)
