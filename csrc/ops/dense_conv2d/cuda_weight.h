// The kernels of dense_conv2d's gradient of the weight: a product over all pixels, for each tap.
//
// A block has a tile of the gradient's rows and columns for all taps, whose sums stay in registers, and a part of the
// pixels, 128 at a time, as rows of channels (pixel_rows.h). A second kernel adds up the parts.
#pragma once

#include "common/cuda/pixel_rows.h"

namespace mirage::cuda {

struct DenseWeightArguments {
  PixelMap x, grad_y;  // of one height and width
  float* partial;      // [parts, outputs, channels, taps]; the gradient itself where there is one part
  Lines tile;          // of 128 pixels: 16 or 32, or 128 where lines of the images follow each other
  Lines window;        // of what lies around a tile
  int64_t tiles;       // of all samples
  int parts;
};

constexpr int kDenseWeightPixels = 128;

// The first output and channel of a block's tile of the gradient, and its part of the pixels.
struct DenseWeightWork {
  int out, in, part;
};

// kWide: for many channels. What has few would be filled up with zeros. Each warp has 32 outputs and 8 kColumns
// channels; where they leave warps over, these have other pixels.
template <class Kind, int K, bool kWide>
struct DenseWeightTile {
  using T = typename Kind::Element;
  static constexpr int kTaps = K * K, kMargin = K / 2;
  static constexpr int kOut = K == 1 || kWide ? 64 : 32, kIn = K == 1 ? 64 : kWide ? 32 : 16;
  static constexpr int kRows = 2, kColumns = K == 1 ? 2 : 1;  // of a warp, in fragments
  static constexpr int kWarpsOut = kOut / (16 * kRows), kWarpsIn = kIn / (8 * kColumns);
  static constexpr int kWarpsPixels = kTileWarps / (kWarpsOut * kWarpsIn);
  // Neither the rows of a matrix nor those of a fragment of floats meet in a bank.
  static constexpr int kOutPitch = kOut + 8, kInPitch = kIn + 8;
  static constexpr int kWindow = K == 1 ? kDenseWeightPixels : 34 * 6;  // 34 x 6, 18 x 10 or 128 pixels
  static constexpr int kSums = kTaps * kRows * kColumns * 4;            // of a thread
  static constexpr int kTogether = K == 1 ? 4 : 2;                      // groups of channels that it has under way

  alignas(16) T x[kWindow * kInPitch];
  alignas(16) T grad_y[kDenseWeightPixels * kOutPitch];
  DenseWeightWork work;  // for those who write the results: until then its registers are the sums'
};

// The same number, of which the compiler knows nothing: what follows from it is computed again in every turn of a loop
// instead of being kept in registers, all of which are the sums'.
MIRAGE_DEVICE int forgotten(int number) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// kPixels pixels in lines of `line`, and channels first ... first + kChannels, zero where there is none.
template <class Kind, int kPixels, int kChannels, int kPitch, int kTogether>
MIRAGE_DEVICE void load_rows_of(const PixelMap& map, const Corner& at, const Lines& lines, int first,
                                typename Kind::Element* rows) {
  using T = typename Kind::Element;
  constexpr int kGroup = kChannelGroup<T>, kGroups = kChannels / kGroup;
  constexpr int kUnits = (kPixels + kLanes - 1) / kLanes * kGroups, kTurns = (kUnits + kTileWarps - 1) / kTileWarps;
  const int warp = forgotten(warp_index());
#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn += kTogether) {
    T value[kTogether][kGroup];
    int n[kTogether], group[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int unit = (turn + j) * kTileWarps + warp;
      n[j] = unit / kGroups * kLanes + lane_index(), group[j] = unit % kGroups * kGroup;
      const T* pixel = n[j] < kPixels ? pixel_of<T>(map, at, lines, n[j]) : nullptr;
      load_group(map, pixel, first + group[j], map.channels, value[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (n[j] < kPixels) store_group<Kind>(rows + n[j] * kPitch + group[j], value[j]);
    }
  }
}

// acc += the products of one tile of pixels.
template <class Kind, class Tile>
MIRAGE_DEVICE void multiply_tile(const DenseWeightArguments& p, const Corner& at, const Tile& tile,
                                 float (&acc)[Tile::kTaps][Tile::kRows][Tile::kColumns][4]) {
  const int warp = warp_index();
  const int out = warp % Tile::kWarpsOut * 16 * Tile::kRows;
  const int in = warp / Tile::kWarpsOut % Tile::kWarpsIn * 8 * Tile::kColumns;
  const int of_pixels = warp / (Tile::kWarpsOut * Tile::kWarpsIn);
#pragma unroll 1
  for (int n = 16 * of_pixels; n < kDenseWeightPixels; n += 16 * Tile::kWarpsPixels) {
    const int row = p.tile.row(n), column = p.tile.column(n), count = p.x.width - at.column - column;
    if (at.row + row >= p.x.height || count <= 0) continue;
    multiply_over_pixels(Kind(), tile.grad_y + n * Tile::kOutPitch + out, Tile::kOutPitch,
                         tile.x + (row * p.window.length + column) * Tile::kInPitch + in, Tile::kInPitch,
                         p.window.length, count, acc);
  }
}

// The sums of the warps that have other pixels, to the first of them.
template <class Tile>
MIRAGE_DEVICE void add_over_warps(Tile& tile, float (&acc)[Tile::kTaps][Tile::kRows][Tile::kColumns][4]) {
  constexpr int kGroup = kTileWarps / Tile::kWarpsPixels;
  static_assert(Tile::kWarpsPixels == 1 ||
                kGroup * Tile::kSums * kLanes * sizeof(float) <= sizeof(tile.x) + sizeof(tile.grad_y));
  float* sums = reinterpret_cast<float*>(&tile) + warp_index() % kGroup * Tile::kSums * kLanes + lane_index();
  for (int turn = 1; turn < Tile::kWarpsPixels; ++turn) {
    sync_block();
    float(&mine)[Tile::kSums] = reinterpret_cast<float(&)[Tile::kSums]>(acc);
    if (warp_index() / kGroup == turn) {
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) sums[i * kLanes] = mine[i];
    }
    sync_block();
    if (warp_index() < kGroup) {
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) mine[i] += sums[i * kLanes];
    }
  }
}

template <class Tile>
MIRAGE_DEVICE void store_sums(const DenseWeightArguments& p, const Tile& tile,
                              const float (&acc)[Tile::kTaps][Tile::kRows][Tile::kColumns][4]) {
  const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
  if (warp >= Tile::kWarpsOut * Tile::kWarpsIn) return;
  const int first_out = tile.work.out + warp % Tile::kWarpsOut * 16 * Tile::kRows;
  const int first_in = tile.work.in + warp / Tile::kWarpsOut * 8 * Tile::kColumns;
  float* to = p.partial + tile.work.part * (int64_t(p.grad_y.channels) * p.x.channels * Tile::kTaps);
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int out = first_out + 16 * m + i / 2 * 8 + g, in = first_in + 8 * n + 2 * t + i % 2;
        if (out >= p.grad_y.channels || in >= p.x.channels) continue;
#pragma unroll
        for (int tap = 0; tap < Tile::kTaps; ++tap) {
          to[(int64_t(out) * p.x.channels + in) * Tile::kTaps + tap] = acc[tap][m][n][i];
        }
      }
    }
  }
}

// The sums of exact products are added up tile by tile: in one sum over all pixels the roundings would grow with their
// number.
template <class Kind, int K, bool kWide>
MIRAGE_KERNEL(256, std::is_same_v<Kind, ExactFloat> ? 1 : 2) dense_weight_kernel(const DenseWeightArguments p) {
  using Tile = DenseWeightTile<Kind, K, kWide>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int columns = p.tile.length, rows = kDenseWeightPixels / columns;
  const int across = (p.x.width + columns - 1) / columns, down = (p.x.height + rows - 1) / rows;
  const int tiles_in = (p.x.channels + Tile::kIn - 1) / Tile::kIn;
  const int tiles_out = (p.grad_y.channels + Tile::kOut - 1) / Tile::kOut;
  // Neighbours read the same pixels.
  const int item = int(block_index() % (tiles_in * tiles_out)), part = int(block_index() / (tiles_in * tiles_out));
  const int out = item / tiles_in * Tile::kOut, in = item % tiles_in * Tile::kIn;
  if (thread_index() == 0) tile.work = {out, in, part};
  float acc[Tile::kTaps][Tile::kRows][Tile::kColumns][4] = {};
  const int64_t first = p.tiles * part / p.parts;
  Corner at{int(first / across / down), int(first / across % down) * rows, int(first % across) * columns};
  for (int left = int(p.tiles * (part + 1) / p.parts - first); left > 0; --left) {
    const Corner window{at.sample, at.row - Tile::kMargin, at.column - Tile::kMargin};
    sync_block();  // the tile before has been read
    load_rows_of<Kind, Tile::kWindow, Tile::kIn, Tile::kInPitch, Tile::kTogether>(p.x, window, p.window, in, tile.x);
    load_rows_of<Kind, kDenseWeightPixels, Tile::kOut, Tile::kOutPitch, Tile::kTogether>(
        p.grad_y, at, p.tile, out, tile.grad_y);
    sync_block();
    if constexpr (std::is_same_v<Kind, ExactFloat>) {
      float of_tile[Tile::kTaps][Tile::kRows][Tile::kColumns][4] = {};
      multiply_tile<Kind>(p, at, tile, of_tile);
#pragma unroll
      for (int j = 0; j < Tile::kSums; ++j) (&acc[0][0][0][0])[j] += (&of_tile[0][0][0][0])[j];
    } else {
      multiply_tile<Kind>(p, at, tile, acc);
    }
    at.column += columns;
    if (at.column >= p.x.width) at.column = 0, at.row += rows;
    if (at.row >= p.x.height) at.row = 0, ++at.sample;
  }
  add_over_warps(tile, acc);
  store_sums(p, tile, acc);
}

// The sums of all parts; zero where there is none. A block has 32 elements, and each of its warps every eighth part of
// them, which are then added up over the warps.
template <int kThreads>
MIRAGE_KERNEL(kThreads)
dense_weight_sum_kernel(const float* partial, const int parts, const int64_t size, float* grad_weight) {
  constexpr int kWarps = kThreads / kLanes;
  float* of_warps = reinterpret_cast<float*>(shared_memory());  // [warps, lanes]
  const int64_t i = block_index() * kLanes + lane_index();
  float sum = 0.0f;
  if (i < size) {
    for (int part = warp_index(); part < parts; part += kWarps) sum += partial[part * size + i];
  }
  of_warps[thread_index()] = sum;
  sync_block();
  if (warp_index() != 0 || i >= size) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += of_warps[warp * kLanes + lane_index()];
  grad_weight[i] = sum;
}

}  // namespace mirage::cuda
