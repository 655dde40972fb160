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

// Where a tile is.
struct Corner {
  int sample, row, column;
};

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
