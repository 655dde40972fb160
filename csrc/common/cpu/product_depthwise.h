// A 1x1 convolution with a depthwise 3x3 one behind it, on rows of a tile, and their gradients: q, k and v of an attention.
#pragma once

#include "gemm.h"
#include "inner_tile.h"
#include "run_sums.h"

namespace mirage::cpu::MIRAGE_ISA {

// `rows` of matrix * in with a halo of one pixel, zero outside the plane: [rows, outer]. `in` and `out` begin with the line
// above the tile, in lines of the tile's own halo. bias: of the product, or null; only for a tile with a halo of one.
template <class P, class A>
inline void product_rows(const Matrix<P>& matrix, int64_t rows, int64_t channels, const P* in, const Tile& tile,
                         int64_t outer, const A* bias, A* out) {
  const int64_t pixels = whole_vectors<A>((tile.rows + 2) * tile.stride);
  const Span span = inside_plane<A>(tile, 1);
  A* const inside = out + span.begin;
  mix(matrix, rows, channels, in + span.begin, outer, span.end - span.begin, [&](int64_t m, int64_t p, Vec<A> v) {
    store(inside + m * outer + p, bias ? v + bias[m] : v);
  });
  if (bias) clear_outside(out, rows, outer, tile);
  else clear_around(span, pixels, rows, outer, out);
}

// The depthwise convolution of such rows, `halo` being the tile's own: dense rows [rows, inner]. bias: one number for each
// row, or null.
template <class A>
inline void depthwise_rows_of(const A* rows, int64_t count, const Tile& tile, int64_t outer, const A* taps, const A* bias,
                              int64_t inner, A* out) {
  for (int64_t j = 0; j < count; ++j) {
    A* const row = out + j * inner;
    depthwise<3>(rows + j * outer + tile.halo - 1, tile.stride, taps + j * 9, row, tile.rows, tile.columns);
    if (!bias) continue;
    for (int64_t p = 0, n = dense_pixels<A>(tile); p < n; p += kLanes<A>) store(row + p, load(row + p) + bias[j]);
  }
}

// sums[j * 9 + tap] += the gradients of the depthwise convolution's weights. rows: what it convolved, with a halo of one;
// grad: of its result, dense.
template <class A>
inline void add_depthwise_sums(const A* rows, int64_t count, const Tile& tile, int64_t outer, const A* grad,
                               int64_t inner, A* sums) {
  for (int64_t j = 0; j < count; ++j) {
    correlate<3>(rows + j * outer, tile.stride, grad + j * inner, tile.columns, tile.rows, tile.columns,
                 outside(tile, 1), sums + j * 9);
  }
}

// Of a dense row, whose last vector ends with zeros.
template <class A>
inline A sum_of_squares(const A* row, int64_t pixels) {
  Vec<A> total = {};
  for (int64_t p = 0; p < pixels; p += kLanes<A>) total += load(row + p) * load(row + p);
  return sum<A>(total);
}

// sums[j] += the sum of a dense row, whose last vector ends with zeros.
template <class A>
inline void add_row_sums(const A* rows, int64_t count, int64_t stride, int64_t pixels, A* sums) {
  for (int64_t j = 0; j < count; ++j) {
    const A* const row = rows + j * stride;
    add_in_runs<1, A>(pixels, {sums + j}, [&](int64_t p, Vec<A>* lanes) { lanes[0] += load(row + p); });
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
