// The kernel of feed_forward_stage, for each math mode (gemm.h): y = x +
// project_out(gate(depthwise(gelu(project_in(layer_norm(x)))))), one tile of the image at a time.
//
// A block holds the normalised pixels of its tile and a halo of one pixel in shared memory. It takes 16 pairs of hidden
// channels at a time: matrix product with project_in and GELU, to shared memory; depthwise convolution and gate, to
// shared memory; matrix product with project_out, whose accumulators stay in registers. Global memory sees x, y and the
// packed weights (pack.h) only. If an image has few tiles, several blocks share one tile with some of the pairs each,
// and a second kernel adds up their results.
#pragma once

#include "common/cuda/copies.h"
#include "common/cuda/elementary.h"
#include "common/cuda/norm.h"
#include "common/cuda/tiles.h"
#include "pack.h"

namespace mirage::cuda {

// The tile of a block and its layout in shared memory. kChannelTiles: channels in sixteens.
template <class Kind, int kChannelTiles, int kRows_>
struct FeedForwardTile {
  using T = typename Kind::Element;
  using Near = Window<kRows_, 1>;
  using Inner = Window<kRows_, 0>;
  static constexpr int kRows = kRows_, kChannels = 16 * kChannelTiles;
  static constexpr int kPairs = kFeedForwardPairs;                        // pairs of a chunk
  static constexpr int kRun = Inner::kPixels * kPairs / kTileThreads;     // neighbouring pixels that a thread convolves

  alignas(16) T normal[kChannels * Near::kPitch];
  alignas(16) T panel_in[2 * kPairs * kChannels];
  alignas(16) T panel_out[kChannels * kPairs];
  alignas(16) float taps[2 * kPairs * 12];
  alignas(16) float hidden[2 * kPairs * Near::kHiddenPitch];
  alignas(16) T gate[kPairs * Inner::kPitch];
};

// Lines of a tile: eight, or four if otherwise only one block would fit on an SM.
template <class Kind, int kChannelTiles>
constexpr int kFeedForwardRows = kChannelTiles <= (kIsHalf<typename Kind::Element> ? 12 : 3) ? 8 : 4;

// The tile of a block, and the chunks of pairs that it computes.
struct FeedForwardWork : Corner {
  int split, first_chunk, last_chunk;
};

template <class Tile>
MIRAGE_DEVICE FeedForwardWork feed_forward_work(const FeedForwardArguments& p) {
  constexpr int kRows = Tile::kRows, kColumns = Tile::Near::kColumns;
  const int across = (p.width + kColumns - 1) / kColumns, down = (p.height + kRows - 1) / kRows;
  int i = int(block_index());
  FeedForwardWork work;
  work.split = i % p.splits, i /= p.splits;
  work.column = i % across * kColumns, i /= across;
  work.row = i % down * kRows, work.sample = i / down;
  const int chunks = (p.pairs + Tile::kPairs - 1) / Tile::kPairs;
  work.first_chunk = chunks * work.split / p.splits;
  work.last_chunk = chunks * (work.split + 1) / p.splits;
  return work;
}

// Loads x with a halo of one pixel, unchanged; zero out of bounds and from `channels` on.
template <class Tile>
MIRAGE_DEVICE void load_pixels(const FeedForwardArguments& p, const FeedForwardWork& work, Tile& tile) {
  using T = typename Tile::T;
  constexpr int kGroups = Tile::Near::kPadded / kLanes;
  const T* x = static_cast<const T*>(p.x) + work.sample * p.s_batch + corner_of(work, p.s_row, p.s_column);
  const int s_row = int(p.s_row), s_column = int(p.s_column);
  int offset[kGroups];
  uint32_t in_bounds_mask = 0;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int n = kLanes * j + lane_index(), row = n / Tile::Near::kLine - 1, column = n % Tile::Near::kLine - 1;
    const bool in_bounds =
        n < Tile::Near::kPixels && is_in_bounds(p.height, p.width, work.row + row, work.column + column);
    in_bounds_mask |= uint32_t(in_bounds) << j;
    offset[j] = in_bounds ? row * s_row + column * s_column : 0;
  }
  for (int c = warp_index(); c < Tile::kChannels; c += kTileWarps) {
    const uint32_t wanted = c < p.channels ? in_bounds_mask : 0;
    const T* channel = opaque_global(x + c * p.s_channel);
    T value[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      value[j] = wanted >> j & 1 ? load_constant(channel + offset[j]) : from_float<T>(0.0f);
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) tile.normal[c * Tile::Near::kPitch + kLanes * j + lane_index()] = value[j];
  }
}

// Applies the layer norm to each pixel of a window, in place.
template <class Window, int kThreads, class Packed, class T>
MIRAGE_DEVICE void normalise_window(const FeedForwardArguments& p, const Packed& packed, T* pixels) {
  for (int n = opaque(thread_index()); n < Window::kPixels; n += kThreads) {
    normalise_pixel(pixels + n, Window::kPitch, p.channels, p.eps, packed.norm_weight, packed.norm_bias);
  }
}

// Bit 2n + i says whether column i of this lane's fragment n is in bounds. The convolution pads with zeros, so hidden
// channels must be zero out of bounds.
template <class Tile>
MIRAGE_DEVICE uint32_t hidden_in_bounds(const FeedForwardArguments& p, const FeedForwardWork& work) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 2 * Tile::Near::kTiles; ++i) {
    const int n = 8 * (warp_index() * Tile::Near::kTiles + i / 2) + lane_index() % 4 * 2 + i % 2;
    const int row = work.row + n / Tile::Near::kLine - 1, column = work.column + n % Tile::Near::kLine - 1;
    if (row >= 0 && row < p.height && column >= 0 && column < p.width) bits |= 1u << i;
  }
  return bits;
}

// Computes gelu(project_in normal) for a chunk of pairs. `in_bounds`: see hidden_in_bounds.
template <class Kind, class Tile>
MIRAGE_DEVICE void project_in_gelu(uint32_t in_bounds, Tile& tile) {
  using T = typename Tile::T;
  float acc[2][Tile::Near::kTiles][4] = {};
  const int first = 8 * Tile::Near::kTiles * warp_index();
  multiply<Tile::kChannels>(Kind(), tile.panel_in, tile.normal + first, Tile::Near::kPitch, acc);
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < Tile::Near::kTiles; ++n) {
    const int pixel = first + 8 * n + 2 * t;
    if (pixel >= Tile::Near::kPixels) continue;
    const int place = hidden_place<typename Tile::Near>(pixel);
    const bool whole = (in_bounds >> 2 * n & 3) == 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * (i / 2) + g + 8 * (i % 2);
      float left = gelu<T>(acc[i / 2][n][i % 2 * 2]), right = gelu<T>(acc[i / 2][n][i % 2 * 2 + 1]);
      if (!whole) {
        left = in_bounds >> 2 * n & 1 ? left : 0.0f;
        right = in_bounds >> 2 * n & 2 ? right : 0.0f;
      }
      store_pair(tile.hidden + row * Tile::Near::kHiddenPitch + place, left, right);
    }
  }
}

// Computes gelu(d1) d2, d being the depthwise convolution of a chunk. A thread has one pair and a run of neighbours in
// a line.
template <class Tile>
MIRAGE_DEVICE void convolve_and_gate(Tile& tile) {
  using T = typename Tile::T;
  using Inner = typename Tile::Inner;
  constexpr int kRun = Tile::kRun, kRuns = Inner::kColumns / kRun;
  const int pair = thread_index() / (Inner::kPixels / kRun), run = thread_index() % (Inner::kPixels / kRun);
  const int row = run / kRuns, column = run % kRuns * kRun;
  float sum[2][kRun] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = pair + half * Tile::kPairs;
    float taps[9];
    read_taps(tile.taps + 12 * channel, taps);
    convolve_run(tile.hidden + channel * Tile::Near::kHiddenPitch + row * kHiddenLine + column, taps, sum[half]);
  }
  T* gate = tile.gate + pair * Inner::kPitch + row * Inner::kColumns + column;
#pragma unroll
  for (int k = 0; k < kRun; k += 2) {
    store_pair(gate + k, gelu<T>(sum[0][k]) * sum[1][k], gelu<T>(sum[0][k + 1]) * sum[1][k + 1]);
  }
}

// Epilogue: y = x + acc, or the accumulators alone if several blocks share the tile.
template <class Tile>
MIRAGE_DEVICE void store_result(const FeedForwardArguments& p, const FeedForwardWork& work,
                                const float (&acc)[Tile::kChannels / 16][Tile::Inner::kTiles][4]) {
  using T = typename Tile::T;
  const FragmentPixels<Tile::Inner::kTiles> pixels(p.height, p.width, work);
  const int64_t plane = int64_t(p.height) * p.width, of_sample = p.channels * plane;
  const int64_t to = work.sample * of_sample + corner_of(work, p.width, 1);
  if (p.splits == 1) {
    const T* from = static_cast<const T*>(p.x) + work.sample * p.s_batch + corner_of(work, p.s_row, p.s_column);
    store_sum(pixels, p.channels, from, p.s_channel, int(p.s_row), int(p.s_column), static_cast<T*>(p.y) + to, plane,
              p.width, acc);
  } else {
    for_in_bounds(pixels, p.channels, p.partial + work.split * p.batch * of_sample + to, plane, p.width, acc,
                  [](float& element, float value) { element = value; });
  }
}

// Shared memory of an SM in bytes, of which the system takes 1 KiB for each block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSharedOfMultiprocessor = 164 << 10;
#else
constexpr int kSharedOfMultiprocessor = 228 << 10;
#endif

// Blocks per SM that the kernel is compiled for: the registers suffice for two blocks up to 128 channels and for three
// up to 32. Shared memory may allow fewer.
template <class Tile>
constexpr int feed_forward_blocks() {
  const int by_registers = Tile::kChannels <= 32 ? 3 : Tile::kChannels <= 128 ? 2 : 1;
  const int by_memory = kSharedOfMultiprocessor / int(sizeof(Tile) + 1024);
  return by_registers < by_memory ? by_registers : by_memory > 0 ? by_memory : 1;
}

template <class Kind, int kChannelTiles, int kRows>
MIRAGE_KERNEL(256, (feed_forward_blocks<FeedForwardTile<Kind, kChannelTiles, kRows>>()))
feed_forward_kernel(const FeedForwardArguments p) {
  using Tile = FeedForwardTile<Kind, kChannelTiles, kRows>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const auto& packed = *static_cast<const FeedForwardPacked<FeedForwardPanels<Kind, kChannelTiles>>*>(p.packed);
  const FeedForwardWork work = feed_forward_work<Tile>(p);
  if (work.first_chunk < work.last_chunk) {
    copy_to_block<kTileThreads>(tile.panel_in, packed.chunks[work.first_chunk].in);
  }
  load_pixels(p, work, tile);
  sync_block();
  normalise_window<typename Tile::Near, kTileThreads>(p, packed, tile.normal);
  wait_for_copies();
  sync_block();
  const uint32_t in_bounds = hidden_in_bounds<Tile>(p, work);
  float acc[kChannelTiles][Tile::Inner::kTiles][4] = {};
  for (int chunk = work.first_chunk; chunk < work.last_chunk; ++chunk) {
    const auto& panels = packed.chunks[chunk];
    copy_to_block<kTileThreads>(tile.taps, panels.taps);
    project_in_gelu<Kind>(in_bounds, tile);
    wait_for_copies();
    sync_block();  // hidden and taps are complete; panel_in is free, panel_out has been for an iteration
    copy_to_block<kTileThreads>(tile.panel_out, panels.out);
    if (chunk + 1 < work.last_chunk) copy_to_block<kTileThreads>(tile.panel_in, packed.chunks[chunk + 1].in);
    convolve_and_gate(tile);
    wait_for_copies();
    sync_block();  // gate and panels are complete; hidden and taps are free
    multiply<Tile::kPairs>(Kind(), tile.panel_out, tile.gate + 8 * Tile::Inner::kTiles * warp_index(),
                           Tile::Inner::kPitch, acc);
  }
  store_result<Tile>(p, work, acc);
}

// The offset in x of element i of a contiguous tensor. Index is int where it suffices, because 64-bit divisions are
// slow.
template <class Index>
MIRAGE_DEVICE int64_t place_in_x(const FeedForwardArguments& p, Index i) {
  const Index line = i / p.width, map = line / p.height;
  return map / p.channels * p.s_batch + map % p.channels * p.s_channel + line % p.height * p.s_row +
         i % p.width * p.s_column;
}

// y = x + the sum over the splits, in their order. One thread per element.
template <class T>
MIRAGE_KERNEL(256) feed_forward_sum_kernel(const FeedForwardArguments p) {
  const int64_t total = int64_t(p.batch) * p.channels * p.height * p.width, i = block_index() * 256 + thread_index();
  if (i >= total) return;
  const int64_t place = total <= INT32_MAX ? place_in_x(p, int(i)) : place_in_x(p, i);
  const float value = to_float(load_constant(static_cast<const T*>(p.x) + place));
  float sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) sum += p.partial[s * total + i];
  static_cast<T*>(p.y)[i] = from_float<T>(value + sum);
}

}  // namespace mirage::cuda
