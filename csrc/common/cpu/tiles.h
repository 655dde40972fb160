// A plane cut into tiles with a halo: what a stage holds in cache at a time.
//
// A tile of rows x columns output pixels is kept as lines of `stride` = columns + 2 * halo pixels, the halo included;
// what lies outside the plane is zero. A depthwise tap then is an offset, and one loop over the pixels of a tile serves
// all its rows: the results at the halo columns mean nothing and are not written.
#pragma once

#include "dtypes.h"
#include "layer_norm_tile.h"
#include "parallel.h"

namespace mirage::cpu::MIRAGE_ISA {

struct Tile {
  int64_t halo, row, column, rows, columns;  // first output pixel and size, in the plane
  int64_t height, width;                     // of the plane
  int64_t stride;                            // pixels per line
  int64_t outer_pixels;                      // lines of the halo included, rounded up to whole vectors
  int64_t inner_pixels;                      // output lines, rounded up to whole vectors
};

struct Tiling {
  int64_t height, width, halo, tile_rows, tile_columns;

  int64_t down() const { return (height + tile_rows - 1) / tile_rows; }
  int64_t across() const { return (width + tile_columns - 1) / tile_columns; }
  int64_t count() const { return down() * across(); }
  int64_t stride() const { return tile_columns + 2 * halo; }

  // Pixels per channel of a buffer. The last taps of the last line read one vector past it.
  template <class A>
  int64_t outer_capacity() const { return round_up((tile_rows + 2 * halo) * stride(), kLanes<A>) + 2 * kLanes<A>; }
  template <class A>
  int64_t inner_capacity() const { return round_up(tile_rows * stride(), kLanes<A>); }

  // Tiles of about equal size for which `channels` buffers fit in so many kilobytes, at least two where the plane allows,
  // so that one sample keeps several threads busy. The shape alone decides.
  template <class A>
  static Tiling within(int64_t kilobytes, int64_t height, int64_t width, int64_t halo, int64_t channels) {
    const int64_t budget = (kilobytes << 10) / int64_t(sizeof(A)) / channels;
    int64_t across = 1, down = height >= 8 ? 2 : 1;
    while (true) {
      const int64_t rows = (height + down - 1) / down, columns = (width + across - 1) / across;
      if ((rows + 2 * halo) * (columns + 2 * halo) <= budget || (rows <= 4 && columns <= 16)) {
        return {height, width, halo, rows, columns};
      }
      // Long lines waste least: cut across only where a tile is clearly wider than high.
      if (columns > 3 * rows) ++across; else ++down;
    }
  }

  // Tiles for most of a megabyte of second-level cache, for sums over tiles: these have other bits in other tiles.
  template <class A>
  static Tiling choose_by_shape(int64_t height, int64_t width, int64_t halo, int64_t channels) {
    return within<A>(768, height, width, halo, channels);
  }

  // Tiles for pixels that have the same bits in any tile. Larger ones have less halo, which costs more than the next
  // cache where channels are many; smaller ones keep more threads busy. Those of which a thread has the least to do.
  template <class A>
  static Tiling choose(int64_t height, int64_t width, int64_t halo, int64_t channels) {
    const int64_t threads = most_threads();
    Tiling best{};
    int64_t least = 0;
    for (const int64_t kilobytes : {2560, 2048, 1536, 1024, 768}) {
      const Tiling t = within<A>(kilobytes, height, width, halo, channels);
      // In place the tiles of a line follow each other on one thread.
      const int64_t cost = (t.down() + threads - 1) / threads * t.across() * (t.tile_rows + 2 * halo) * t.stride();
      if (kilobytes == 2560 || cost < least) {
        best = t;
        least = cost;
      }
    }
    return best;
  }

  template <class A>
  Tile tile(int64_t index) const {
    const int64_t row = index / across() * tile_rows, column = index % across() * tile_columns;
    Tile t{halo, row, column, tile_rows, tile_columns, height, width, 0, 0, 0};
    if (height - row < t.rows) t.rows = height - row;
    if (width - column < t.columns) t.columns = width - column;
    t.stride = t.columns + 2 * halo;
    t.outer_pixels = round_up((t.rows + 2 * halo) * t.stride, kLanes<A>);
    t.inner_pixels = round_up(t.rows * t.stride - 2 * halo, kLanes<A>);
    return t;
  }
};

// The range of a tile's pixels whose lines lie in the plane (the halo above and below included), rounded outwards to
// whole vectors. Lines outside the plane are zero and need no multiplication: at the edges of a small plane they are a
// good part of a tile.
struct Span { int64_t begin, end; };
template <class A>
inline Span inside_plane(const Tile& t, int64_t halo) {
  const int64_t above = halo > t.row ? halo - t.row : 0, last = t.row + t.rows + halo;
  const int64_t below = last > t.height ? last - t.height : 0;
  return {above * t.stride / kLanes<A> * kLanes<A>, round_up((t.rows + 2 * halo - below) * t.stride, kLanes<A>)};
}

template <class A>
inline void clear_around(Span span, int64_t pixels, int64_t channels, int64_t capacity, A* rows) {
  for (int64_t c = 0; c < channels; ++c) {
    A* const row = rows + c * capacity;
    for (int64_t p = 0; p < span.begin; p += kLanes<A>) store(row + p, Vec<A>{});
    for (int64_t p = span.end; p < pixels; p += kLanes<A>) store(row + p, Vec<A>{});
  }
}

// Prefetches n consecutive elements. The rows of a tile are too short and too far apart for the hardware prefetcher.
template <class T>
MIRAGE_INLINE void prefetch_row(const T* p, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(p + i, 0, 2);
}
template <class T>
MIRAGE_INLINE void prefetch_row_to_write(T* p, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(p + i, 1, 2);
}

// Copies of a tile's halo of one pixel, for planes that are overwritten while their tiles are read: its first line and
// its last, [channels, width], and the column to the left, [channels, rows] from row `first` on. Null if the plane still
// holds the original.
template <class T>
struct Around {
  const T *above = nullptr, *below = nullptr, *left = nullptr;
  int64_t first = 0, rows = 0;
};

// Loads all channels of a tile with its halo into buffer [channels, capacity].
template <class T>
inline void load_tile(const T* x, const Tensor& t, const Tile& tile, int64_t channels, int64_t capacity, Acc<T>* buffer,
                      const Around<T>& around = {}) {
  using A = Acc<T>;
  const int64_t left = tile.column - tile.halo, right = tile.column + tile.columns + tile.halo;
  const int64_t begin = left > 0 ? left : 0, end = right < tile.width ? right : tile.width;
  const int64_t lines = tile.rows + 2 * tile.halo;
  for (int64_t c = 0; c < channels; ++c) {
    A* out = buffer + c * capacity;
    for (int64_t line = 0; line < lines; ++line, out += tile.stride) {
      const int64_t row = tile.row - tile.halo + line;
      if (row < 0 || row >= tile.height) {
        for (int64_t i = 0; i < tile.stride; ++i) out[i] = A(0);
        continue;
      }
      for (int64_t i = 0; i < begin - left; ++i) out[i] = A(0);
      const T* const aside = line == 0 ? around.above : line == lines - 1 ? around.below : nullptr;
      if (aside) {
        load_row(aside + c * tile.width + begin, 1, end - begin, out + (begin - left));
      } else {
        const T* const from = x + c * t.stride[1] + row * t.stride[2] + begin * t.stride[3];
        if (c + 1 < channels && t.stride[3] == 1) prefetch_row(from + t.stride[1], end - begin);
        load_row(from, t.stride[3], end - begin, out + (begin - left));
        if (around.left && row >= around.first && row < around.first + around.rows) {
          out[0] = A(to_acc(around.left[c * around.rows + row - around.first]));
        }
      }
      for (int64_t i = end - left; i < tile.stride; ++i) out[i] = A(0);
    }
    for (A* stop = buffer + (c + 1) * capacity; out < stop; ++out) *out = A(0);
  }
}

// Clears the halo outside the plane.
template <class A>
inline void clear_outside(A* buffer, int64_t channels, int64_t capacity, const Tile& tile) {
  const int64_t lines = tile.rows + 2 * tile.halo;
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t row = tile.row - tile.halo + line;
    const bool inside = row >= 0 && row < tile.height;
    const int64_t left = inside ? (tile.halo > tile.column ? tile.halo - tile.column : 0) : tile.stride;
    const int64_t over = tile.column + tile.columns + tile.halo - tile.width, right = inside && over > 0 ? over : 0;
    if (left == 0 && right == 0) continue;
    for (int64_t c = 0; c < channels; ++c) {
      A* out = buffer + c * capacity + line * tile.stride;
      for (int64_t i = 0; i < left; ++i) out[i] = A(0);
      for (int64_t i = tile.stride - right; i < tile.stride; ++i) out[i] = A(0);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = lines * tile.stride; i < tile.outer_pixels; ++i) buffer[c * capacity + i] = A(0);
  }
}

// A norm over the channels of a tile, in place; pixels outside the plane become zero again, whatever the bias.
template <class A>
inline void normalise_tile(A* buffer, int64_t channels, int64_t capacity, const Tile& tile, const A* weight,
                           const A* bias, A eps, NormKind kind = NormKind::centred) {
  constexpr int L = kLanes<A>, K = MIRAGE_VECTOR_BYTES == 64 ? 4 : 2;
  const A inverse = A(1) / A(channels);
  for (int64_t p = 0; p < tile.outer_pixels; p += K * L) {
    const int n = int((tile.outer_pixels - p) / L) < K ? int((tile.outer_pixels - p) / L) : K;
    Vec<A> mean[K] = {}, rest[K] = {}, square[K] = {};
    for (int64_t c = 0; c < channels; ++c) {
      for (int k = 0; k < n; ++k) mean[k] += load(buffer + c * capacity + p + k * L);
    }
    for (int k = 0; k < n; ++k) mean[k] *= inverse;
    for (int64_t c = 0; c < channels; ++c) {
      for (int k = 0; k < n; ++k) {
        const Vec<A> d = load(buffer + c * capacity + p + k * L) - mean[k];
        rest[k] += d;
        square[k] += d * d;
      }
    }
    for (int k = 0; k < n; ++k) {
      square[k] = correct_mean<A>(mean[k], rest[k] * inverse, square[k] * inverse);
      if (kind == NormKind::uncentred) mean[k] = Vec<A>{};
      for (int i = 0; i < L; ++i) square[k][i] = A(1) / A(__builtin_sqrt(square[k][i] + eps));
    }
    for (int64_t c = 0; c < channels; ++c) {
      A* row = buffer + c * capacity + p;
      for (int k = 0; k < n; ++k) store(row + k * L, (load(row + k * L) - mean[k]) * square[k] * weight[c] + bias[c]);
    }
  }
  clear_outside(buffer, channels, capacity, tile);
}

}  // namespace mirage::cpu::MIRAGE_ISA
