// Inner (dense) tiles: the pixels of a tile without its halo, packed line after line, so that matrix products over
// channels spend no work on the halo. Depthwise convolutions read a tile with its halo and write an inner one.
#pragma once

#include "inside_plane.h"
#include "tiles.h"

namespace mirage::cpu::MIRAGE_ISA {

MIRAGE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A>
MIRAGE_INLINE int64_t whole_vectors(int64_t pixels) { return round_up(pixels, kLanes<A>); }

// Elements per channel of a dense buffer: loads and stores of a last vector may run past the last pixel.
template <class A>
inline int64_t dense_capacity(const Tiling& t) { return whole_vectors<A>(t.tile_rows * t.tile_columns) + kLanes<A>; }

template <class A>
inline int64_t dense_pixels(const Tile& t) { return whole_vectors<A>(t.rows * t.columns); }

// Estimated cost of a sample in tiles of rows x columns, including the work on halos and the time that threads wait for
// the last tile.
template <class A>
inline double cost_of_tiles(const Tiling& t, int64_t outer, int64_t inner) {
  const double tiles = double(t.count()), even = double((t.count() + 1) / 2 * 2);
  const double held = double(outer * (t.tile_rows + 2 * t.halo) * (t.tile_columns + 2 * t.halo)),
               dense = double(inner * whole_vectors<A>(t.tile_rows * t.tile_columns));
  return (held + 2 * dense) * (tiles + 0.5) * even / tiles;
}

// Tiles for which `outer` channels with the halo and `inner` dense ones fit in so many kilobytes, where their cost is
// least. The shape alone decides. Two megabytes are more than most second-level caches: a product reads a panel of
// pixels once per pass, and larger halos cost more than the next cache.
template <class A>
inline Tiling choose_dense(int64_t height, int64_t width, int64_t halo, int64_t outer, int64_t inner,
                           int64_t kilobytes = 2048) {
  const int64_t budget = (kilobytes << 10) / int64_t(sizeof(A)), L = kLanes<A>;
  Tiling best{height, width, halo, 0, 0};
  double least = 0;
  for (int64_t across = 1; across == 1 || (width + across - 1) / across >= 2 * L; ++across) {
    int64_t columns = (width + across - 1) / across;
    if (across > 1) columns = smaller(round_up(columns, L), width);
    int64_t rows = (budget - outer * 2 * halo * (columns + 2 * halo)) / (outer * (columns + 2 * halo) + inner * columns);
    if (rows < 2) {
      if ((columns + 1) / 2 >= 2 * L) continue;  // narrower tiles will fit
      rows = 2;
    }
    const int64_t fewest = (height + smaller(rows, height) - 1) / smaller(rows, height);
    for (int64_t down = fewest; down < fewest + 8 && down <= height; ++down) {
      const Tiling t{height, width, halo, (height + down - 1) / down, columns};
      const double cost = cost_of_tiles<A>(t, outer, inner);
      if (best.tile_rows == 0 || cost < least) {
        best = t;
        least = cost;
      }
    }
  }
  return best;
}

// Tiles without a halo for products alone, `channels` in all. They save no halo by being large, and smaller ones leave room in
// the second-level cache for what is prefetched.
template <class A>
inline Tiling choose_pointwise(int64_t height, int64_t width, int64_t channels, int64_t kilobytes = 512) {
  return choose_dense<A>(height, width, 0, 0, channels, kilobytes);
}

// Zeros behind the last pixel of every channel, up to a whole vector.
template <class A>
inline void clear_tails(A* buffer, int64_t channels, int64_t capacity, int64_t pixels) {
  const int64_t whole = whole_vectors<A>(pixels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = pixels; p < whole; ++p) buffer[c * capacity + p] = A(0);
  }
}

// Copies the tile without its halo to dense lines, with zeros behind the last pixel.
template <class A>
inline void copy_dense(const A* in, int64_t in_capacity, const Tile& tile, int64_t channels, A* out,
                       int64_t out_capacity) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < channels; ++c) {
    const A* from = in + c * in_capacity + tile.halo * (tile.stride + 1);
    A* to = out + c * out_capacity;
    for (int64_t r = 0; r < tile.rows; ++r, from += tile.stride, to += tile.columns) {
      // The last vector of a line runs into the next, which is written later.
      for (int64_t i = 0; i < tile.columns; i += L) store(to + i, load(from + i));
    }
  }
  clear_tails(out, channels, out_capacity, tile.rows * tile.columns);
}

// V vectors in each of R lines of results, which share the lines that they read; the last begins at `last`.
template <int K, int R, int V, class A>
MIRAGE_INLINE void depthwise_block(const A* x, int64_t stride, const A* w, A* y, int64_t columns, int64_t last) {
  Vec<A> sums[R][V] = {};
#pragma GCC unroll 16
  for (int line = 0; line < R + K - 1; ++line) {
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      Vec<A> from[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) from[v] = load_once(x + line * stride + kx + (v == V - 1 ? last : v * kLanes<A>));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int ky = line - r;
        if (ky < 0 || ky >= K) continue;
        const Vec<A> tap = splat(w[ky * K + kx]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] += tap * from[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* const to = y + r * columns + (v == V - 1 ? last : v * kLanes<A>);
      if (columns >= kLanes<A>) store(to, sums[r][v]);
      else store_n(to, sums[r][v], int(columns));
    }
  }
}

template <int K, int R, class A>
inline void depthwise_rows(const A* x, int64_t stride, const A* w, A* y, int64_t columns) {
  constexpr int64_t L = kLanes<A>;
  int64_t p = 0;
  for (; columns - p > L; p += 2 * L) {
    depthwise_block<K, R, 2>(x + p, stride, w, y + p, columns, smaller(L, columns - L - p));
  }
  if (p < columns) {
    const int64_t at = columns >= L ? columns - L : 0;  // overlaps what is there rather than storing a part
    depthwise_block<K, R, 1>(x + at, stride, w, y + at, columns, 0);
  }
}

// y[i][j] = sum w[ky][kx] x[i + ky][j + kx] for `rows` dense lines of `columns` pixels; x: lines of `stride` pixels,
// the first tap of the first output.
template <int K, class A>
inline void depthwise(const A* x, int64_t stride, const A* w, A* y, int64_t rows, int64_t columns) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) depthwise_rows<K, 4>(x + r * stride, stride, w, y + r * columns, columns);
  for (; r < rows; ++r) depthwise_rows<K, 1>(x + r * stride, stride, w, y + r * columns, columns);
}

// One line of x against R lines of g, `g` and those above it: acc[i][kx] += g[-i][p] x[p + kx].
template <int K, int R, class A>
MIRAGE_INLINE void correlate_line(const A* x, const A* g, int64_t g_stride, int64_t columns, IVec<A> inside,
                                  Vec<A>* acc) {
  const int64_t full = columns / kLanes<A> * kLanes<A>;
  Vec<A> v[R];
  for (int64_t p = 0; p < full; p += kLanes<A>) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) v[i] = load_once(g - i * g_stride + p);
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      const Vec<A> u = load_once(x + p + kx);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) acc[i * K + kx] += v[i] * u;
    }
  }
  if (full == columns) return;  // zero times infinity is not zero: both sides count only inside the line
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) v[i] = select<A>(inside, load(g - i * g_stride + full), Vec<A>{});
#pragma GCC unroll 8
  for (int kx = 0; kx < K; ++kx) {
    const Vec<A> u = select<A>(inside, load(x + full + kx), Vec<A>{});
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) acc[i * K + kx] += v[i] * u;
  }
}

// Correlates R rows of taps together, so that each line of x is read once for all of them.
template <int K, int R, class A>
inline void correlate_taps(const A* x, int64_t x_stride, const A* g, int64_t g_stride, int64_t rows, int64_t columns,
                           A* sums) {
  IVec<A> inside = {};
  for (int i = 0; i < kLanes<A>; ++i) inside[i] = i < columns % kLanes<A> ? -1 : 0;
  Vec<A> acc[R * K] = {};
  for (int64_t line = 0; line < rows + R - 1; ++line) {
    const A *from = x + line * x_stride, *to = g + line * g_stride;
    if (line >= R - 1 && line < rows) {
      correlate_line<K, R>(from, to, g_stride, columns, inside, acc);
      continue;
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      if (line >= i && line - i < rows) correlate_line<K, 1>(from, to - i * g_stride, 0, columns, inside, acc + i * K);
    }
  }
  for (int i = 0; i < R * K; ++i) sums[i] += sum<A>(acc[i]);
}

// sums[ky][kx] += sum over the tile of g[i][j] * x[i + ky][j + kx]; x and g: the first lines, `x_stride` and `g_stride`
// apart.
template <int K, class A>
inline void correlate(const A* x, int64_t x_stride, const A* g, int64_t g_stride, int64_t rows, int64_t columns,
                      A* sums) {
  constexpr int together = MIRAGE_VECTOR_BYTES < 64 ? 1 : K == 3 ? 3 : 2;  // within the registers
  int ky = 0;
  for (; ky + together <= K; ky += together) {
    correlate_taps<K, together>(x + ky * x_stride, x_stride, g, g_stride, rows, columns, sums + ky * K);
  }
  for (; ky < K; ++ky) correlate_taps<K, 1>(x + ky * x_stride, x_stride, g, g_stride, rows, columns, sums + ky * K);
}

// The same for a block that reaches outside the plane, where x is zero: the zeros are not multiplied where g is not
// finite.
template <int K, class A>
inline void correlate(const A* x, int64_t x_stride, const A* g, int64_t g_stride, int64_t rows, int64_t columns,
                      const Outside& out, A* sums) {
  A found[K * K] = {};
  correlate<K>(x, x_stride, g, g_stride, rows, columns, found);
  for (int i = 0; i < K * K; ++i) {
    if (!is_finite(found[i])) found[i] = A(tap_sum(x, x_stride, g, g_stride, rows, columns, out, K, i / K, i % K));
    sums[i] += found[i];
  }
}

// Returns the same tile with another halo.
template <class A>
inline Tile with_halo(Tile t, int64_t halo) {
  t.halo = halo;
  t.stride = t.columns + 2 * halo;
  t.outer_pixels = whole_vectors<A>((t.rows + 2 * halo) * t.stride);
  return t;
}

// Stores a dense tile at its place in contiguous planes.
template <class T>
inline void store_dense(const Acc<T>* in, int64_t capacity, const Tile& tile, int64_t channels, T* planes) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      store_row(planes + (c * tile.height + tile.row + r) * tile.width + tile.column, in + c * capacity + r * tile.columns,
                tile.columns);
    }
  }
}

// y = x + scale * out for the pixels of a dense tile, y of strides `to` with whole lines; `line` is scratch for one line.
// scale: a number for each channel, or null for ones.
template <class T>
inline void add_dense(const T* x, const Tensor& t, const Tile& tile, int64_t channels, int64_t capacity,
                      const Acc<T>* out, T* y, const Tensor& to, Acc<T>* line, const Acc<T>* scale = nullptr) {
  constexpr int L = kLanes<Acc<T>>;
  for (int64_t c = 0; c < channels; ++c) {
    const Acc<T> factor = scale ? scale[c] : Acc<T>(1);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* px = x + c * t.stride[1] + (tile.row + r) * t.stride[2] + tile.column * t.stride[3];
      T* py = y + c * to.stride[1] + (tile.row + r) * to.stride[2] + tile.column;
      const Acc<T>* po = out + c * capacity + r * tile.columns;
      if (c + 1 < channels) prefetch_row_to_write(py + to.stride[1], tile.columns);
      if (t.stride[3] == 1) {
        if (c + 1 < channels) prefetch_row(px + t.stride[1], tile.columns);
        int64_t i = 0;
        for (; i + L <= tile.columns; i += L) store(py + i, load(px + i) + factor * load(po + i));
        const int left = int(tile.columns - i);
        if (left > 0) store_n(py + i, load_n(px + i, left) + factor * load_n(po + i, left), left);
      } else {
        load_row(px, t.stride[3], tile.columns, line);
        for (int64_t i = 0; i < tile.columns; ++i) py[i] = from_acc<T>(line[i] + factor * po[i]);
      }
    }
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
