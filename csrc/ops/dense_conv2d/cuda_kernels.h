// The kernels of dense_conv2d: a product over channels and taps, which is never laid out as a matrix.
//
// A block has 256 pixels of one sample and up to 64 outputs, whose sums stay in registers, and takes a chunk of channels
// at a time: the pixels with the line around them as rows of channels (pixel_rows.h), and the weights of all taps as
// panels. While it multiplies one chunk the next is on its way: pixels through registers, because they change their
// order, panels by asynchronous copies, because a kernel before this one has put all weights into the panels' order.
// Where there are few pixels several blocks share the channels of a tile, and a third kernel adds up their sums.
#pragma once

#include "common/cuda/copies.h"
#include "common/cuda/pixel_rows.h"

namespace mirage::cuda {

struct DenseConvArguments {
  PixelMap x;
  const void* weight;  // [outputs, channels, taps], or [channels, outputs, taps] where it is turned
  bool wide;           // the weight is float, whatever x is
  bool turned;         // each kernel by both of its axes: what takes gradients back
  void* panels;        // [tiles of outputs, chunks, taps], each a panel
  void* y;             // [B, outputs, H, W]
  float* partial;      // [splits, B, outputs, H, W], where splits is more than 1
  int outputs;
  bool pairs;          // pixels 2i and 2i + 1 of an output lie in one word
  Lines tile;          // of 256 pixels: 16 or 32, or 256 where lines of the image follow each other
  Lines window;        // of what lies around a tile
  int chunks, splits;
};

constexpr int kDensePixels = 256;

// A tile of pixels, one of outputs, and the chunks of channels that a block is to do.
struct DenseConvWork {
  Corner at;
  int tile, split, first_chunk, last_chunk;
};

// kOut: outputs of a block.
template <class Kind, int K, int kOut_>
struct DenseConvTile {
  using T = typename Kind::Element;
  static constexpr int kTaps = K * K, kMargin = K / 2, kOut = kOut_;
  // 32 bytes of channels at a time, or 64 where there is one tap only. A group more between pixels makes their distance
  // an odd number of 16 bytes: eight neighbours are in eight different groups of banks.
  static constexpr int kGroups = K == 1 ? 4 : 2, kDepth = kGroups * kChannelGroup<T>;
  static constexpr int kPitch = kDepth + kChannelGroup<T>;
  static constexpr int kWindow = K == 1 ? kDensePixels : 34 * 10;  // 34 x 10, 18 x 18 or 256 pixels
  static constexpr int kTurns = (kGroups * kWindow + kTileThreads - 1) / kTileThreads;
  // A panel of weights for each tap, or for each half of the channels.
  static constexpr int kPanels = K == 1 ? 2 : 9, kPanelDepth = 2 * kChannelGroup<T>, kPanel = kOut * kPanelDepth;
  // The next chunk's pixels come in so many parts, each under way during a part of the products: all of them at once
  // would not leave registers for so many sums.
  static constexpr int kParts = !kIsHalf<T> || kOut < 48 ? 1 : K == 1 ? 2 : 3;
  static_assert(kPanels % kParts == 0);

  alignas(16) T window[2][kWindow * kPitch];
  alignas(16) T panels[2][kPanels * kPanel];
  DenseConvWork work;  // for those who write the results: until then its registers are the sums'
};

// ---- weights -------------------------------------------------------------------------------------------------------

// A thread a channel of an output, `size` of them with what fills up panels.
template <class Kind, class W, int K>
MIRAGE_KERNEL(256) dense_panel_kernel(const DenseConvArguments p, const int tile_outputs, const int64_t size) {
  using Tile = DenseConvTile<Kind, K, 16>;
  using T = typename Tile::T;
  constexpr int kTaps = Tile::kTaps, kDepth = Tile::kDepth;
  const int64_t i = block_index() * 256 + thread_index();
  if (i >= size) return;
  const int channel = int(i % (p.chunks * kDepth)), out = int(i / (p.chunks * kDepth));
  const bool known = channel < p.x.channels && out < p.outputs;
  const W* from = static_cast<const W*>(p.weight) +
                  (p.turned ? int64_t(channel) * p.outputs + out : int64_t(out) * p.x.channels + channel) * kTaps;
  const int panel = tile_outputs * Tile::kPanelDepth;
  const int64_t chunk = int64_t(out / tile_outputs) * p.chunks + channel / kDepth;
  T* to = static_cast<T*>(p.panels) + (chunk * Tile::kPanels + channel % kDepth / Tile::kPanelDepth) * panel +
          Kind::place(out % tile_outputs, channel % Tile::kPanelDepth, Tile::kPanelDepth);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const float value = known ? to_float(from[p.turned ? kTaps - 1 - tap : tap]) : 0.0f;
    to[tap * panel] = as_factor<Kind>(from_float<T>(value));
  }
}

// ---- the product ---------------------------------------------------------------------------------------------------

template <class Tile>
MIRAGE_DEVICE DenseConvWork dense_conv_work(const DenseConvArguments& p) {
  const int columns = p.tile.length, rows = kDensePixels / columns;
  const int across = (p.x.width + columns - 1) / columns, down = (p.x.height + rows - 1) / rows;
  const int tiles = (p.outputs + Tile::kOut - 1) / Tile::kOut;
  int64_t i = block_index();
  DenseConvWork work;
  work.split = int(i % p.splits), i /= p.splits;
  work.tile = int(i % tiles), i /= tiles;  // neighbours read the same pixels
  work.at.column = int(i % across) * columns, i /= across;
  work.at.row = int(i % down) * rows, work.at.sample = int(i / down);
  work.first_chunk = int(int64_t(p.chunks) * work.split / p.splits);
  work.last_chunk = int(int64_t(p.chunks) * (work.split + 1) / p.splits);
  return work;
}

// What a thread brings of a chunk into the window: of each of its pixels a group of channels.
template <class Kind, class Tile>
struct WindowLoader {
  using T = typename Tile::T;
  static constexpr int kTurns = Tile::kTurns / Tile::kParts;
  using Values = T[kTurns][kChannelGroup<T>];
  const T* pixel[Tile::kTurns];

  // Of a turn: which pixel of the window, and which group; none where that is kGroups.
  MIRAGE_DEVICE static int pixel_of_turn(int turn) {
    return Tile::kWindow == kTileThreads ? thread_index() : (turn * kTileThreads + thread_index()) % Tile::kWindow;
  }
  MIRAGE_DEVICE static int group_of_turn(int turn) {
    return Tile::kWindow == kTileThreads ? turn : (turn * kTileThreads + thread_index()) / Tile::kWindow;
  }

  MIRAGE_DEVICE WindowLoader(const DenseConvArguments& p, const Corner& at) {
    const Corner from{at.sample, at.row - Tile::kMargin, at.column - Tile::kMargin};
    const int pixels = p.window.length * (kDensePixels / p.tile.length + 2 * Tile::kMargin);
#pragma unroll
    for (int turn = 0; turn < Tile::kTurns; ++turn) {
      const bool known = group_of_turn(turn) < Tile::kGroups && pixel_of_turn(turn) < pixels;
      pixel[turn] = known ? pixel_of<T>(p.x, from, p.window, pixel_of_turn(turn)) : nullptr;
    }
  }

  // Of channels below `last`.
  MIRAGE_DEVICE void load(const DenseConvArguments& p, int chunk, int last, int part, Values& value) const {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int turn = part * kTurns + i, channel = chunk * Tile::kDepth + group_of_turn(turn) * kChannelGroup<T>;
      load_group(p.x, pixel[turn], channel, last, value[i]);
    }
  }

  MIRAGE_DEVICE static void store(T* window, int part, const Values& value) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int turn = part * kTurns + i, group = group_of_turn(turn);
      T* place = window + pixel_of_turn(turn) * Tile::kPitch + group * kChannelGroup<T>;
      if (group < Tile::kGroups) store_group<Kind>(place, value[i]);
    }
  }
};

template <class Tile>
MIRAGE_DEVICE void copy_panels(const DenseConvArguments& p, const DenseConvWork& work, int chunk,
                               typename Tile::T* to) {
  constexpr int kElements = Tile::kPanels * Tile::kPanel, kGroup = kChannelGroup<typename Tile::T>;
  const int64_t start = (int64_t(work.tile) * p.chunks + chunk) * kElements + thread_index() * kGroup;
  const auto* from = static_cast<const typename Tile::T*>(p.panels) + start;
  to += thread_index() * kGroup;
#pragma unroll
  for (int i = 0; i < kElements; i += kTileThreads * kGroup) {
    if (i + thread_index() * kGroup < kElements) copy_async(to + i, from + i);
  }
}

// Where a warp's two runs of 16 pixels are in a tile.
MIRAGE_DEVICE Corner run_in_tile(const DenseConvArguments& p, int j) {
  const int n = 32 * warp_index() + 16 * j;
  return {0, p.tile.row(n), p.tile.column(n)};
}

// The products with a part of the panels.
template <class Kind, class Tile>
MIRAGE_DEVICE void multiply_part(const DenseConvArguments& p, const Tile& tile, int buffer, int part,
                                 float (&acc)[Tile::kOut / 16][4][4]) {
  using T = typename Tile::T;
  const int line = p.window.length;
  const T* run[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const Corner at = run_in_tile(p, j);
    run[j] = tile.window[buffer] + (at.row * line + at.column) * Tile::kPitch + lane_in_run<Kind>(Tile::kPitch);
  }
  constexpr int kPanels = Tile::kPanels / Tile::kParts;
#pragma unroll 1
  for (int i = part * kPanels; i < (part + 1) * kPanels; ++i) {
    const int offset = Tile::kTaps == 1 ? i * Tile::kPanelDepth : (i / 3 * line + i % 3) * Tile::kPitch;
    const T* const shifted[2] = {run[0] + offset, run[1] + offset};
    multiply_pixels<Tile::kPanelDepth>(Kind(), tile.panels[buffer] + i * Tile::kPanel, shifted, Tile::kPitch, acc);
  }
}

// Of a fragment: this lane's two neighbours, and the outputs g and g + 8.
template <class To, class Tile>
MIRAGE_DEVICE void store_outputs(const DenseConvArguments& p, const Tile& tile, To* y,
                                 const float (&acc)[Tile::kOut / 16][4][4]) {
  const DenseConvWork work = tile.work;
  const int64_t plane = int64_t(p.x.height) * p.x.width;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const Corner run = run_in_tile(p, n / 2);
    const int row = work.at.row + run.row, column = work.at.column + run.column + n % 2 * 8 + 2 * t;
    if (row >= p.x.height || column >= p.x.width) continue;
#pragma unroll
    for (int m = 0; m < Tile::kOut / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int out = work.tile * Tile::kOut + 16 * m + 8 * half + g;
        if (out >= p.outputs) continue;
        To* to = y + (int64_t(work.at.sample) * p.outputs + out) * plane + int64_t(row) * p.x.width + column;
        const float first = acc[m][n][2 * half], second = acc[m][n][2 * half + 1];
        if (p.pairs) {
          store_pair(to, first, second);
        } else {
          to[0] = from_float<To>(first);
          if (column + 1 < p.x.width) to[1] = from_float<To>(second);
        }
      }
    }
  }
}

// The sums of exact products are added up chunk by chunk: in one sum over thousands of them the roundings would grow
// with their number. Those of a chunk take registers, too, that two blocks would not have.
template <class Kind, int K, int kOut>
MIRAGE_KERNEL(256, std::is_same_v<Kind, ExactFloat> && kOut > 16 ? 1 : 2)
dense_conv_kernel(const DenseConvArguments p) {
  using Tile = DenseConvTile<Kind, K, kOut>;
  using Loader = WindowLoader<Kind, Tile>;
  constexpr bool kChunkSums = std::is_same_v<Kind, ExactFloat>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const DenseConvWork work = dense_conv_work<Tile>(p);
  if (thread_index() == 0) tile.work = work;
  const Loader loader(p, work.at);
  const int behind = work.last_chunk * Tile::kDepth, last = behind < p.x.channels ? behind : p.x.channels;
  copy_panels<Tile>(p, work, work.first_chunk, tile.panels[0]);
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) {
    typename Loader::Values value;
    loader.load(p, work.first_chunk, last, part, value);
    loader.store(tile.window[0], part, value);
  }
  const Corner run = run_in_tile(p, 0);
  const bool wanted = work.at.row + run.row < p.x.height && work.at.column + run.column < p.x.width;
  float acc[kOut / 16][4][4] = {};
  for (int chunk = work.first_chunk; chunk < work.last_chunk; ++chunk) {
    const int now = (chunk - work.first_chunk) % 2;
    const bool more = chunk + 1 < work.last_chunk;
    wait_for_copies();
    sync_block();  // this chunk is there, and the one before has been read
    if (more) copy_panels<Tile>(p, work, chunk + 1, tile.panels[1 - now]);
    float of_chunk[kOut / 16][4][4] = {};
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      typename Loader::Values value;
      loader.load(p, chunk + 1, last, part, value);
      if (wanted) multiply_part<Kind>(p, tile, now, part, kChunkSums ? of_chunk : acc);
      if (more) loader.store(tile.window[1 - now], part, value);
    }
    if (kChunkSums) {
#pragma unroll
      for (int i = 0; i < kOut; ++i) acc[i / 16][i / 4 % 4][i % 4] += of_chunk[i / 16][i / 4 % 4][i % 4];
    }
  }
  if (!wanted) return;
  if (p.splits == 1) return store_outputs(p, tile, static_cast<typename Tile::T*>(p.y), acc);
  const int64_t elements = int64_t(p.x.batch) * p.outputs * p.x.height * p.x.width;
  store_outputs(p, tile, p.partial + tile.work.split * elements, acc);
}

// The sums of all splits, in their order. A thread an element of y.
template <class T>
MIRAGE_KERNEL(256) dense_conv_sum_kernel(const DenseConvArguments p, const int64_t elements) {
  const int64_t i = block_index() * 256 + thread_index();
  if (i >= elements) return;
  float sum = 0.0f;
  for (int split = 0; split < p.splits; ++split) sum += p.partial[split * elements + i];
  static_cast<T*>(p.y)[i] = from_float<T>(sum);
}

}  // namespace mirage::cuda
