// The register blocks of dynamic_depthwise_conv2d, over rows that are padded with zeros.
//
// Loops whose bounds are the block's are unrolled by the compiler's front end, because the sums must be in registers:
// unrolled<N>(f) calls f with the integers below N as types.
#pragma once

#include <utility>

#include "common/cpu/vec.h"

namespace mirage::cpu::MIRAGE_ISA {

template <int I>
struct Index {
  static constexpr int value = I;
};

// The calls follow each other instead of nesting: every level of nesting would inline another copy of the function.
template <class F, int... I>
MIRAGE_INLINE void unrolled_over(F& f, std::integer_sequence<int, I...>) { (f(Index<I>{}), ...); }
template <int N, class F>
MIRAGE_INLINE void unrolled(F f) { unrolled_over(f, std::make_integer_sequence<int, N>{}); }

#define MIRAGE_UNROLLED(index) [&](auto index) __attribute__((always_inline))

// How many vectors fit the registers: 32 of them with AVX-512 and on arm64, 16 with AVX2 and SSE2.
#if MIRAGE_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kMaxVectors = 4;    // neighbouring vectors of a convolution block
constexpr int kMaxSums = 22;      // sums of a correlation block
constexpr int kTallVectors = 2;   // blocks of so few vectors have kTallRows rows where the strip has them
#else
constexpr int kMaxVectors = 2;
constexpr int kMaxSums = 11;
constexpr int kTallVectors = 1;
#endif
constexpr int kRows = 4;  // rows of a block
constexpr int kTallRows = 8;

// Output rows [0, R) of V vectors, of which the last begins at `last` (it may overlap the one before: a width that is
// no multiple of the vector costs no partial stores).
//   x: input of the first output's first tap, rows `stride` apart; weight: [K, K], column by column
//   y: rows `width` apart, of which the first `rows` are stored
template <int K, int R, int V, class T>
__attribute__((noinline)) void convolve_block(const Acc<T>* x, int64_t stride, int64_t last, const Acc<T>* weight, T* y,
                                              int64_t width, int rows) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sums[R][V] = {};
  for (int kx = 0; kx < K; ++kx, ++x, weight += K) {
    unrolled<R + K - 1>(MIRAGE_UNROLLED(i) {
      const A* const row = x + decltype(i)::value * stride;
      Vec<A> b[V];
      unrolled<V>(MIRAGE_UNROLLED(v) {
        constexpr int o = decltype(v)::value;
        b[o] = load(row + (o < V - 1 ? o * L : last));
      });
      unrolled<R>(MIRAGE_UNROLLED(r) {
        constexpr int ky = decltype(i)::value - decltype(r)::value;
        if constexpr (ky >= 0 && ky < K) {
          unrolled<V>(MIRAGE_UNROLLED(v) {
            sums[decltype(r)::value][decltype(v)::value] += b[decltype(v)::value] * weight[ky];
          });
        }
      });
    });
  }
  unrolled<R>(MIRAGE_UNROLLED(r) {
    constexpr int o = decltype(r)::value;
    if (o >= rows) return;
    T* const row = y + o * width;
    unrolled<V>(MIRAGE_UNROLLED(v) {
      constexpr int n = decltype(v)::value;
      if constexpr (n < V - 1) {
        store(row + n * L, sums[o][n]);
      } else if (V > 1 || width >= L) {
        store(row + last, sums[o][n]);
      } else {
        store_n(row, sums[o][n], int(width));
      }
    });
  });
}

// sums[ky][j] += g[r] * x[r + ky] shifted by j, over R rows of one vector. In the last vector of a row, x counts only
// `inside` the row (g is zero beyond it, but zero times infinity is not).
template <int K, int G, int R, bool TAIL, class A>
MIRAGE_INLINE void correlate_block(const A* x, const A* g, int64_t stride, IVec<A> inside, Vec<A> (&sums)[K][G]) {
  Vec<A> b[R];
  unrolled<R>(MIRAGE_UNROLLED(r) { b[decltype(r)::value] = load(g + decltype(r)::value * stride); });
  unrolled<R + K - 1>(MIRAGE_UNROLLED(i) {
    const A* const row = x + decltype(i)::value * stride;
    unrolled<G>(MIRAGE_UNROLLED(j) {
      constexpr int o = decltype(j)::value;
      Vec<A> v = load(row + o);
      if constexpr (TAIL) v = select<A>(inside, v, Vec<A>{});
      unrolled<R>(MIRAGE_UNROLLED(r) {
        constexpr int ky = decltype(i)::value - decltype(r)::value;
        if constexpr (ky >= 0 && ky < K) sums[ky][o] += b[decltype(r)::value] * v;
      });
    });
  });
}

// Adds to `total` the sums of products for G neighbouring kernel columns over a strip. total: [K, K] vectors, from the
// first of those columns on.
template <int K, int G, class A>
__attribute__((noinline)) void correlate_columns(const A* x, const A* g, int64_t stride, int64_t width, int64_t rows,
                                                 A* total) {
  constexpr int L = kLanes<A>;
  Vec<A> sums[K][G];
  IVec<A> inside = {};
  const int64_t full = width / L * L;
  for (int i = 0; i < L; ++i) inside[i] = i < width - full ? -1 : 0;
  unrolled<K * G>(MIRAGE_UNROLLED(i) {
    constexpr int ky = decltype(i)::value / G, j = decltype(i)::value % G;
    sums[ky][j] = load(total + (ky * K + j) * L);
  });
  int64_t y = 0;
  for (; y + kRows <= rows; y += kRows, x += kRows * stride, g += kRows * stride) {
    for (int64_t c = 0; c < full; c += L) correlate_block<K, G, kRows, false>(x + c, g + c, stride, inside, sums);
    if (full < width) correlate_block<K, G, kRows, true>(x + full, g + full, stride, inside, sums);
  }
  for (; y < rows; ++y, x += stride, g += stride) {
    for (int64_t c = 0; c < full; c += L) correlate_block<K, G, 1, false>(x + c, g + c, stride, inside, sums);
    if (full < width) correlate_block<K, G, 1, true>(x + full, g + full, stride, inside, sums);
  }
  unrolled<K * G>(MIRAGE_UNROLLED(i) {
    constexpr int ky = decltype(i)::value / G, j = decltype(i)::value % G;
    store(total + (ky * K + j) * L, sums[ky][j]);
  });
}

// total[ky][kx] += sum over the strip of g[i][j] * x[i + ky][j + kx], lane by lane.
template <int K, int FIRST, class A>
MIRAGE_INLINE void correlate_from(const A* x, const A* g, int64_t stride, int64_t width, int64_t rows, A* total) {
  constexpr int L = kLanes<A>, left = K - FIRST, most = kMaxSums / K;
  // Groups of the same size where they divide the columns, so that few functions are compiled.
  constexpr int G = left <= most ? left : left % most == 1 && most > 2 ? most - 1 : most;
  correlate_columns<K, G>(x + FIRST, g, stride, width, rows, total + FIRST * L);
  if constexpr (FIRST + G < K) correlate_from<K, FIRST + G>(x, g, stride, width, rows, total);
}

}  // namespace mirage::cpu::MIRAGE_ISA
