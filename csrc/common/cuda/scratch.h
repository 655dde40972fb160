// Divides the workspace, which the caller of an operator owns, into arrays.
#pragma once

#include <cstdint>

namespace mirage::cuda {

// Hands out one array after the other, each aligned to 256 bytes. With null memory it only counts bytes.
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
