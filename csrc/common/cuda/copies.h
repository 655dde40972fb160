// Copies from global to shared memory that pass by the registers and run while the thread goes on.
#pragma once

#include "device.h"

#if !defined(__CUDACC__)
#include <utility>
#include <vector>
#endif

namespace mirage::cuda {

#if defined(__CUDACC__)

// 16 bytes, at addresses that are multiples of 16.
MIRAGE_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(address), "l"(global) : "memory");
}

// For this thread's own; others see them behind the next barrier.
MIRAGE_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

#else

// NaN until the thread has waited, so that who does not wait is seen.
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

// The first `count` elements of an array, by all threads of the block; their bytes are a multiple of 16.
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
