// Threads, as what is compiled once gets them from its caller.
#pragma once

#include <stdint.h>

#include <functional>

namespace ppkernels {

using PartBody = std::function<void(int64_t begin, int64_t end)>;

// Calls its body for parts of 0 ... n − 1, each of `grain` or more, perhaps in several threads.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const PartBody& body)>;

}  // namespace ppkernels
