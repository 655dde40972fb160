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
#endif
  for (int i = 0; i < N; ++i) out[i] = sum<A>(v[i]);
}

// `pixels` is a multiple of the lanes: where the last vector holds fewer, one operand is zero there and the other finite.
template <class A>
inline void add_outer(const A* a, int64_t a_stride, int64_t rows, const A* b, int64_t b_stride, int64_t columns,
                      int64_t pixels, A* sums, int64_t sums_stride) {
  for (int64_t m = 0; m < rows; m += kOuterRows) {
    const int64_t here = rows - m < kOuterRows ? rows - m : kOuterRows;
    const A* x[kOuterRows];
    for (int i = 0; i < kOuterRows; ++i) x[i] = a + (m + (i < here ? i : here - 1)) * a_stride;
    for (int64_t k = 0; k < columns; k += kOuterColumns) {
      const int64_t wide = columns - k < kOuterColumns ? columns - k : kOuterColumns;
      const A* y[kOuterColumns];
      for (int j = 0; j < kOuterColumns; ++j) y[j] = b + (k + (j < wide ? j : wide - 1)) * b_stride;
      Vec<A> products[kOuterRows * kOuterColumns] = {};
      for (int64_t p = 0; p < pixels; p += kLanes<A>) {
        Vec<A> v[kOuterColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kOuterColumns; ++j) v[j] = load(y[j] + p);
#pragma GCC unroll 4
        for (int i = 0; i < kOuterRows; ++i) {
          const Vec<A> u = load(x[i] + p);
#pragma GCC unroll 4
          for (int j = 0; j < kOuterColumns; ++j) products[i * kOuterColumns + j] += u * v[j];
        }
      }
      A totals[kOuterRows * kOuterColumns];
      sum_all<A>(products, totals);
      for (int64_t i = 0; i < here; ++i) {
        for (int64_t j = 0; j < wide; ++j) sums[(m + i) * sums_stride + k + j] += totals[i * kOuterColumns + j];
      }
    }
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
