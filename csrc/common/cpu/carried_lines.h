// Rows that a depthwise 3x3 convolution reads, a tile at a time down a strip of the plane. A tile needs a line of them above
// and one below its own; the last two are kept, so that the tile below has its first two. Each is computed once, but where a
// thread begins: at most two lines a strip and thread.
#pragma once

#include "gemm.h"
#include "inner_tile.h"

namespace mirage::cpu::MIRAGE_ISA {

// Tiles that follow each other down a strip, then down the strip to its right. Their halo is one pixel.
struct StripTiling : Tiling {
  template <class A>
  Tile tile(int64_t index) const { return Tiling::tile<A>(index % down() * across() + index / down()); }

  // Whether the thread's last unit was the tile above; units are the tiles of one sample after the other.
  bool follows(WorkUnit unit) const { return unit.follows && unit % down() != 0; }

  static constexpr int64_t kThreadsOfSums = 8;  // whose tiles are taken where sums must not depend on the number of threads

  // Tiles for `threads` threads. Per pixel they hold `outer` channels with the halo, and `inner` without. Lines are as long
  // as cache allows, since columns beside a strip are computed twice.
  template <class A>
  static StripTiling choose(int64_t height, int64_t width, int64_t outer, int64_t inner, int64_t threads) {
    constexpr int64_t kFewestRows = 8, kMostRows = 64, kNarrowest = 4 * kLanes<A>;
    const int64_t budget = (int64_t(2048) << 10) / int64_t(sizeof(A));
    const auto fitting = [&](int64_t columns) { return (budget / (outer * (columns + 2) + inner * columns)) - 2; };
    int64_t columns = width;
    for (int64_t across = 2; fitting(columns) < kFewestRows; ++across) {
      const int64_t narrower = round_up((width + across - 1) / across, kLanes<A>);
      if (narrower < kNarrowest) break;
      columns = narrower;
    }
    const int64_t most = smaller(smaller(fitting(columns), kMostRows), height);
    StripTiling best{{height, width, 1, smaller(height, 4), columns}};
    for (int64_t rows = 5; rows <= most; ++rows) {
      const StripTiling t{{height, width, 1, rows, columns}};
      if (t.lines_of_a_thread(threads) < best.lines_of_a_thread(threads)) best = t;
    }
    return best;
  }

 private:
  // Lines that the busiest of so many threads computes. A tile costs about half a line of its own, and a little where its lines
  // cannot all be gated four at a time.
  double lines_of_a_thread(int64_t threads) const {
    const int64_t tiles = (count() + threads - 1) / threads, begun = (tiles + down() - 1) / down();
    return double(tiles * tile_rows + 2 * begun) + (tile_rows % 4 ? 0.75 : 0.5) * double(tiles);
  }
};

// Where products over the pixels of lines are stored: as these lie, or `aside`, of lines without columns beside them between
// columns of zeros.
struct Placement {
  uint64_t magic;  // p / columns = p * magic / 2^32 for as many pixels as a tile can have
  bool aside;

  // Stores vectors of a product from pixel p on.
  template <class A, int V>
  MIRAGE_INLINE void operator()(A* row, int64_t p, const Vec<A> (&v)[V]) const {
    if (!aside) return store_each(row + p, v);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store(row + of(p + j * kLanes<A>), v[j]);
  }

 private:
  MIRAGE_INLINE int64_t of(int64_t p) const { return p + int64_t(uint64_t(p) * magic >> 32) * 2 + 1; }
};

// Lines of a tile, for products over channels: with the columns beside it, or without where these lie outside the plane and
// vectors do not run from one line into the next. Products then are stored between columns of zeros.
class Lines {
 public:
  // Lines [row - 1, row + rows + 1), or without the first two, which the tile above has left.
  template <class A>
  static Lines around(const Tile& tile, bool follows) {
    return of<A>(tile, tile.row + (follows ? 1 : -1), tile.rows + (follows ? 0 : 2));
  }
  // The tile's own, without a halo.
  static Lines all(const Tile& tile) { return {tile, tile.row, tile.rows, {0, false}}; }

  const Tile tile;  // with its halo, if it has one, of so many lines
  const int64_t row, count;

  // out [rows, outer] = f(matrix * in), zero outside the plane, in lines with a halo, `stride` apart. f(m, vectors) changes the
  // vectors of row m.
  template <class P, class A, class F>
  MIRAGE_INLINE void product(const Matrix<P>& matrix, int64_t rows, int64_t channels, const P* in, int64_t outer,
                             int64_t stride, A* out, F f) const {
    const Span span = inside_plane<A>(tile, tile.halo);
    // Taken by value, which stores cannot change: it is not read again for each row.
    mix(matrix, rows, channels, in + span.begin, outer, span.end - span.begin,
        by_row([=, place = placement_](int64_t m, int64_t p, auto& v) {
          f(m, v);
          place(out + m * outer, span.begin + p, v);
        }));
    clear(out, rows, outer, stride);
  }

 private:
  template <class A>
  void clear(A* rows, int64_t channels, int64_t capacity, int64_t stride) const {
    if (!placement_.aside) return clear_outside(rows, channels, capacity, tile);
    for (int64_t c = 0; c < channels; ++c) {
      A* line = rows + c * capacity;
      for (int64_t i = 0; i < count; ++i, line += stride) {
        if (row + i < 0 || row + i >= tile.height) {
          for (int64_t p = 0; p < stride; ++p) line[p] = A(0);
        } else {
          line[0] = line[stride - 1] = A(0);
        }
      }
    }
  }

  template <class A>
  static Lines of(Tile tile, int64_t row, int64_t count) {
    const bool dense = tile.columns == tile.width && tile.columns % kLanes<A> == 0;
    // In a tile of its own `row` is that behind the halo, and `rows` do not count it.
    tile.halo = dense ? 0 : 1;
    tile.row = row + tile.halo;
    tile.rows = count - 2 * tile.halo;
    tile.stride = tile.columns + 2 * tile.halo;
    tile.outer_pixels = whole_vectors<A>(count * tile.stride);
    return {tile, row, count, {dense ? uint64_t((int64_t(1) << 32) / tile.columns + 1) : 0, dense}};
  }
  Lines(const Tile& tile, int64_t row, int64_t count, Placement placement)
      : tile(tile), row(row), count(count), placement_(placement) {}

  const Placement placement_;  // aside: without a halo
};

// The last two lines of each row [rows, capacity], kept from tile to tile.
template <class A>
struct CarriedLines {
  A* lines;
  int64_t capacity;

  static int64_t capacity_of(const Tiling& t) { return whole_vectors<A>(2 * t.stride()); }

  CarriedLines from(int64_t row) const { return {lines + row * capacity, capacity}; }

  // out [rows, outer]: a tile's lines. If it follows the one above its first two are what that has left; compute(to) writes the
  // others. The last two are kept for the tile below.
  template <class F>
  MIRAGE_INLINE void fill(int64_t rows, const Tile& tile, int64_t outer, bool follows, A* out, F compute) const {
    for (int64_t j = 0; follows && j < rows; ++j) copy(lines + j * capacity, tile, out + j * outer);
    compute(out + (follows ? 2 * tile.stride : 0));
    for (int64_t j = 0; j < rows; ++j) copy(out + j * outer + tile.rows * tile.stride, tile, lines + j * capacity);
  }

 private:
  static void copy(const A* from, const Tile& tile, A* to) {
    __builtin_memcpy(to, from, size_t(2 * tile.stride) * sizeof(A));
  }
};

}  // namespace mirage::cpu::MIRAGE_ISA
