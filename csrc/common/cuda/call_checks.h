// Argument checks that every operator of the CUDA library makes, besides those of its tensors' shapes.
#pragma once

#include <string>

#include "launch.h"
#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

inline void check_kernel_dtype(const char* argument, const Tensor& t) {
  if (t.dtype == DType::f64) fail(argument, "float32, float16 or bfloat16", name_of(t.dtype));
}

inline void check_workspace(const Options& options, int64_t bytes) {
  if (options.workspace_bytes < bytes) {
    fail("workspace", std::to_string(bytes) + " bytes", std::to_string(options.workspace_bytes));
  }
}

// Kernels compute offsets between the pixels of a tile in int: is_near says whether they fit, kFar names the tensors
// that it rejects.
constexpr char kFar[] = "rows or columns that are 2^25 elements or more apart";
inline bool is_near(const Tensor& x) {
  const auto near = [&](int d) { return x.size[d] <= 1 || x.stride[d] < 1 << 25; };
  return near(2) && near(3);
}

// Returns why a thread block cannot have `wanted` bytes of shared memory on this GPU, or an empty string if it can.
inline std::string shared_memory_problem(int64_t wanted) {
  const int64_t limit = shared_memory_limit();
  if (wanted <= limit) return "";
  return std::to_string(wanted) + " bytes of shared memory, of which this GPU has " + std::to_string(limit);
}

}  // namespace mirage::cuda
