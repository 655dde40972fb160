// What every function of the CUDA library takes beside its tensors.
#pragma once

#include <cstdint>

namespace mirage::cuda {

struct Options {
  void* stream = nullptr;         // a cudaStream_t
  void* workspace = nullptr;      // aligned to 256 bytes; the caller's again when the stream has come so far
  int64_t workspace_bytes = 0;
  bool tf32 = false;              // float32 products may be rounded to TF32 and run on tensor cores
};

}  // namespace mirage::cuda
