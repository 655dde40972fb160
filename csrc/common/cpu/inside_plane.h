// Sums of products with the pixels under a tap, over the plane alone.
//
// The fast loops of weight gradients run over the zeros around a plane too, which is right as long as what they
// multiply is finite: zero times infinity is NaN. Where a sum of theirs is not finite, these functions compute it
// again.
#pragma once

#include "tiles.h"

namespace mirage::cpu::MIRAGE_ISA {

template <class A>
MIRAGE_INLINE bool is_finite(A v) { return v - v == A(0); }

template <class A>
inline bool all_finite(const A* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!is_finite(v[i])) return false;
  }
  return true;
}

// Lines and columns outside the plane, among those that the taps of a block of pixels reach.
struct Outside { int64_t above, below, left, right; };

// For `rows` x `columns` pixels from (row, column) on, of a plane of height x width, and taps up to `reach` pixels
// away.
inline Outside outside(int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t height, int64_t width,
                       int64_t reach) {
  const auto over = [](int64_t n) { return n > 0 ? n : 0; };
  return {over(reach - row), over(row + rows + reach - height), over(reach - column),
          over(column + columns + reach - width)};
}
inline Outside outside(const Tile& t, int64_t reach) {
  return outside(t.row, t.column, t.rows, t.columns, t.height, t.width, reach);
}

// The sum of g[i][j] x[i + ky][j + kx] over those of `rows` x `columns` pixels whose tap lies in the plane. x: the tap
// of the first pixel at ky = kx = 0; `taps`: size of the kernel.
template <class A>
inline double tap_sum(const A* x, int64_t x_stride, const A* g, int64_t g_stride, int64_t rows, int64_t columns,
                      const Outside& out, int64_t taps, int64_t ky, int64_t kx) {
  const auto first = [](int64_t skipped, int64_t tap) { return skipped > tap ? skipped - tap : 0; };
  const int64_t top = first(out.above, ky), bottom = rows - first(out.below, taps - 1 - ky);
  const int64_t left = first(out.left, kx), right = columns - first(out.right, taps - 1 - kx);
  double total = 0;
  for (int64_t i = top; i < bottom && left < right; ++i) {
    total += double(dot(g + i * g_stride + left, x + (i + ky) * x_stride + left + kx, right - left));
  }
  return total;
}

}  // namespace mirage::cpu::MIRAGE_ISA
