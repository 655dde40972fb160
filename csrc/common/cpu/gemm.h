// Channel mixing: C[m][p] = sum_k A[m][k] B[k][p], rows of pixels, with register-blocked micro-kernels.
//
// B and C are buffers of channels times pixels, pixels contiguous; A is a weight matrix in row-major order. A block of
// kMixRows x kMixVectors vectors of C stays in registers while k runs: in each step kMixVectors loads of B and kMixRows
// broadcasts of A feed kMixRows * kMixVectors multiply-adds. Rows that are left at the end make a smaller block. Elements
// of A and B are of the accumulator type or pairs of channels (operands.h); `depth` counts elements, C is of the
// accumulator type. What happens to a finished vector is up to the caller (an activation before it is stored, a sum with
// what is there), so that it needs no pass of its own.
// Pairs of channels are multiplied in tiles where the processor has them (amx_tiles.h).
#pragma once

#include "operands.h"

namespace mirage::cpu::MIRAGE_ISA {

#if defined(__AVX512F__)
constexpr int kMixRows = 6, kMixVectors = 4;  // 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kMixRows = 6, kMixVectors = 2;  // 12 of 16: two multiply-adds begin in each cycle, and take four or five
#else
constexpr int kMixRows = 4, kMixVectors = 2;  // 8 of 16 (NEON has 32)
#endif

// Pixels per block of registers. Buffers end on a multiple of the lanes, and may be read and written up to there.
template <class A> constexpr int64_t kMixPixels = kMixVectors * kLanes<A>;

// An epilogue that takes all vectors of a row at once: f(m, pixel, vectors), `vectors` being an array of 1 to
// kMixVectors.
template <class F>
struct ByRow {
  F f;
};
template <class F>
MIRAGE_INLINE ByRow<F> by_row(F f) { return {f}; }

template <class F> constexpr bool kByRow = false;
template <class F> constexpr bool kByRow<ByRow<F>> = true;

template <class A, int V, class F>
MIRAGE_INLINE void finish_row(const F& finish, int64_t m, int64_t p, Vec<A> (&v)[V]) {
  if constexpr (kByRow<F>) {
    finish.f(m, p, v);
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) finish(m, p + j * kLanes<A>, v[j]);
  }
}

// Stores the vectors of a row.
template <class A, int V>
MIRAGE_INLINE void store_each(A* p, const Vec<A> (&v)[V]) {
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) store(p + j * kLanes<A>, v[j]);
}

template <class V, int N, class A>
MIRAGE_INLINE void add_to_each(V (&v)[N], A value) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) v[i] += value;
}

// c += A B: `a` are rows of A, `b` the first pixel's element of the first row of B.
template <class P, int R, int V>
MIRAGE_INLINE void mix_steps(Vec<Acc<P>> (&c)[R][V], const P* const (&a)[R], int64_t depth, const P* b, int64_t b_stride) {
  for (int64_t k = 0; k < depth; ++k) {
    const P* row = b + k * b_stride;
    decltype(load(row)) v[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) v[j] = load(row + j * kLanes<Acc<P>>);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const auto w = splat(a[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) c[i][j] = multiply_add(c[i][j], w, v[j]);
    }
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__) && defined(__GNUC__)

// c0 += a v0, c1 += a v1. In assembly: compilers keep some of so many sums in memory from step to step.
MIRAGE_INLINE void add_to_row(Vec<float>& c0, Vec<float>& c1, const float& a, Vec<float> v0, Vec<float> v1) {
  Vec<float> w;
  asm("vbroadcastss %3, %2\n\t"
      "vfmadd231ps %4, %2, %0\n\t"
      "vfmadd231ps %5, %2, %1"
      : "+x"(c0), "+x"(c1), "=&x"(w)
      : "m"(a), "x"(v0), "x"(v1));
}

// The same for a whole block of float: twelve sums, a vector of A and two of B in 15 of 16 registers. Two steps share what a
// loop costs.
MIRAGE_INLINE void mix_steps(Vec<float> (&c)[6][2], const float* const (&a)[6], int64_t depth, const float* b,
                             int64_t b_stride) {
  Vec<float> c00 = c[0][0], c01 = c[0][1], c10 = c[1][0], c11 = c[1][1], c20 = c[2][0], c21 = c[2][1];
  Vec<float> c30 = c[3][0], c31 = c[3][1], c40 = c[4][0], c41 = c[4][1], c50 = c[5][0], c51 = c[5][1];
  const float *const a0 = a[0], *const a1 = a[1], *const a2 = a[2], *const a3 = a[3], *const a4 = a[4], *const a5 = a[5];
  const auto step = [&](int64_t k, const float* row) __attribute__((always_inline)) {
    const Vec<float> v0 = load(row), v1 = load(row + kLanes<float>);
    add_to_row(c00, c01, a0[k], v0, v1);
    add_to_row(c10, c11, a1[k], v0, v1);
    add_to_row(c20, c21, a2[k], v0, v1);
    add_to_row(c30, c31, a3[k], v0, v1);
    add_to_row(c40, c41, a4[k], v0, v1);
    add_to_row(c50, c51, a5[k], v0, v1);
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, b += 2 * b_stride) {
    step(k, b);
    step(k + 1, b + b_stride);
  }
  if (k < depth) step(k, b);
  c[0][0] = c00, c[0][1] = c01, c[1][0] = c10, c[1][1] = c11, c[2][0] = c20, c[2][1] = c21;
  c[3][0] = c30, c[3][1] = c31, c[4][0] = c40, c[4][1] = c41, c[5][0] = c50, c[5][1] = c51;
}

#endif

// Right operand: rows of pixels.
template <class P>
struct PixelRows {
  const P* data;
  int64_t stride, depth;

  // product(the first column of A, the first row of B, of `depth` rows) for each product of a sum.
  template <class F>
  MIRAGE_INLINE void for_each_product(int64_t pixel, F product) const { product(0, data + pixel); }

  template <int R, int V>
  MIRAGE_INLINE void multiply(Vec<Acc<P>> (&c)[R][V], const P* const (&a)[R], int64_t pixel) const {
    mix_steps(c, a, depth, data + pixel, stride);
  }
};

// Right operand: the K x K pixels around each pixel, tap after tap. `data` is the first tap of the first pixel, in
// lines of `line` pixels. Partial sums over a few taps are added up, so that rounding errors do not grow with the
// number of taps.
template <int K, class P>
struct TapRows {
  const P* data;
  int64_t stride, depth, line;

  template <class F>
  MIRAGE_INLINE void for_each_product(int64_t pixel, F product) const {
    for (int tap = 0; tap < K * K; ++tap) product(tap * depth, data + pixel + tap / K * line + tap % K);
  }

  template <int R, int V>
  MIRAGE_INLINE void multiply(Vec<Acc<P>> (&c)[R][V], const P* const (&a)[R], int64_t pixel) const {
    const int together = depth > 64 ? 1 : K;
    const P* at[R];
    for (int i = 0; i < R; ++i) at[i] = a[i];
    for (int first = 0; first < K * K; first += together) {
      Vec<Acc<P>> share[R][V] = {};
      for (int tap = first; tap < first + together; ++tap) {
        mix_steps(share, at, depth, data + pixel + tap / K * line + tap % K, stride);
        for (int i = 0; i < R; ++i) at[i] += depth;
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) c[i][j] += share[i][j];
      }
    }
  }
};

// R rows of C from row m on, of which `rows` are wanted.
template <int R, int V, class P, class Rows, class Finish>
MIRAGE_INLINE void mix_block(const Matrix<P>& a, int64_t m, int64_t rows, const Rows& b, int64_t p, Finish finish) {
  const P* w[R];
  for (int i = 0; i < R; ++i) w[i] = a.data + (m + (i < rows ? i : rows - 1)) * a.stride;
  Vec<Acc<P>> c[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) c[i][j] = Vec<Acc<P>>{};
  }
  b.multiply(c, w, p);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    if (i < rows) finish_row<Acc<P>>(finish, m + i, p, c[i]);
  }
}

// All rows of C of V vectors of pixels. The last pixels are few: blocks of one size do for them.
template <int V, class P, class Rows, class Finish>
MIRAGE_INLINE void mix_column(const Matrix<P>& a, int64_t rows, const Rows& b, int64_t p, Finish finish) {
  constexpr bool kExact = V == kMixVectors;
  int64_t m = 0;
  for (; rows - m >= (kExact ? kMixRows : 1); m += kMixRows) {
    mix_block<kMixRows, V>(a, m, kExact || rows - m > kMixRows ? kMixRows : rows - m, b, p, finish);
  }
  if constexpr (kExact) {
    if (rows - m > 4) mix_block<kMixRows, V>(a, m, rows - m, b, p, finish);
    else if (rows - m > 2) mix_block<4, V>(a, m, rows - m, b, p, finish);
    else if (rows - m > 0) mix_block<2, V>(a, m, rows - m, b, p, finish);
  }
}

#if defined(__AMX_BF16__)
}  // namespace mirage::cpu::MIRAGE_ISA
#include "amx_tiles.h"
namespace mirage::cpu::MIRAGE_ISA {
#endif

// For all m < rows and pixels < `pixels` (a multiple of the lanes): finish(m, pixel, vector of C[m][pixel...]), or the
// vectors of a row together (by_row).
template <class P, class Rows, class Finish>
MIRAGE_INLINE void mix(const Matrix<P>& a, int64_t rows, const Rows& b, int64_t pixels, Finish finish) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<P, bf16x2>) {
    if (rows > 0 && b.depth > 0) return mix_in_tiles(a, rows, b, pixels, finish);
  }
#endif
  constexpr int L = kLanes<Acc<P>>;
  for (int64_t p = 0; p < pixels; p += kMixPixels<Acc<P>>) {
    const int64_t vectors = (pixels - p) / L;
    if (vectors >= kMixVectors) mix_column<kMixVectors>(a, rows, b, p, finish);
    else if (kMixVectors == 4 && vectors == 3) mix_column<3>(a, rows, b, p, finish);
    else if (kMixVectors == 4 && vectors == 2) mix_column<2>(a, rows, b, p, finish);
    else mix_column<1>(a, rows, b, p, finish);
  }
}

template <class P, class Finish>
MIRAGE_INLINE void mix(const P* a, int64_t a_stride, int64_t rows, int64_t depth, const P* b, int64_t b_stride,
                       int64_t pixels, Finish finish) {
  mix(Matrix<P>{a, a_stride}, rows, PixelRows<P>{b, b_stride, depth}, pixels, finish);
}

// The same with a matrix of `channels` columns.
template <class P, class Finish>
MIRAGE_INLINE void mix(const Matrix<P>& a, int64_t rows, int64_t channels, const P* b, int64_t b_stride, int64_t pixels,
                       Finish finish) {
  mix(a.data, a.stride, rows, packed<P>(channels), b, b_stride, pixels, finish);
}

// out[m] = v, or out[m] += v where it is not the first share of a sum over groups.
template <class P>
inline void mix_share(const Matrix<P>& a, int64_t rows, int64_t channels, const P* b, int64_t stride, int64_t pixels,
                      bool first, Acc<P>* out) {
  using A = Acc<P>;
  if (first) {
    mix(a, rows, channels, b, stride, pixels, [&](int64_t m, int64_t p, Vec<A> v) { store(out + m * stride + p, v); });
  } else {
    mix(a, rows, channels, b, stride, pixels, [&](int64_t m, int64_t p, Vec<A> v) {
      store(out + m * stride + p, load(out + m * stride + p) + v);
    });
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
