// What the kernel of feed_forward_stage's backward (backward.h) has in shared memory, and how it gets
// there.
#pragma once

#include "forward.h"

namespace mirage::cuda {

struct FeedForwardBackwardArguments : FeedForwardArguments {
  const void* grad_y;
  int64_t g_batch, g_channel, g_row, g_column;
  int tiles, ranges;  // of tiles: a block has one, and the pairs of one of the splits
  float* sums;        // [ranges, chunks, kFeedForwardSums<kBlocks>]
  void* grad_x;
  float *grad_norm_weight, *grad_norm_bias, *grad_project_in, *grad_dwconv, *grad_project_out;
  int blocks;         // channels in sixteens, as the kernel has them
  int groups;         // blocks of the kernel that goes back through the layer norm
  float* norm_sums;   // [groups, 2, C]
};

// Of a chunk of pairs: fragments of gproject_in and gproject_out, 18 sums of gdwconv for each pair.
template <int kBlocks>
constexpr int kFeedForwardSums = 6 * kBlocks * 128 + 16 * 18;

// A tile of kRows lines of 16 with kMargin pixels around it. Those of the tile come first, line by line, and then what
// is around them: so products may take them alone.
template <int kRows, int kMargin>
struct RingWindow {
  static constexpr int kInner = 16 * kRows, kWide = 16 + 2 * kMargin, kPixels = (kRows + 2 * kMargin) * kWide;
  static constexpr int kWarps = 2 * kRows, kTiles = (kPixels + 8 * kWarps - 1) / (8 * kWarps);
  static constexpr int kPadded = 8 * kWarps * kTiles, kPitch = kPadded + 8;
  static constexpr int kPlaces = (kRows + 2 * kMargin) * kHiddenLine;  // of a hidden channel
  static_assert(kPitch % 16 == 8 && kWide <= kHiddenLine);

  // Of pixel n in the tile. Above and below it are whole lines, beside it kMargin pixels on either side.
  MIRAGE_DEVICE static void locate(int n, int& row, int& column) {
    constexpr int kEnd = kMargin * kWide;
    if (n < kInner) {
      row = n / 16, column = n % 16;
      return;
    }
    n -= kInner;
    if (n < 2 * kEnd) {
      row = n / kWide, column = n % kWide - kMargin;
      row += row < kMargin ? -kMargin : kRows - kMargin;
      return;
    }
    n -= 2 * kEnd;
    row = n / (2 * kMargin), column = n % (2 * kMargin) - kMargin;
    if (column >= 0) column += 16;
  }

  // Where it lies in a hidden channel.
  MIRAGE_DEVICE static int place(int row, int column) { return (row + kMargin) * kHiddenLine + column + kMargin; }
};

template <class Kind, int kBlocks, int kRows_>
struct FeedForwardBackwardTile {
  using T = typename Kind::Element;
  using Outer = RingWindow<kRows_, 2>;
  using Near = RingWindow<kRows_, 1>;
  static constexpr int kRows = kRows_, kChannels = 16 * kBlocks, kPairs = 16, kThreads = 64 * kRows;
  static constexpr int kWarps = kThreads / kLanes, kInner = Outer::kInner, kInnerPitch = kInner + 8;
  // Floats between channels: a place behind each of them takes what belongs to no pixel.
  static constexpr int kActivatedPitch = Outer::kPlaces + 8, kGradPitch = Near::kPlaces;
  // A warp convolves a pair with the line around the tile: kRuns runs of each line, which are 30 in all.
  static constexpr int kRun = kRows == 8 ? 6 : 4, kRuns = kRows == 8 ? 3 : 5;
  // Warps that multiply with project_out: those that have no slopes to compute.
  static constexpr int kFirst = kRows == 8 ? 8 : 0, kNearTiles = Near::kPadded / 8 / (kWarps - kFirst);
  static constexpr int kNearDummy = Near::kWide;  // a place that is no pixel's
  static constexpr bool kOnePanel = kBlocks > 12;  // whose room two matrices share, as there is no other
  static constexpr int kPanel = 2 * kPairs * kChannels;
  static_assert(kRuns * (kRows + 2) == 30 && kRun * kRuns >= Near::kWide && kInner / 8 == kWarps);
  static_assert(kActivatedPitch % 16 == 8 && kGradPitch % 16 == 8 && kInnerPitch % 16 == 8);

  alignas(16) T normal[kChannels * Outer::kPitch];
  alignas(16) T grad_y[kChannels * Near::kPitch];
  alignas(16) T panel_in[kPanel];
  alignas(16) T panel_out[kPairs * kChannels];      // of the transposed matrix, as the next
  alignas(16) T panel_of_back[kOnePanel ? 8 : kPanel];
  alignas(16) float activated[2 * kPairs * kActivatedPitch];  // gelu(h); when d is known, the gradient of h
  alignas(16) float grad[2 * kPairs * kGradPitch];  // of s in its first half, then of d
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

// ---- before the pairs ----------------------------------------------------------------------------------------------

// The pixels of a window as they are; zero outside the image and from `channels` on.
template <class Window, int kChannels, class T>
MIRAGE_DEVICE void load_ring(const FeedForwardArguments& p, const FeedForwardWork& work, const T* from,
                             int64_t s_channel, int64_t s_row, int64_t s_column, T* to) {
  const T* corner = from + corner_of(work, s_row, s_column);
  constexpr int kGroups = Window::kPadded / kLanes, kTogether = kGroups % 4 ? kGroups % 3 ? 2 : 3 : 4;
#pragma unroll 1
  for (int first = 0; first < kGroups; first += kTogether) {
    const int n = kLanes * first + renewed(lane_index());
    int offset[kTogether];
    uint32_t within = 0;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      int row, column;
      Window::locate(n + kLanes * j, row, column);
      const bool known = is_inside(p.height, p.width, work.row + row, work.column + column);
      within |= uint32_t(known && n + kLanes * j < Window::kPixels) << j;
      offset[j] = known ? row * int(s_row) + column * int(s_column) : 0;
    }
#pragma unroll 2
    for (int c = warp_index(); c < kChannels; c += Window::kWarps) {
      const uint32_t wanted = c < p.channels ? within : 0;
      const T* channel = settled(corner + c * s_channel);
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

// The layer norm of each pixel, in place.
template <class Packed, class Tile>
MIRAGE_DEVICE void normalise_ring(const FeedForwardArguments& p, const Packed& packed, Tile& tile) {
  using Outer = typename Tile::Outer;
  for (int n = renewed(thread_index()); n < Outer::kPixels; n += Tile::kThreads) {
    normalise_pixel(tile.normal + n, Outer::kPitch, p.channels, p.eps, packed.norm_weight, packed.norm_bias);
  }
}

// Where the results of products go. Of two neighbours of the window around the window four times the place of the
// first, plus 1 or 2 for those that lie in the image; of each pixel of the window the place. What is no
// pixel's has a place of its own.
template <class Tile>
MIRAGE_DEVICE void store_places(const FeedForwardArguments& p, const FeedForwardWork& work, Tile& tile) {
  using Outer = typename Tile::Outer;
  using Near = typename Tile::Near;
  const int thread = renewed(thread_index());
  int row, column;
  for (int i = thread; i < Outer::kPadded / 2; i += Tile::kThreads) {
    Outer::locate(2 * i, row, column);
    const int place = 2 * i < Outer::kPixels ? Outer::place(row, column) : Outer::kPlaces;
    row += work.row, column += work.column;
    const bool known = row >= 0 && row < p.height;
    const int first = known && column >= 0 && column < p.width, second = known && column >= -1 && column < p.width - 1;
    tile.outer_places[i] = uint16_t(4 * place + first + 2 * second);
  }
  for (int i = thread; i < Near::kPadded; i += Tile::kThreads) {
    Near::locate(i, row, column);
    tile.near_places[i] = uint16_t(i < Near::kPixels ? Near::place(row, column) : Tile::kNearDummy);
  }
}

}  // namespace mirage::cuda
