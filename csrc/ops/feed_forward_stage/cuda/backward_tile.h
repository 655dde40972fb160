// The tile of feed_forward_stage's backward kernel (backward.h): its layout in shared memory, and how it is loaded.
#pragma once

#include "forward.h"

namespace mirage::cuda {

struct FeedForwardBackwardArguments : FeedForwardArguments {
  const void* grad_y;
  int64_t g_batch, g_channel, g_row, g_column;
  int tiles, ranges;  // ranges of tiles; a block has one range, and one split of the pairs
  float* sums;        // [ranges, chunks, kFeedForwardSums<kChannelTiles>]
  void* grad_x;
  float *grad_norm_weight, *grad_norm_bias, *grad_project_in, *grad_dwconv, *grad_project_out;
  int channel_tiles;  // channels in sixteens, as the kernel is instantiated
  int groups;         // thread blocks of the layer norm's backward
  float* norm_sums;   // [groups, 2, C]
};

// Floats per chunk of pairs: the fragments of gproject_in and gproject_out, and 18 sums of gdwconv for each pair.
template <int kChannelTiles>
constexpr int kFeedForwardSums = 6 * kChannelTiles * 128 + 16 * 18;

// A tile of kRows x 16 pixels with a halo of kHalo. The tile's own pixels come first, line by line, and the halo behind
// them, so that matrix products can run over the tile alone.
template <int kRows, int kHalo>
struct RingWindow {
  static constexpr int kInner = 16 * kRows, kLine = 16 + 2 * kHalo, kPixels = (kRows + 2 * kHalo) * kLine;
  static constexpr int kWarps = 2 * kRows, kTiles = (kPixels + 8 * kWarps - 1) / (8 * kWarps);
  static constexpr int kPadded = 8 * kWarps * kTiles, kPitch = kPadded + 8;
  static constexpr int kPlaces = (kRows + 2 * kHalo) * kHiddenLine;  // of a hidden channel
  static_assert(kPitch % 16 == 8 && kLine <= kHiddenLine);

  // The position of pixel n relative to the tile. The halo is whole lines above and below, then kHalo pixels on either
  // side.
  MIRAGE_DEVICE static void locate(int n, int& row, int& column) {
    constexpr int kEnd = kHalo * kLine;
    if (n < kInner) {
      row = n / 16, column = n % 16;
      return;
    }
    n -= kInner;
    if (n < 2 * kEnd) {
      row = n / kLine, column = n % kLine - kHalo;
      row += row < kHalo ? -kHalo : kRows - kHalo;
      return;
    }
    n -= 2 * kEnd;
    row = n / (2 * kHalo), column = n % (2 * kHalo) - kHalo;
    if (column >= 0) column += 16;
  }

  // The index of a pixel in a hidden channel.
  MIRAGE_DEVICE static int place(int row, int column) { return (row + kHalo) * kHiddenLine + column + kHalo; }
};

template <class Kind, int kChannelTiles, int kRows_>
struct FeedForwardBackwardTile {
  using T = typename Kind::Element;
  using Outer = RingWindow<kRows_, 2>;
  using Near = RingWindow<kRows_, 1>;
  static constexpr int kRows = kRows_, kChannels = 16 * kChannelTiles, kPairs = 16, kThreads = 64 * kRows;
  static constexpr int kWarps = kThreads / kLanes, kInner = Outer::kInner, kInnerPitch = kInner + 8;
  // Floats per channel, with room behind the pixels for writes that belong to none.
  static constexpr int kActivatedPitch = Outer::kPlaces + 8, kGradPitch = Near::kPlaces;
  // A warp convolves a pair of channels over the tile and a halo of one: kRuns runs per line, 30 runs in all.
  static constexpr int kRun = kRows == 8 ? 6 : 4, kRuns = kRows == 8 ? 3 : 5;
  // The warps that multiply with project_out are those that have no slopes to compute.
  static constexpr int kFirst = kRows == 8 ? 8 : 0, kNearTiles = Near::kPadded / 8 / (kWarps - kFirst);
  static constexpr int kNearDummy = Near::kLine;  // an index that belongs to no pixel
  static constexpr bool kOnePanel = kChannelTiles > 12;  // two matrices share a buffer, there is no memory for a second
  static constexpr int kPanel = 2 * kPairs * kChannels;
  static_assert(kRuns * (kRows + 2) == 30 && kRun * kRuns >= Near::kLine && kInner / 8 == kWarps);
  static_assert(kActivatedPitch % 16 == 8 && kGradPitch % 16 == 8 && kInnerPitch % 16 == 8);

  alignas(16) T normal[kChannels * Outer::kPitch];
  alignas(16) T grad_y[kChannels * Near::kPitch];
  alignas(16) T panel_in[kPanel];
  alignas(16) T panel_out[kPairs * kChannels];      // of the transposed matrix, like the next one
  alignas(16) T panel_of_back[kOnePanel ? 8 : kPanel];
  alignas(16) float activated[2 * kPairs * kActivatedPitch];  // gelu(h); gh once d is computed
  alignas(16) float grad[2 * kPairs * kGradPitch];  // gs in the first half, then gd
  alignas(16) T slope[2 * kPairs * kInnerPitch];    // gelu'(h)
  alignas(16) T gate[kPairs * kInnerPitch];
  alignas(16) float taps[2 * kPairs * 12];
  uint16_t outer_places[Outer::kPadded / 2];  // see store_places
  alignas(4) uint16_t near_places[Near::kPadded];

  static_assert(sizeof(T) * kInnerPitch <= sizeof(float) * kActivatedPitch);
  MIRAGE_DEVICE T (&panel_back())[kPanel] {
    if constexpr (kOnePanel) return panel_in;
    else return panel_of_back;
  }
  MIRAGE_DEVICE T* grad_hidden() { return reinterpret_cast<T*>(activated); }
};

// ---- loading a tile ------------------------------------------------------------------------------------------------

// Loads the pixels of a window unchanged; zero out of bounds and from `channels` on.
template <class Window, int kChannels, class T>
MIRAGE_DEVICE void load_ring(const FeedForwardArguments& p, const FeedForwardWork& work, const T* from,
                             int64_t s_channel, int64_t s_row, int64_t s_column, T* to) {
  const T* corner = from + corner_of(work, s_row, s_column);
  constexpr int kGroups = Window::kPadded / kLanes, kTogether = kGroups % 4 ? kGroups % 3 ? 2 : 3 : 4;
#pragma unroll 1
  for (int first = 0; first < kGroups; first += kTogether) {
    const int n = kLanes * first + opaque(lane_index());
    int offset[kTogether];
    uint32_t in_bounds_mask = 0;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      int row, column;
      Window::locate(n + kLanes * j, row, column);
      const bool in_bounds = is_in_bounds(p.height, p.width, work.row + row, work.column + column);
      in_bounds_mask |= uint32_t(in_bounds && n + kLanes * j < Window::kPixels) << j;
      offset[j] = in_bounds ? row * int(s_row) + column * int(s_column) : 0;
    }
#pragma unroll 2
    for (int c = warp_index(); c < kChannels; c += Window::kWarps) {
      const uint32_t wanted = c < p.channels ? in_bounds_mask : 0;
      const T* channel = opaque_global(corner + c * s_channel);
      T value[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        value[j] = wanted >> j & 1 ? load_constant(channel + offset[j]) : from_float<T>(0.0f);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) to[c * Window::kPitch + n + kLanes * j] = value[j];
    }
  }
}

// Precomputes where results of the matrix products are stored. outer_places has, for each pair of neighbours of the
// outer window, four times the index of the first one, plus 1 and 2 for those that are in bounds. near_places has the
// index of each pixel of the near window. What is no pixel gets an index that is not read.
template <class Tile>
MIRAGE_DEVICE void store_places(const FeedForwardArguments& p, const FeedForwardWork& work, Tile& tile) {
  using Outer = typename Tile::Outer;
  using Near = typename Tile::Near;
  const int thread = opaque(thread_index());
  int row, column;
  for (int i = thread; i < Outer::kPadded / 2; i += Tile::kThreads) {
    Outer::locate(2 * i, row, column);
    const int place = 2 * i < Outer::kPixels ? Outer::place(row, column) : Outer::kPlaces;
    row += work.row, column += work.column;
    const bool row_in_bounds = row >= 0 && row < p.height;
    const int first = row_in_bounds && column >= 0 && column < p.width,
              second = row_in_bounds && column >= -1 && column < p.width - 1;
    tile.outer_places[i] = uint16_t(4 * place + first + 2 * second);
  }
  for (int i = thread; i < Near::kPadded; i += Tile::kThreads) {
    Near::locate(i, row, column);
    tile.near_places[i] = uint16_t(i < Near::kPixels ? Near::place(row, column) : Tile::kNearDummy);
  }
}

}  // namespace mirage::cuda
