// Tiles of an image: their halo, their layout in shared memory, and 3x3 depthwise convolutions on them.
#pragma once

#include "device.h"

namespace mirage::cuda {

constexpr int kTileThreads = 256, kTileWarps = kTileThreads / kLanes;

// The window of a tile: kRows x 16 pixels and a halo of kHalo pixels. A channel has kPitch elements, and pixel n lies
// in line n / kLine of the window.
template <int kRows, int kHalo>
struct Window {
  static constexpr int kColumns = 16, kLine = kColumns + 2 * kHalo, kPixels = (kRows + 2 * kHalo) * kLine;
  static constexpr int kTiles = (kPixels + 8 * kTileWarps - 1) / (8 * kTileWarps);  // MMA tiles of 8 pixels per warp
  static constexpr int kPadded = 8 * kTileWarps * kTiles, kPitch = kPadded + 8, kGroups = kPadded / kLanes;
  // Elements between channels of hidden pixels. Like kPitch it is chosen so that neither the rows of a matrix nor those
  // of a fragment have bank conflicts.
  static constexpr int kHiddenPitch = kRows == 8 ? 200 : 136;
  static_assert(kPitch % 16 == 8 && kHiddenPitch % 16 == 8 && (kRows + 2) * 20 <= kHiddenPitch);
};

// The top left pixel of a tile. Offsets from it are computed in int, so rows and columns have to be close enough
// (is_near in call_checks.h).
struct Corner {
  int sample, row, column;
};

MIRAGE_DEVICE int64_t corner_of(const Corner& at, int64_t s_row, int64_t s_column) {
  return at.row * s_row + at.column * s_column;
}

MIRAGE_DEVICE bool is_in_bounds(int height, int width, int row, int column) {
  return unsigned(row) < unsigned(height) && unsigned(column) < unsigned(width);
}

// The pixels of a thread's accumulator fragments over a tile, kTiles fragments per warp with two pixels per thread:
// their offsets from the tile's corner, and which of them are in bounds. The thread has every eighth channel from
// `group` on.
template <int kTiles>
struct FragmentPixels {
  static constexpr int kCount = 2 * kTiles;
  int group, first;
  uint32_t in_bounds_mask = 0;

  MIRAGE_DEVICE FragmentPixels(int height, int width, const Corner& at) {
    const int thread = opaque(thread_index());
    group = thread % kLanes / 4, first = 8 * kTiles * (thread / kLanes) + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      in_bounds_mask |= uint32_t(is_in_bounds(height, width, at.row + pixel(i) / 16, at.column + pixel(i) % 16)) << i;
    }
  }

  MIRAGE_DEVICE int pixel(int i) const { return first + i / 2 * 8 + i % 2; }
  MIRAGE_DEVICE bool in_bounds(int i) const { return in_bounds_mask >> i & 1; }
  MIRAGE_DEVICE int offset(int i, int s_row, int s_column) const {
    return pixel(i) / 16 * s_row + pixel(i) % 16 * s_column;
  }
};

// Calls use(element of a contiguous tensor, value) for the accumulators whose pixel is in bounds and whose channel is
// below `channels`. `map` points to the tile's corner in channel 0.
template <int kTiles, class T, class Fragments, class Use>
MIRAGE_DEVICE void for_in_bounds(const FragmentPixels<kTiles>& pixels, int channels, T* map, int64_t plane, int width,
                                 Fragments& acc, Use use) {
  constexpr int MT = sizeof(acc) / sizeof(acc[0]);
  map += pixels.group * plane;
#pragma unroll
  for (int m = 0; m < 2 * MT; ++m, map += 8 * plane) {
    if (8 * m + pixels.group >= channels) continue;
    map = opaque_global(map);
#pragma unroll
    for (int i = 0; i < pixels.kCount; ++i) {
      if (pixels.in_bounds(i)) use(map[pixels.offset(i, width, 1)], acc[m / 2][i / 2][m % 2 * 2 + i % 2]);
    }
  }
}

// Epilogue with the residual: y = x + acc. `from` and `to` point to the tile's corner in channel 0 of x and of y, which
// is contiguous.
template <int kTiles, class T, int MT>
MIRAGE_DEVICE void store_sum(const FragmentPixels<kTiles>& pixels, int channels, const T* from, int64_t s_channel,
                             int s_row, int s_column, T* to, int64_t plane, int width,
                             const float (&acc)[MT][kTiles][4]) {
  from += pixels.group * s_channel, to += pixels.group * plane;
#pragma unroll
  for (int m = 0; m < 2 * MT; ++m, from += 8 * s_channel, to += 8 * plane) {
    if (8 * m + pixels.group >= channels) continue;
    from = opaque_global(from), to = opaque_global(to);
#pragma unroll
    for (int i = 0; i < pixels.kCount; ++i) {
      if (!pixels.in_bounds(i)) continue;
      const float value = to_float(load_constant(from + pixels.offset(i, s_row, s_column)));
      to[pixels.offset(i, width, 1)] = from_float<T>(value + acc[m / 2][i / 2][m % 2 * 2 + i % 2]);
    }
  }
}

// Hidden channels, the input of the 3x3 convolution, are float with 20 elements per line, so that runs of four pixels
// are aligned.
constexpr int kHiddenLine = 20;

template <class Window>
MIRAGE_DEVICE int hidden_place(int pixel) {
  return pixel / Window::kLine * kHiddenLine + pixel % Window::kLine;
}

// Loads the nine taps of a channel, whose rows are padded to twelve floats.
MIRAGE_DEVICE void read_taps(const float* from, float (&taps)[9]) {
  load_packed<4>(from, taps);
  load_packed<4>(from + 4, taps + 4);
  taps[8] = from[8];
}

// Depthwise 3x3 convolution of one channel for a run of pixels. `line` points to the top left of the run's window in a
// tile of hidden channels.
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
