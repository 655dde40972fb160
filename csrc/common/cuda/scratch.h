// How a call divides the scratch memory that its caller owns.
#pragma once

#include <cstdint>

namespace mirage::cuda {

// One array after the other, each at a multiple of 256 bytes, which suits every type. Without memory it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* next(int64_t bytes) {
    void* const found = memory_ ? memory_ + used_ : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return found;
  }

  float* floats(int64_t count) { return static_cast<float*>(next(count * int64_t(sizeof(float)))); }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace mirage::cuda
