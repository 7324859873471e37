// Memory that a thread keeps from call to call: fresh memory costs a page fault for every 4 KiB.
#pragma once

#include <stdint.h>

#include <cstdlib>
#include <new>

namespace ppkernels {

// One block, aligned to 64 bytes. Make it thread_local.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(start_); }

  // Room for `count` floats, of no particular value; valid until the next call of either function.
  float* floats(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(float) + 4095) / 4096 * 4096;
    if (bytes > bytes_) {
      std::free(start_);
      bytes_ = 0;
      start_ = std::aligned_alloc(4096, bytes);
      if (start_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<float*>(start_);
  }

  // Gives back what is too large to be kept.
  void trim() {
    if (bytes_ <= kKeptBytes) return;
    std::free(start_);
    start_ = nullptr;
    bytes_ = 0;
  }

 private:
  static constexpr size_t kKeptBytes = size_t(16) << 20;

  void* start_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace ppkernels
