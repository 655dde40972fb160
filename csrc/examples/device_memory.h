// Memory and streams of a GPU. In the emulation of its kernels: the host's memory, and no streams.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/cuda/launch.h"

namespace mirage::example {

#if defined(__CUDACC__)

inline void* device_malloc(int64_t bytes) {
  void* memory = nullptr;
  cuda::check(cudaMalloc(&memory, size_t(bytes)), "cudaMalloc");
  return memory;
}
inline void device_free(void* memory) { cudaFree(memory); }

// Runs work in the order in which it is given. The host memory of a copy is free again after `wait`.
class Stream {
 public:
  Stream() { cuda::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void* get() const { return stream_; }

  void copy(void* to, const void* from, int64_t bytes) {
    cuda::check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
  }

  void wait() { cuda::check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

#else

// Filled with NaN, so that reads of unwritten memory show; aligned as on a GPU.
inline void* device_malloc(int64_t bytes) {
  const size_t size = (size_t(bytes) + 255) / 256 * 256;
  void* const memory = std::aligned_alloc(256, size);
  if (!memory) throw std::bad_alloc();
  return std::memset(memory, 0xff, size);
}
inline void device_free(void* memory) { std::free(memory); }

class Stream {
 public:
  void* get() const { return nullptr; }
  void copy(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, size_t(bytes)); }
  void wait() {}
};

#endif

}  // namespace mirage::example
