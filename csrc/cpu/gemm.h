// Channel mixing: C[m][p] = sum_k A[m][k] B[k][p], rows of pixels, with register-blocked micro-kernels.
//
// B and C are buffers of channels times pixels, pixels contiguous; A is a weight matrix in row-major order. A block of
// kMixRows x kMixVectors vectors of C stays in registers while k runs: per step kMixVectors loads of B and kMixRows
// broadcasts of A feed kMixRows * kMixVectors multiply-adds. What happens to a finished vector is up to the caller (an
// activation before it is stored, a sum with what is there), so that it needs no pass of its own.
#pragma once

#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {

#if defined(__AVX512F__)
constexpr int kMixRows = 6, kMixVectors = 4;  // 24 of 32 registers
#else
constexpr int kMixRows = 4, kMixVectors = 2;  // 8 of 16 (NEON has 32)
#endif

// Pixels per block of registers. Buffers end on a multiple of the lanes, and may be read and written up to there.
template <class A> constexpr int64_t kMixPixels = kMixVectors * kLanes<A>;

template <class A, int V, class Finish>
MIRAGE_INLINE void mix_block(const A* const (&a)[kMixRows], int rows, int64_t depth, const A* b, int64_t b_stride,
                             int64_t m, int64_t p, Finish finish) {
  constexpr int L = kLanes<A>;
  Vec<A> c[kMixRows][V];
#pragma GCC unroll 8
  for (int i = 0; i < kMixRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) c[i][j] = Vec<A>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const A* row = b + k * b_stride + p;
    Vec<A> v[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) v[j] = load(row + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < kMixRows; ++i) {
      const Vec<A> w = splat(a[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) c[i][j] += w * v[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMixRows; ++i) {
    if (i < rows) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) finish(m + i, p + j * L, c[i][j]);
    }
  }
}

// For all m < rows and pixels < `pixels` (a multiple of the lanes): finish(m, pixel, vector of C[m][pixel...]).
template <class A, class Finish>
MIRAGE_INLINE void mix(const A* a, int64_t a_stride, int64_t rows, int64_t depth, const A* b, int64_t b_stride,
                       int64_t pixels, Finish finish) {
  constexpr int L = kLanes<A>;
  for (int64_t p = 0; p < pixels; p += kMixPixels<A>) {
    const int64_t vectors = (pixels - p) / L;
    for (int64_t m = 0; m < rows; m += kMixRows) {
      const int here = rows - m < kMixRows ? int(rows - m) : kMixRows;
      const A* w[kMixRows];
      for (int i = 0; i < kMixRows; ++i) w[i] = a + (m + (i < here ? i : here - 1)) * a_stride;
      if (vectors >= kMixVectors) {
        mix_block<A, kMixVectors>(w, here, depth, b, b_stride, m, p, finish);
      } else if (kMixVectors == 4 && vectors == 3) {
        mix_block<A, 3>(w, here, depth, b, b_stride, m, p, finish);
      } else if (kMixVectors == 4 && vectors == 2) {
        mix_block<A, 2>(w, here, depth, b, b_stride, m, p, finish);
      } else {
        mix_block<A, 1>(w, here, depth, b, b_stride, m, p, finish);
      }
    }
  }
}

// out[m] = v, or out[m] += v where it is not the first share of a sum over groups.
template <class A>
inline void mix_share(const A* a, int64_t a_stride, int64_t rows, int64_t depth, const A* b, int64_t stride,
                      int64_t pixels, bool first, A* out) {
  if (first) {
    mix(a, a_stride, rows, depth, b, stride, pixels,
        [&](int64_t m, int64_t p, Vec<A> v) { store(out + m * stride + p, v); });
  } else {
    mix(a, a_stride, rows, depth, b, stride, pixels, [&](int64_t m, int64_t p, Vec<A> v) {
      store(out + m * stride + p, load(out + m * stride + p) + v);
    });
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
