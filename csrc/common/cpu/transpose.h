// Rows of a buffer transposed, a square of vectors at a time.
#pragma once

#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {

// The lower or the upper halves of two vectors, lane by lane in turn.
template <class A>
MIRAGE_INLINE Vec<A> interleave(Vec<A> a, Vec<A> b, int from) {
  constexpr int L = kLanes<A>;
#if defined(__clang__)
  Vec<A> out;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) out[i] = i % 2 ? b[from + i / 2] : a[from + i / 2];
  return out;
#else
  IVec<A> lanes = {};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) lanes[i] = i % 2 * L + from + i / 2;
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Exchanges rows and columns of a square of vectors: each round takes one bit of a row's number to the lane's.
template <class A>
MIRAGE_INLINE void transpose_square(Vec<A> (&v)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec<A> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<A>(v[i], v[i + L / 2], 0);
      next[2 * i + 1] = interleave<A>(v[i], v[i + L / 2], L / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = next[i];
  }
}

// out[p][k] = in[k][p], rows of `width` channels of which those that are not there are zero. Pixels are read and written up to
// a whole vector.
template <class A>
inline void transpose_rows(const A* in, int64_t stride, int64_t channels, int64_t pixels, int64_t width, A* out) {
  constexpr int L = kLanes<A>;
  for (int64_t p = 0; p < pixels; p += L) {
    for (int64_t k = 0; k < width; k += L) {
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = k + i < channels ? load(in + (k + i) * stride + p) : Vec<A>{};
      transpose_square<A>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(out + (p + i) * width + k, v[i]);
    }
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
