// The options that every function of the CUDA library takes besides its tensors.
#pragma once

#include <cstdint>

namespace mirage::cuda {

struct Options {
  void* stream = nullptr;         // a cudaStream_t
  void* workspace = nullptr;      // aligned to 256 bytes; in use until the stream has passed the call
  int64_t workspace_bytes = 0;
  bool tf32 = false;              // matrix products of float32 may round to TF32 and run on tensor cores
};

}  // namespace mirage::cuda
