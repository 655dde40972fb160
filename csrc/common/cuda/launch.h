// Launches kernels and queries the GPU, or does the same on the emulation (emulation.h).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace mirage::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Properties of the current device.
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t shared_memory_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// `stream` is a cudaStream_t. Throws std::runtime_error with the kernel's name and the shape of the launch.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, void* stream,
            const Parameters&... arguments) {
  const auto fail = [&](cudaError_t error) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(grid.blocks) + " blocks of " +
                             std::to_string(grid.threads) + " threads with " + std::to_string(grid.shared_bytes) +
                             " bytes of shared memory could not be launched: " + cudaGetErrorString(error));
  };
  if (grid.blocks > INT32_MAX) fail(cudaErrorInvalidConfiguration);
  if (grid.shared_bytes > 48 << 10) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error, which is reported here and must not surface in an unrelated later check
      fail(error);
    }
  }
  kernel<<<unsigned(grid.blocks), unsigned(grid.threads), size_t(grid.shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  const auto error = cudaGetLastError();
  if (error != cudaSuccess) fail(error);
}

#else

inline int multiprocessors() { return emulation::multiprocessors(); }
inline int64_t shared_memory_limit() { return 227 << 10; }

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, void*, const Parameters&... arguments) {
  emulation::run({name, grid.blocks, grid.threads, size_t(grid.shared_bytes)}, [&] { kernel(arguments...); });
}

#endif

}  // namespace mirage::cuda
