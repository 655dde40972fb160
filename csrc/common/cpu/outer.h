// Weight gradients: S[m][k] += sum over pixels of A[m][p] B[k][p].
//
// Of few channels a block of kOuterRows x kOuterColumns vectors of products stays in registers while the pixels run, and lanes
// are added up once per block. Of many every block would read its rows of B from the second-level cache: there pixels become
// rows of channels, and the sums a product over pixels like those over channels (gemm.h).
#pragma once

#include "gemm.h"
#include "transpose.h"

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

// Pixels that a product adds up in registers: more would round more, and a panel of them has to stay in the first-level cache.
constexpr int64_t kOuterPixels = 96;

// sums[m][k] += sum over `pixels` of a[m][p] b[p][k]. b: rows of `width` channels, whole vectors of which `channels` count.
template <class A>
inline void add_outer_panel(const A* a, int64_t a_stride, int64_t rows, const A* b, int64_t channels, int64_t width,
                            int64_t pixels, A* sums, int64_t sums_stride) {
  mix(Matrix<A>{a, a_stride}, rows, PixelRows<A>{b, width, pixels}, width, [&](int64_t m, int64_t k, Vec<A> v) {
    A* const to = sums + m * sums_stride + k;
    if (k + kLanes<A> <= channels) store(to, load(to) + v);
    else store_n(to, load_n(to, int(channels - k)) + v, int(channels - k));
  });
}

// B of several sums: pixels as rows of channels in panels of kMixPixels channels, [panels, pixels, channels of the panel],
// or the rows themselves where they are few. The last panel has as many channels as fill whole vectors.
template <class A>
struct OuterOperand {
  A* data;
  int64_t channels, capacity;  // capacity: pixels

  static int64_t size(int64_t channels, int64_t capacity) { return round_up(channels, kLanes<A>) * capacity; }

  // Takes pixels of `in` [channels, stride] as those from `at` on, and with them as many as fill a vector.
  void put(const A* in, int64_t stride, int64_t at, int64_t pixels) const {
    if (in_panels()) {
      return for_each_panel([&](int64_t first, A* panel, int64_t here, int64_t width) {
        transpose_rows(in + first * stride, stride, here, pixels, width, panel + at * width);
      });
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < pixels; p += kLanes<A>) store(data + c * capacity + at + p, load(in + c * stride + p));
    }
  }

  void clear(int64_t begin, int64_t end) const {
    if (in_panels()) {
      return for_each_panel([&](int64_t, A* panel, int64_t, int64_t width) {
        for (int64_t i = begin * width; i < end * width; ++i) panel[i] = A(0);
      });
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = begin; p < end; ++p) data[c * capacity + p] = A(0);
    }
  }

  // sums[m][k] += sum over `pixels` of a[m][p] times those of channel k.
  void add_outer_of(const A* a, int64_t a_stride, int64_t rows, int64_t pixels, A* sums, int64_t sums_stride) const {
    if (!in_panels()) {
      return add_outer_in_blocks<kOuterRows, kOuterColumns>(a, a_stride, rows, data, capacity, channels, pixels, sums,
                                                            sums_stride);
    }
    for (int64_t p = 0; p < pixels; p += kOuterPixels) {
      const int64_t here = pixels - p < kOuterPixels ? pixels - p : kOuterPixels;
      for_each_panel([&](int64_t first, const A* panel, int64_t there, int64_t width) {
        add_outer_panel(a + p, a_stride, rows, panel + p * width, there, width, here, sums + first, sums_stride);
      });
    }
  }

 private:
  bool in_panels() const { return channels >= 2 * kLanes<A>; }

  // f(first channel, its pixels, channels that are there, width) for each panel.
  template <class F>
  MIRAGE_INLINE void for_each_panel(F f) const {
    for (int64_t first = 0; first < channels; first += kMixPixels<A>) {
      const int64_t here = channels - first < kMixPixels<A> ? channels - first : kMixPixels<A>;
      f(first, data + first * capacity, here, round_up(here, kLanes<A>));
    }
  }
};

// Pixels behind the last have to be there up to a whole vector: one operand zero, the other finite.
template <class A>
inline void add_outer(const A* a, int64_t a_stride, int64_t rows, const OuterOperand<A>& b, int64_t pixels, A* sums,
                      int64_t sums_stride) {
  b.add_outer_of(a, a_stride, rows, pixels, sums, sums_stride);
}

// The same with rows b [columns, b_stride] that are used once.
template <class A>
inline void add_outer(const A* a, int64_t a_stride, int64_t rows, const A* b, int64_t b_stride, int64_t columns,
                      int64_t pixels, A* sums, int64_t sums_stride) {
  constexpr int64_t kMany = 48;  // so that transposing costs little beside the sums
  if (rows < kMany || columns < kMany) {
    return add_outer_in_blocks<kOuterRows, kOuterColumns>(a, a_stride, rows, b, b_stride, columns, pixels, sums, sums_stride);
  }
  alignas(64) A panel[kOuterPixels * kMixPixels<A>];
  for (int64_t p = 0; p < pixels; p += kOuterPixels) {
    const int64_t here = pixels - p < kOuterPixels ? pixels - p : kOuterPixels;
    for (int64_t k = 0; k < columns; k += kMixPixels<A>) {
      const int64_t there = columns - k < kMixPixels<A> ? columns - k : kMixPixels<A>, width = round_up(there, kLanes<A>);
      transpose_rows(b + k * b_stride + p, b_stride, there, here, width, panel);
      add_outer_panel(a + p, a_stride, rows, panel, there, width, here, sums + k, sums_stride);
    }
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
