// Prefetching while products run, which leave the memory idle. The rows of a tile are too short and too far apart for the
// hardware to see what comes next.
#pragma once

#include "tiles.h"

namespace mirage::cpu::MIRAGE_ISA {

// The cache lines of a tile in all channels of a map, from the first to the last.
class TileLines {
 public:
  TileLines() = default;

  // Of the map's sample `sample`, with `halo` lines above and below the tile.
  template <class T>
  static TileLines of(const Tensor& map, int64_t sample, const Tile& tile, int64_t halo = 0) {
    TileLines l;
    const int64_t first = tile.row > halo ? tile.row - halo : 0, below = tile.row + tile.rows + halo;
    const int64_t rows = (below < tile.height ? below : tile.height) - first;
    if (map.stride[3] != 1 || rows <= 0) return l;
    const bool whole = tile.columns == tile.width && map.stride[2] == tile.width;  // lines follow each other
    l.plane_ = reinterpret_cast<const char*>(map.as<const T>() + sample * map.stride[0] + first * map.stride[2] + tile.column);
    l.planes_left_ = map.size[1];
    l.rows_ = whole ? 1 : rows;
    l.row_bytes_ = (whole ? rows * tile.width : tile.columns) * int64_t(sizeof(T));
    l.row_stride_ = map.stride[2] * int64_t(sizeof(T));
    l.plane_stride_ = map.stride[1] * int64_t(sizeof(T));
    l.begin_row(0);
    return l;
  }

  // What the unit after this one reads, if there is one. Units are the tiles of all samples, one after the other.
  template <class T, class F>
  static TileLines after(int64_t unit, const Tensor& map, int64_t tiles, int64_t halo, const F& tile_of) {
    const int64_t next = unit + 1;
    return next < map.size[0] * tiles ? of<T>(map, next / tiles, tile_of(next % tiles), halo) : TileLines();
  }

  // Prefetches the next n lines, as far as there are any.
  MIRAGE_INLINE void prefetch(int n) {
    for (; n > 0 && at_ < end_; --n) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (at_ >= end_) begin_next();
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  void begin_next() {
    if (row_ + 1 < rows_) return begin_row(row_ + 1);
    if (--planes_left_ == 0) return;
    plane_ += plane_stride_;
    begin_row(0);
  }
  void begin_row(int64_t row) {
    row_ = row;
    at_ = plane_ + row * row_stride_;
    end_ = at_ + row_bytes_;
  }

  const char *plane_ = nullptr, *at_ = nullptr, *end_ = nullptr;  // at_ to end_: what is left of a row
  int64_t planes_left_ = 0, rows_ = 0, row_ = 0, row_bytes_ = 0, row_stride_ = 0, plane_stride_ = 0;
};

// What a thread reads next and what it is about to write.
struct Ahead {
  TileLines read, written;

  // To be called for each row of N vectors of a product, of which a tile has `rows` for every channel that is prefetched.
  template <class A, int N>
  MIRAGE_INLINE void step(int rows) {
    constexpr int kLines = N * int(sizeof(Vec<A>)) / 64;
    const int lines = (kLines + rows - 1) / rows;
    read.prefetch(lines);
    written.prefetch(lines);
  }
};

}  // namespace mirage::cpu::MIRAGE_ISA
