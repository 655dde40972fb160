// Units of work over the threads, with scratch memory for each thread.
//
// OpenMP where it is there: the library then shares the runtime that PyTorch has loaded and follows
// torch.set_num_threads. One thread where it is not. What a unit computes must not depend on the thread that runs it,
// so that results have the same bits at every thread count.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "vec.h"
#include "workspace.h"

namespace mirage::cpu::MIRAGE_ISA {

MIRAGE_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory aligned to 64 bytes for the rest of the scope: see workspace.h.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t n) : room_(take_workspace(size_t(n) * sizeof(A))) {}
  ~Buffer() { put_workspace(room_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  MIRAGE_INLINE A* get() const { return static_cast<A*>(room_.data); }
  MIRAGE_INLINE A& operator[](int64_t i) const { return get()[i]; }

 private:
  const Workspace room_;
};

// Calls f(unit, scratch) for unit in [0, units); scratch points to scratch_size elements of A, 64-byte aligned,
// whose content is whatever the thread's last unit left there.
template <class A, class F>
void parallel_units(int64_t units, int64_t scratch_size, F f) {
  if (units <= 0) return;
  const int64_t stride = round_up(scratch_size, 64 / sizeof(A)) + 64 / sizeof(A);
#if defined(_OPENMP)
  int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (threads > units) threads = int(units);
  if (threads > 1) {
    Buffer<A> scratch(stride * threads);
    A* const base = scratch.get();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t unit = 0; unit < units; ++unit) f(unit, base + stride * omp_get_thread_num());
    return;
  }
#endif
  Buffer<A> scratch(stride);
  for (int64_t unit = 0; unit < units; ++unit) f(unit, scratch.get());
}

}  // namespace mirage::cpu::MIRAGE_ISA
