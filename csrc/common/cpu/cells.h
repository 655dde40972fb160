// The cells of a grid over a feature map, each cut into tiles of its own: units of work of passes whose results, or whose
// small matrices, differ from cell to cell. The whole map is a grid of one cell.
#pragma once

#include "inner_tile.h"
#include "mirage/region.h"

namespace mirage::cpu::MIRAGE_ISA {

class Cells {
 public:
  // `choose(height, width)`: the tiling of a cell of that size.
  template <class Choose>
  Cells(const Cuts& rows, const Cuts& columns, int64_t height, int64_t width, Choose choose)
      : count_(rows.count * columns.count), height_(height), width_(width), cells_(count_ + 1) {
    int64_t first = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      for (int64_t j = 0; j < columns.count; ++j) {
        Cell& cell = cells_[i * columns.count + j];
        const int64_t down = rows.at[i + 1] - rows.at[i], across = columns.at[j + 1] - columns.at[j];
        cell = {known(i, j, columns.count, down, across), rows.at[i], columns.at[j], first};
        if (cell.tiling.height == 0) cell.tiling = choose(down, across);
        first += cell.tiling.count();
      }
    }
    cells_[count_].first = first;
  }

  int64_t count() const { return count_; }
  int64_t units() const { return cells_[count_].first; }
  int64_t first_unit(int64_t cell) const { return cells_[cell].first; }
  int64_t pixels(int64_t cell) const { return cells_[cell].tiling.height * cells_[cell].tiling.width; }

  int64_t cell_of(int64_t unit) const {
    int64_t low = 0, high = count_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (cells_[middle].first <= unit) low = middle; else high = middle;
    }
    return low;
  }

  // The tile of a unit, in the map.
  template <class A>
  Tile tile(int64_t unit) const {
    const Cell& cell = cells_[cell_of(unit)];
    Tile t = cell.tiling.template tile<A>(unit - cell.first);
    t.row += cell.row;
    t.column += cell.column;
    t.height = height_;
    t.width = width_;
    return t;
  }

  // Elements per channel of buffers for any of the tiles.
  template <class A>
  int64_t outer_capacity() const { return most([](const Tiling& t) { return t.outer_capacity<A>(); }); }
  template <class A>
  int64_t inner_capacity() const { return most([](const Tiling& t) { return dense_capacity<A>(t); }); }

 private:
  struct Cell {
    Tiling tiling;
    int64_t row, column, first;  // its first pixel in the map, and its first unit
  };

  // The tiling of a cell of this size to the left or above: to choose one takes longer than to look.
  Tiling known(int64_t i, int64_t j, int64_t across, int64_t height, int64_t width) const {
    for (int64_t k = 1; k <= j && k <= 4; ++k) {
      const Tiling& t = cells_[i * across + j - k].tiling;
      if (t.height == height && t.width == width) return t;
    }
    for (int64_t k = 1; k <= i && k <= 4; ++k) {
      const Tiling& t = cells_[(i - k) * across + j].tiling;
      if (t.height == height && t.width == width) return t;
    }
    return {};
  }

  template <class F>
  int64_t most(F f) const {
    int64_t found = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t here = f(cells_[i].tiling);
      if (here > found) found = here;
    }
    return found;
  }

  const int64_t count_, height_, width_;
  Buffer<Cell> cells_;
};

}  // namespace mirage::cpu::MIRAGE_ISA
