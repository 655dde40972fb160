// Asynchronous copies from global to shared memory (cp.async), which bypass the registers.
#pragma once

#include "device.h"

#if !defined(__CUDACC__)
#include <utility>
#include <vector>
#endif

namespace mirage::cuda {

#if defined(__CUDACC__)

// Starts a copy of 16 bytes; both addresses are multiples of 16.
MIRAGE_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(address), "l"(global) : "memory");
}

// Waits for the copies that this thread has started. Other threads see their data after the next barrier.
MIRAGE_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

#else

// The emulation fills the target with NaN until the thread waits, so that a missing wait shows in the results.
inline std::vector<std::pair<void*, const void*>>& copies_under_way() {
  static thread_local std::vector<std::vector<std::pair<void*, const void*>>> of_threads;
  if (of_threads.size() <= size_t(thread_index())) of_threads.resize(size_t(thread_index()) + 1);
  return of_threads[size_t(thread_index())];
}
inline void copy_async(void* shared, const void* global) {
  memset(shared, 0xff, 16);
  copies_under_way().emplace_back(shared, global);
}
inline void wait_for_copies() {
  for (const auto& [shared, global] : copies_under_way()) memcpy(shared, global, 16);
  copies_under_way().clear();
}

#endif

// All threads of the block together start copying the first `count` elements of an array, a multiple of 16 bytes.
template <int kThreads, class T, int N>
MIRAGE_DEVICE void copy_to_block(T (&shared)[N], const T* global, int count = N) {
  constexpr int kElements = 16 / int(sizeof(T));
  static_assert(N % kElements == 0);
#pragma unroll
  for (int i = 0; i < N; i += kThreads * kElements) {
    const int j = i + thread_index() * kElements;
    if (j < count) copy_async(shared + j, global + j);
  }
}

}  // namespace mirage::cuda
