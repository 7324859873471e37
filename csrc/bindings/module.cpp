// The Python module ppkernels._C, and the instruction set that its kernels use.
#include <Python.h>

#include <cstdlib>
#include <cstring>

#include "bindings/tensors.h"

namespace ppkernels::bindings {
namespace {

constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512"};

Isa choose_isa() {
  const char* wanted = std::getenv("PPKERNELS_CPU");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    require(is_available(Isa(i)), "PPKERNELS_CPU is ", wanted,
            ", which this processor or this build of ppkernels does not have; the best "
            "available is ",
            kIsaNames[int(best_isa())]);
    return Isa(i);
  }
  require(false, "PPKERNELS_CPU is ", wanted, "; it must be baseline, avx2 or avx512");
  return best_isa();
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

namespace {

int64_t cpu_capability() { return int64_t(isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ppkernels, m) { m.def("cpu_capability() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace ppkernels::bindings

// Importing ppkernels._C loads this file's registrations; there is nothing else in the module.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  // A wrong PPKERNELS_CPU is an error of the import, not of the first op.
  try {
    ppkernels::bindings::isa();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return PyModule_Create(&module);
}
