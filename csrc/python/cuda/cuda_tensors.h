// Tensors and options from Python for the CUDA library.
#pragma once

#include <cstdint>

#include "../bind.h"
#include "mirage/cuda/stream.h"

namespace mirage::python {

#if defined(MIRAGE_EMULATED)
constexpr bool kEmulated = true;
constexpr int kDevice = kDeviceCpu;
#else
constexpr bool kEmulated = false;
constexpr int kDevice = kDeviceCuda;
#endif

inline Tensor tensor_of(const char* argument, const py::capsule& capsule) {
  return from_dlpack(argument, capsule, kDevice);
}

inline Tensor matrix_of(const char* argument, const py::capsule& capsule) {
  return matrix_from_dlpack(argument, capsule, kDevice);
}

// `stream`: a cudaStream_t as an integer.
inline cuda::Options options_of(uintptr_t stream, bool tf32) {
  cuda::Options options;
  options.stream = reinterpret_cast<void*>(stream);
  options.tf32 = tf32;
  return options;
}

// With scratch memory: a contiguous tensor.
inline cuda::Options options_of(uintptr_t stream, bool tf32, const py::capsule& workspace) {
  cuda::Options options = options_of(stream, tf32);
  const Tensor memory = tensor_of("workspace", workspace);
  check_contiguous("workspace", memory);
  options.workspace = memory.data;
  options.workspace_bytes = memory.numel() * bytes_of(memory.dtype);
  return options;
}

}  // namespace mirage::python
