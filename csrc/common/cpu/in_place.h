// Tiles whose results overwrite the planes that they are read from. A tile's halo of one pixel belongs to its
// neighbours, which may be overwritten first, so their border is saved before. Results are the same as out of place.
#pragma once

#include "carried_lines.h"

namespace mirage::cpu::MIRAGE_ISA {

// Lines of a contiguous x on both sides of the cuts between its bands: [samples, cuts, 2, channels, width].
template <class T>
class CutLines {
 public:
  CutLines(const Tensor& x, const Tiling& tiling, int64_t bands)
      : channels_(x.size[1]), width_(x.size[3]), cuts_(bands - 1), room_(x.size[0] * cuts_ * 2 * channels_ * width_) {
    parallel_units<T>(x.size[0] * cuts_ * 2, 1, [&](int64_t unit, T*) {
      const int64_t sample = unit / (cuts_ * 2), cut = unit / 2 % cuts_, side = unit % 2;
      const int64_t row = first_of_band(tiling, bands, cut + 1) * tiling.tile_rows - 1 + side;
      const T* const from = x.as<const T>() + sample * x.stride[0] + row * width_;
      for (int64_t c = 0; c < channels_; ++c) copy(from + c * x.stride[1], width_, line(unit) + c * width_);
    });
  }

  const T* above(int64_t sample, int64_t band) const {
    return band == 0 ? nullptr : line((sample * cuts_ + band - 1) * 2);
  }
  const T* below(int64_t sample, int64_t band) const {
    return band == cuts_ ? nullptr : line((sample * cuts_ + band) * 2 + 1);
  }

  // Bands are runs of lines of tiles.
  static int64_t first_of_band(const Tiling& tiling, int64_t bands, int64_t band) {
    return band * tiling.down() / bands;
  }
  static void copy(const T* from, int64_t n, T* to) { __builtin_memcpy(to, from, size_t(n) * sizeof(T)); }

 private:
  T* line(int64_t index) const { return room_.get() + index * channels_ * width_; }

  const int64_t channels_, width_, cuts_;
  Buffer<T> room_;
};

// Lines of tiles are cut into so many bands, as many for each thread. A cut costs two lines and what is carried on.
inline int64_t bands_in_place(const Tiling& tiling) {
  constexpr int64_t kLinesOfBand = 32, kBandsOfThread = 4;
  const int64_t threads = most_threads(), wanted = smaller(tiling.height / kLinesOfBand / threads, kBandsOfThread);
  return smaller(wanted < 1 ? threads : wanted * threads, tiling.down());
}

// Calls f(sample, tile, follows, around, scratch) for every tile of a contiguous x, down one strip of a band after the other;
// `follows` says whether the tile above was the last one. f may write over the tile's pixels: the last column of each strip is
// set aside before.
template <class T, class F>
void parallel_tiles_in_place(const Tensor& x, const StripTiling& tiling, int64_t scratch_size, F f) {
  const int64_t C = x.size[1], W = x.size[3], across = tiling.across(), bands = bands_in_place(tiling);
  const CutLines<T> cuts(x, tiling, bands);

  parallel_units<Acc<T>>(x.size[0] * bands, scratch_size, [&](int64_t unit, Acc<T>* scratch) {
    const int64_t sample = unit / bands, band = unit % bands;
    const int64_t begin = cuts.first_of_band(tiling, bands, band), end = cuts.first_of_band(tiling, bands, band + 1);
    const int64_t first = begin * tiling.tile_rows, rows = smaller(end * tiling.tile_rows, x.size[2]) - first;
    const Buffer<T> columns(across > 1 ? 2 * C * rows : 0);
    const T* const plane = x.as<const T>() + sample * x.stride[0];
    for (int64_t j = 0; j < across; ++j) {
      T* const last_column = columns.get() + j % 2 * C * rows;
      const T* const left = j == 0 ? nullptr : columns.get() + (j + 1) % 2 * C * rows;
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = tiling.tile<Acc<T>>(j * tiling.down() + i);
        const T* const at = plane + tile.row * W + tile.column + tile.columns - 1;
        for (int64_t c = 0; j + 1 < across && c < C; ++c) {
          T* const to = last_column + c * rows + tile.row - first;
          for (int64_t r = 0; r < tile.rows; ++r) to[r] = at[c * x.stride[1] + r * W];
        }
        const T* const above = i == begin ? cuts.above(sample, band) : nullptr;
        const T* const below = i + 1 == end ? cuts.below(sample, band) : nullptr;
        f(sample, tile, i > begin, Around<T>{above, below, left, first, rows}, scratch);
      }
    }
  });
}

}  // namespace mirage::cpu::MIRAGE_ISA
