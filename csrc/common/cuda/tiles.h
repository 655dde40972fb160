// Tiles of an image: what lies around one, how it is stored in shared memory, and 3x3 convolutions on it.
#pragma once

#include "device.h"

namespace mirage::cuda {

constexpr int kTileThreads = 256, kTileWarps = kTileThreads / kLanes;

// A tile of 16 columns with kMargin pixels around it, as kPitch elements a channel: pixel n is in line n / kLine.
template <int kRows, int kMargin>
struct Window {
  static constexpr int kColumns = 16, kLine = kColumns + 2 * kMargin, kPixels = (kRows + 2 * kMargin) * kLine;
  static constexpr int kTiles = (kPixels + 8 * kTileWarps - 1) / (8 * kTileWarps);  // of a warp in a product
  static constexpr int kPadded = 8 * kTileWarps * kTiles, kPitch = kPadded + 8, kGroups = kPadded / kLanes;
  // Between channels of hidden pixels, and like kPitch such that neither the rows of a matrix nor those of a fragment meet
  // in a bank.
  static constexpr int kHiddenPitch = kRows == 8 ? 200 : 136;
  static_assert(kPitch % 16 == 8 && kHiddenPitch % 16 == 8 && (kRows + 2) * 20 <= kHiddenPitch);
};

// Where a tile is. Its pixels are found from its corner: rows and columns have to be near enough to each other for int
// (is_near in call_checks.h).
struct Corner {
  int sample, row, column;
};

MIRAGE_DEVICE int64_t corner_of(const Corner& at, int64_t s_row, int64_t s_column) {
  return at.row * s_row + at.column * s_column;
}

MIRAGE_DEVICE bool is_inside(int height, int width, int row, int column) {
  return unsigned(row) < unsigned(height) && unsigned(column) < unsigned(width);
}

// The pixels of a thread's fragments over a tile, kTiles of each warp and two pixels of each: which lie in the image, and how
// far each is from the tile's corner. Of channels a thread has every eighth from `group` on.
template <int kTiles>
struct FragmentPixels {
  static constexpr int kCount = 2 * kTiles;
  int group, first;
  uint32_t within = 0;

  MIRAGE_DEVICE FragmentPixels(int height, int width, const Corner& at) {
    const int thread = renewed(thread_index());
    group = thread % kLanes / 4, first = 8 * kTiles * (thread / kLanes) + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      within |= uint32_t(is_inside(height, width, at.row + pixel(i) / 16, at.column + pixel(i) % 16)) << i;
    }
  }

  MIRAGE_DEVICE int pixel(int i) const { return first + i / 2 * 8 + i % 2; }
  MIRAGE_DEVICE bool known(int i) const { return within >> i & 1; }
  MIRAGE_DEVICE int offset(int i, int s_row, int s_column) const { return pixel(i) / 16 * s_row + pixel(i) % 16 * s_column; }
};

// Calls use(element of a contiguous map, value) for the values of fragments that lie in the image and below `channels`. `map`
// leads to the tile's corner in channel 0.
template <int kTiles, class T, class Fragments, class Use>
MIRAGE_DEVICE void for_known(const FragmentPixels<kTiles>& pixels, int channels, T* map, int64_t plane, int width,
                             Fragments& acc, Use use) {
  constexpr int MT = sizeof(acc) / sizeof(acc[0]);
  map += pixels.group * plane;
#pragma unroll
  for (int m = 0; m < 2 * MT; ++m, map += 8 * plane) {
    if (8 * m + pixels.group >= channels) continue;
    map = settled(map);
#pragma unroll
    for (int i = 0; i < pixels.kCount; ++i) {
      if (pixels.known(i)) use(map[pixels.offset(i, width, 1)], acc[m / 2][i / 2][m % 2 * 2 + i % 2]);
    }
  }
}

// y = x + acc, y contiguous: `from` and `to` lead to the tile's corner in channel 0 of both.
template <int kTiles, class T, int MT>
MIRAGE_DEVICE void store_sum(const FragmentPixels<kTiles>& pixels, int channels, const T* from, int64_t s_channel, int s_row,
                             int s_column, T* to, int64_t plane, int width, const float (&acc)[MT][kTiles][4]) {
  from += pixels.group * s_channel, to += pixels.group * plane;
#pragma unroll
  for (int m = 0; m < 2 * MT; ++m, from += 8 * s_channel, to += 8 * plane) {
    if (8 * m + pixels.group >= channels) continue;
    from = settled(from), to = settled(to);
#pragma unroll
    for (int i = 0; i < pixels.kCount; ++i) {
      if (!pixels.known(i)) continue;
      const float value = to_float(load_constant(from + pixels.offset(i, s_row, s_column)));
      to[pixels.offset(i, width, 1)] = from_float<T>(value + acc[m / 2][i / 2][m % 2 * 2 + i % 2]);
    }
  }
}

// Hidden channels, which are convolved 3x3, are float and have their lines 20 apart, so that a run of four pixels begins at
// a multiple of four.
constexpr int kHiddenLine = 20;

template <class Window>
MIRAGE_DEVICE int hidden_place(int pixel) {
  return pixel / Window::kLine * kHiddenLine + pixel % Window::kLine;
}

// Those of a channel, which begin at a multiple of four elements.
MIRAGE_DEVICE void read_taps(const float* from, float (&taps)[9]) {
  load_packed<4>(from, taps);
  load_packed<4>(from + 4, taps + 4);
  taps[8] = from[8];
}

// Depthwise 3x3 of one channel for a run of pixels: `line` is where the run's window begins, in a hidden tile.
template <int kRun>
MIRAGE_DEVICE void convolve_run(const float* line, const float (&taps)[9], float (&sum)[kRun]) {
#pragma unroll
  for (int i = 0; i < 3; ++i, line += kHiddenLine) {
    float value[kRun + 4];
#pragma unroll
    for (int j = 0; j < kRun; j += 4) load_packed<4>(line + j, value + j);
    load_packed<2>(line + kRun, value + kRun);
#pragma unroll
    for (int j = 0; j < 3; ++j) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) sum[k] = fmaf(taps[3 * i + j], value[j + k], sum[k]);
    }
  }
}

}  // namespace mirage::cuda
