// Weight gradients: S[m][k] += sum over pixels of A[m][p] B[k][p]. A block of kOuterRows x kOuterColumns vectors of
// products stays in registers while the pixels run; lanes are added up once per block.
#pragma once

#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kOuterRows = 4, kOuterColumns = 4;
#else
constexpr int kOuterRows = 3, kOuterColumns = 3;
#endif
constexpr int kHighRows = 8, kHighColumns = 3;  // with 32 registers
constexpr int64_t kHighPixels = 768;

#if defined(__AVX512F__)
// Reduces 16 vectors of 16 lanes to one vector, whose lane i is the sum of the lanes of vector i. With N vectors each
// owns a run of 16 / N lanes of the result; a step adds the two halves of every run of two such results.
template <int N>
MIRAGE_INLINE __m512 sum_each(const Vec<float>* v) {
  if constexpr (N == 1) {
    return (__m512)v[0];
  } else {
    const __m512 a = sum_each<N / 2>(v), b = sum_each<N / 2>(v + N / 2);
    constexpr int run = 16 / N;
    alignas(64) int32_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      low[i] = i / 8 * 16 + i % 8 / run * 2 * run + i % run;
      high[i] = low[i] + run;
    }
    return _mm512_add_ps(_mm512_permutex2var_ps(a, _mm512_load_si512(low), b),
                         _mm512_permutex2var_ps(a, _mm512_load_si512(high), b));
  }
}
#endif

// out[i] = the sum of the lanes of v[i].
template <class A, int N>
MIRAGE_INLINE void sum_all(const Vec<A> (&v)[N], A* out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4 && N == 16) {
    _mm512_storeu_ps(out, sum_each<16>(v));
    return;
  }
  if constexpr (sizeof(A) == 4 && N == 24) {
    const Vec<float> rest[16] = {v[16], v[17], v[18], v[19], v[20], v[21], v[22], v[23]};
    _mm512_storeu_ps(out, sum_each<16>(v));
    _mm512_mask_storeu_ps(out + 16, 0xff, sum_each<16>(rest));
    return;
  }
#endif
  for (int i = 0; i < N; ++i) out[i] = sum<A>(v[i]);
}

// sums[m][k] of one block of R x C, of which `here` rows and `wide` columns count.
template <int R, int C, class A>
MIRAGE_INLINE void add_outer_block(const A* a, int64_t a_stride, int64_t here, const A* b, int64_t b_stride, int64_t wide,
                                   int64_t pixels, A* sums, int64_t sums_stride) {
  const A *x[R], *y[C];
  for (int i = 0; i < R; ++i) x[i] = a + (i < here ? i : here - 1) * a_stride;
  for (int j = 0; j < C; ++j) y[j] = b + (j < wide ? j : wide - 1) * b_stride;
  Vec<A> products[R * C] = {};
  for (int64_t p = 0; p < pixels; p += kLanes<A>) {
    Vec<A> v[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) v[j] = load(y[j] + p);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec<A> u = load(x[i] + p);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) products[i * C + j] += u * v[j];
    }
  }
  A totals[R * C];
  sum_all<A>(products, totals);
  for (int64_t i = 0; i < here; ++i) {
    for (int64_t j = 0; j < wide; ++j) sums[i * sums_stride + j] += totals[i * C + j];
  }
}

template <int R, int C, class A>
inline void add_outer_in_blocks(const A* a, int64_t a_stride, int64_t rows, const A* b, int64_t b_stride, int64_t columns,
                                int64_t pixels, A* sums, int64_t sums_stride) {
  for (int64_t m = 0; m < rows; m += R) {
    for (int64_t k = 0; k < columns; k += C) {
      add_outer_block<R, C>(a + m * a_stride, a_stride, rows - m < R ? rows - m : R, b + k * b_stride, b_stride,
                            columns - k < C ? columns - k : C, pixels, sums + m * sums_stride + k, sums_stride);
    }
  }
}

// `pixels` is a multiple of the lanes: where the last vector holds fewer, one operand is zero there and the other finite.
template <class A>
inline void add_outer(const A* a, int64_t a_stride, int64_t rows, const A* b, int64_t b_stride, int64_t columns,
                      int64_t pixels, A* sums, int64_t sums_stride) {
#if defined(__AVX512F__)
  // Every block of rows reads all of b, from the second-level cache where it is large: higher blocks read it less often. A
  // run of pixels is as long as their rows fit in the first level.
  if (sizeof(A) == 4 && (rows >= 32 || rows % kHighRows == 0) && pixels >= 8 * kLanes<A>) {
    for (int64_t p = 0; p < pixels; p += kHighPixels) {
      add_outer_in_blocks<kHighRows, kHighColumns>(a + p, a_stride, rows, b + p, b_stride, columns,
                                                   pixels - p < kHighPixels ? pixels - p : kHighPixels, sums, sums_stride);
    }
    return;
  }
#endif
  add_outer_in_blocks<kOuterRows, kOuterColumns>(a, a_stride, rows, b, b_stride, columns, pixels, sums, sums_stride);
}

}  // namespace mirage::cpu::MIRAGE_ISA
