// Sums over long rows, which neither their length nor a few large terms round away.
#pragma once

#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {

// Vectors that a lane adds up before a sum goes on in double: few roundings a term. Where channels hardly differ a
// standardised value is hundreds of times its neighbours, and a long sum in one go would round these away.
constexpr int64_t kVectorsOfRun = 32;

// sums[i] += the sum over `pixels`, a whole number of vectors, of what add(p, lanes) adds to lanes[i] for the pixels of
// the vector that begins at p.
template <int N, class A, class Add>
MIRAGE_INLINE void add_in_runs(int64_t pixels, A* const (&sums)[N], Add add) {
  double totals[N] = {};
  for (int64_t start = 0; start < pixels; start += kVectorsOfRun * kLanes<A>) {
    const int64_t whole = start + kVectorsOfRun * kLanes<A>, end = whole < pixels ? whole : pixels;
    Vec<A> lanes[N] = {};
    for (int64_t p = start; p < end; p += kLanes<A>) add(p, lanes);
    for (int i = 0; i < N; ++i) totals[i] += double(sum<A>(lanes[i]));
  }
  for (int i = 0; i < N; ++i) *sums[i] += A(totals[i]);
}

}  // namespace mirage::cpu::MIRAGE_ISA
