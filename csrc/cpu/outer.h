// placeholder until the shared header lands
#pragma once
#include "vec.h"
namespace mirage::cpu::MIRAGE_ISA {
template <class A>
void add_outer(const A* a, int64_t a_stride, int64_t rows, const A* b, int64_t b_stride, int64_t columns,
               int64_t pixels, A* sums, int64_t sums_stride) {
  for (int64_t m = 0; m < rows; m += 4)
    for (int64_t k = 0; k < columns; k += 4) {
      Vec<A> acc[4][4] = {};
      const int64_t mr = rows - m < 4 ? rows - m : 4, kr = columns - k < 4 ? columns - k : 4;
      const A *pa[4], *pb[4];
      for (int i = 0; i < 4; ++i) { pa[i] = a + (m + (i < mr ? i : mr - 1)) * a_stride; pb[i] = b + (k + (i < kr ? i : kr - 1)) * b_stride; }
      for (int64_t p = 0; p < pixels; p += kLanes<A>) {
        Vec<A> vb[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) vb[j] = load(pb[j] + p);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec<A> va = load(pa[i] + p);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) acc[i][j] += va * vb[j];
        }
      }
      for (int i = 0; i < mr; ++i) for (int j = 0; j < kr; ++j) sums[(m + i) * sums_stride + k + j] += sum<A>(acc[i][j]);
    }
}
}
