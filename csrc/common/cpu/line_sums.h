// Sums of channels over the lines of a tile.
#pragma once

#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {

// sums[c] += the sum of each channel over `rows` lines of `columns` pixels, `stride` apart.
template <class A>
inline void add_line_sums(const A* lines, int64_t count, int64_t capacity, int64_t rows, int64_t columns, int64_t stride,
                          A* sums) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < count; ++c) {
    Vec<A> total = {};
    for (int64_t r = 0; r < rows; ++r) {
      const A* const line = lines + c * capacity + r * stride;
      int64_t p = 0;
      for (; p + L <= columns; p += L) total += load(line + p);
      if (p < columns) total += load_n(line + p, int(columns - p));
    }
    sums[c] += sum<A>(total);
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
