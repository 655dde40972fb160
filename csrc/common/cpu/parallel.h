// Distributes units of work over threads, with scratch memory for each thread.
//
// Uses OpenMP where it is available: the library then shares the runtime that PyTorch has loaded and follows
// torch.set_num_threads. Without it there is one thread. What a unit computes must not depend on the thread that runs
// it, so that results have the same bits at every thread count.
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

// Hands out units to threads. Each thread has a share of its own, the same in every loop over the same number of units,
// so that it reads from its own cache what it wrote in the stage before. A thread that is done takes units from the end
// of another's share.
class Shares {
 public:
  Shares(int64_t units, int threads) : count_(threads < kMost ? threads : kMost) {
    for (int t = 0; t < count_; ++t) {
      left_[t].range = uint64_t(units * t / count_) << 32 | uint64_t(units * (t + 1) / count_);
    }
  }

  // Returns the thread's next unit, or -1 if none is left.
  int64_t next(int thread) {
    for (int i = 0; i < count_; ++i) {
      uint64_t* const range = &left_[(thread + i) % count_].range;
      uint64_t seen = __atomic_load_n(range, __ATOMIC_RELAXED);
      while (seen >> 32 < (seen & kEnd)) {
        const uint64_t less = i == 0 ? seen + kEnd + 1 : seen - 1;  // its first, or another's last
        if (__atomic_compare_exchange_n(range, &seen, less, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
          return i == 0 ? int64_t(seen >> 32) : int64_t(less & kEnd);
        }
      }
    }
    return -1;
  }

 private:
  static constexpr int kMost = 64;
  static constexpr uint64_t kEnd = 0xffffffffu;
  struct alignas(64) Left { uint64_t range; };  // its first unit in the upper half, the one after its last in the lower

  const int count_;
  Left left_[kMost];
};

// How many threads `parallel_units` uses where there are as many units.
inline int most_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// A unit of work, and whether the thread's last one was the one before it, whose scratch memory it then finds. Results must
// not depend on that: it says what need not be computed again.
struct WorkUnit {
  int64_t index;
  bool follows;
  MIRAGE_INLINE operator int64_t() const { return index; }
};

// Calls f(unit, scratch) for unit in [0, units); scratch points to scratch_size elements of A, 64-byte aligned,
// whose content is whatever the thread's last unit left there.
template <class A, class F>
void parallel_units(int64_t units, int64_t scratch_size, F f) {
  if (units <= 0) return;
  const int64_t stride = round_up(scratch_size, 64 / sizeof(A)) + 64 / sizeof(A);
#if defined(_OPENMP)
  int threads = most_threads();
  if (threads > units) threads = int(units);
  if (threads > 1) {
    Buffer<A> scratch(stride * threads);
    A* const base = scratch.get();
    Shares shares(units, threads);
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      int64_t last = -2;
      for (int64_t unit = shares.next(me); unit >= 0; unit = shares.next(me)) {
        f(WorkUnit{unit, unit == last + 1}, base + stride * me);
        last = unit;
      }
    }
    return;
  }
#endif
  Buffer<A> scratch(stride);
  for (int64_t unit = 0; unit < units; ++unit) f(WorkUnit{unit, unit > 0}, scratch.get());
}

}  // namespace mirage::cpu::MIRAGE_ISA
