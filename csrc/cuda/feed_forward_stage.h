// The kernel of feed_forward_stage, for each kind of product (products.h): y = x + project_out(gate(depthwise(gelu(
// project_in(layer_norm(x)))))), a tile of the image at a time.
//
// A block holds the normalised pixels of its tile and of the line around it in shared memory, and takes 16 pairs of
// hidden channels at a time: product with project_in, GELU, to shared memory; depthwise convolution and gate, to shared
// memory; product with project_out, whose sums stay in registers. x is read and y written, nothing else. Weights come
// packed (feed_forward_pack.h). Where an image has few tiles several blocks share one, each with some of the pairs, and
// a second kernel adds up their sums.
#pragma once

#include "copies.h"
#include "elementary.h"
#include "feed_forward_pack.h"
#include "tiles.h"

namespace mirage::cuda {

// The tile of a block and where its parts lie in shared memory. kBlocks: channels in sixteens.
template <class Kind, int kBlocks, int kRows_>
struct FeedForwardTile {
  using T = typename Kind::Element;
  using Near = Window<kRows_, 1>;
  using Inner = Window<kRows_, 0>;
  static constexpr int kRows = kRows_, kChannels = 16 * kBlocks;
  static constexpr int kPairs = kFeedForwardPairs;                        // at a time
  static constexpr int kRun = Inner::kPixels * kPairs / kTileThreads;     // neighbours that a thread convolves

  alignas(16) T normal[kChannels * Near::kPitch];
  alignas(16) T panel_in[2 * kPairs * kChannels];
  alignas(16) T panel_out[kChannels * kPairs];
  alignas(16) float taps[2 * kPairs * 12];
  alignas(16) float hidden[2 * kPairs * Near::kHiddenPitch];
  alignas(16) T gate[kPairs * Inner::kPitch];
};

// Rows of a tile: eight, or four where the pixels of so many channels would leave room for one block only.
template <class Kind, int kBlocks>
constexpr int kFeedForwardRows = kBlocks <= (kIsHalf<typename Kind::Element> ? 12 : 3) ? 8 : 4;

// One tile of one sample, and the chunks of pairs that a block is to do.
struct FeedForwardWork {
  int sample, row, column, split, first_chunk, last_chunk;
};

template <class Tile>
MIRAGE_DEVICE FeedForwardWork feed_forward_work(const FeedForwardArguments& p) {
  constexpr int kRows = Tile::kRows, kColumns = Tile::Near::kColumns;
  const int across = (p.width + kColumns - 1) / kColumns, down = (p.height + kRows - 1) / kRows;
  int64_t i = block_index();
  FeedForwardWork work;
  work.split = int(i % p.splits), i /= p.splits;
  work.column = int(i % across) * kColumns, i /= across;
  work.row = int(i % down) * kRows, work.sample = int(i / down);
  const int chunks = (p.pairs + Tile::kPairs - 1) / Tile::kPairs;
  work.first_chunk = int(int64_t(chunks) * work.split / p.splits);
  work.last_chunk = int(int64_t(chunks) * (work.split + 1) / p.splits);
  return work;
}

// x with the line around the tile, as it is; zero outside the image and from `channels` on.
template <class Tile>
MIRAGE_DEVICE void load_pixels(const FeedForwardArguments& p, const FeedForwardWork& work, Tile& tile) {
  using T = typename Tile::T;
  constexpr int kGroups = Tile::Near::kPadded / kLanes;
  const T* x = static_cast<const T*>(p.x) + work.sample * p.s_batch;
  int64_t offset[kGroups];
  bool inside[kGroups];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int n = kLanes * j + lane_index();
    const int row = work.row + n / Tile::Near::kLine - 1, column = work.column + n % Tile::Near::kLine - 1;
    inside[j] = n < Tile::Near::kPixels && row >= 0 && row < p.height && column >= 0 && column < p.width;
    offset[j] = row * p.s_row + column * p.s_column;
  }
  for (int c = warp_index(); c < Tile::kChannels; c += kTileWarps) {
    T value[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      value[j] = c < p.channels && inside[j] ? x[c * p.s_channel + offset[j]] : from_float<T>(0.0f);
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) tile.normal[c * Tile::Near::kPitch + kLanes * j + lane_index()] = value[j];
  }
}

// The layer norm of each pixel, in place.
template <class Packed, class Tile>
MIRAGE_DEVICE void normalise_pixels(const FeedForwardArguments& p, const Packed& packed, Tile& tile) {
  using T = typename Tile::T;
  for (int n = thread_index(); n < Tile::Near::kPixels; n += kTileThreads) {
    T* pixel = tile.normal + n;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 8
    for (int c = 0; c < p.channels; ++c) sum += to_float(pixel[c * Tile::Near::kPitch]);
    const float mean = sum / float(p.channels);
#pragma unroll 8
    for (int c = 0; c < p.channels; ++c) {
      const float centred = to_float(pixel[c * Tile::Near::kPitch]) - mean;
      squares = fmaf(centred, centred, squares);
    }
    const float rstd = 1.0f / sqrtf(squares / float(p.channels) + p.eps);
#pragma unroll 8
    for (int c = 0; c < p.channels; ++c) {
      const float scaled = (to_float(pixel[c * Tile::Near::kPitch]) - mean) * rstd;
      pixel[c * Tile::Near::kPitch] = from_float<T>(fmaf(scaled, packed.norm_weight[c], packed.norm_bias[c]));
    }
  }
}

// Bit 2n + i: whether column i of this lane's fragment n lies in the image. The convolution pads with zeros, and the
// hidden channels of a pixel outside are none.
template <class Tile>
MIRAGE_DEVICE uint32_t hidden_inside(const FeedForwardArguments& p, const FeedForwardWork& work) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 2 * Tile::Near::kTiles; ++i) {
    const int n = 8 * (warp_index() * Tile::Near::kTiles + i / 2) + lane_index() % 4 * 2 + i % 2;
    const int row = work.row + n / Tile::Near::kLine - 1, column = work.column + n % Tile::Near::kLine - 1;
    if (row >= 0 && row < p.height && column >= 0 && column < p.width) bits |= 1u << i;
  }
  return bits;
}

// gelu(project_in x) of a chunk. `inside`: see hidden_inside.
template <class Kind, class Tile>
MIRAGE_DEVICE void expand(uint32_t inside, Tile& tile) {
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
    const bool whole = (inside >> 2 * n & 3) == 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * (i / 2) + g + 8 * (i % 2);
      float left = gelu<T>(acc[i / 2][n][i % 2 * 2]), right = gelu<T>(acc[i / 2][n][i % 2 * 2 + 1]);
      if (!whole) {
        left = inside >> 2 * n & 1 ? left : 0.0f;
        right = inside >> 2 * n & 2 ? right : 0.0f;
      }
      store_pair(tile.hidden + row * Tile::Near::kHiddenPitch + place, left, right);
    }
  }
}

// gelu(d1) d2 with d the depthwise convolution of a chunk. A thread has one pair and a run of neighbours in a line.
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

// y = x + acc, or acc to the partial sums.
template <class Tile>
MIRAGE_DEVICE void store_result(const FeedForwardArguments& p, const FeedForwardWork& work,
                                const float (&acc)[Tile::kChannels / 16][Tile::Inner::kTiles][4]) {
  using T = typename Tile::T;
  const T* x = static_cast<const T*>(p.x) + work.sample * p.s_batch;
  const int64_t plane = int64_t(p.height) * p.width, sample = int64_t(work.sample) * p.channels * plane;
  T* y = static_cast<T*>(p.y) + sample;
  float* partial = p.partial + int64_t(work.split) * p.batch * p.channels * plane + sample;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < Tile::Inner::kTiles; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int pixel = 8 * (warp_index() * Tile::Inner::kTiles + n) + 2 * t + side;
      const int row = work.row + pixel / Tile::Inner::kColumns, column = work.column + pixel % Tile::Inner::kColumns;
      if (row >= p.height || column >= p.width) continue;
      const int64_t from = row * p.s_row + column * p.s_column, to = int64_t(row) * p.width + column;
#pragma unroll
      for (int m = 0; m < Tile::kChannels / 16; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = 16 * m + 8 * half + g;
          if (c >= p.channels) continue;
          const float value = acc[m][n][2 * half + side];
          if (p.splits == 1) y[c * plane + to] = from_float<T>(to_float(x[c * p.s_channel + from]) + value);
          else partial[c * plane + to] = value;
        }
      }
    }
  }
}

// Up to 128 channels two blocks have the registers of a multiprocessor, up to 32 three.
template <class Kind, int kBlocks, int kRows>
MIRAGE_KERNEL(256, kBlocks <= 2 ? 3 : kBlocks <= 8 ? 2 : 1) feed_forward_kernel(const FeedForwardArguments p) {
  using Tile = FeedForwardTile<Kind, kBlocks, kRows>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const auto& packed = *static_cast<const FeedForwardPacked<FeedForwardPanels<Kind, kBlocks>>*>(p.packed);
  const FeedForwardWork work = feed_forward_work<Tile>(p);
  if (work.first_chunk < work.last_chunk) {
    copy_to_block<kTileThreads>(tile.panel_in, packed.chunks[work.first_chunk].in);
  }
  load_pixels(p, work, tile);
  sync_block();
  normalise_pixels(p, packed, tile);
  wait_for_copies();
  sync_block();
  const uint32_t inside = hidden_inside<Tile>(p, work);
  float acc[kBlocks][Tile::Inner::kTiles][4] = {};
  for (int chunk = work.first_chunk; chunk < work.last_chunk; ++chunk) {
    const auto& panels = packed.chunks[chunk];
    copy_to_block<kTileThreads>(tile.taps, panels.taps);
    expand<Kind>(inside, tile);
    wait_for_copies();
    sync_block();  // hidden and taps are there; panel_in is free, and since the last turn's end panel_out
    copy_to_block<kTileThreads>(tile.panel_out, panels.out);
    if (chunk + 1 < work.last_chunk) copy_to_block<kTileThreads>(tile.panel_in, packed.chunks[chunk + 1].in);
    convolve_and_gate(tile);
    wait_for_copies();
    sync_block();  // gate and panels are there; hidden and taps are free
    multiply<Tile::kPairs>(Kind(), tile.panel_out, tile.gate + 8 * Tile::Inner::kTiles * warp_index(), Tile::Inner::kPitch, acc);
  }
  store_result<Tile>(p, work, acc);
}

// y = x + the sums of all splits, in their order. One thread an element.
template <class T>
MIRAGE_KERNEL(256) feed_forward_sum_kernel(const FeedForwardArguments p) {
  const int64_t plane = int64_t(p.height) * p.width, total = int64_t(p.batch) * p.channels * plane;
  const int64_t i = block_index() * 256 + thread_index();
  if (i >= total) return;
  const int64_t n = i % plane, c = i / plane % p.channels, b = i / plane / p.channels;
  float sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) sum += p.partial[s * total + i];
  const T* x = static_cast<const T*>(p.x) + b * p.s_batch + c * p.s_channel;
  const float value = to_float(x[n / p.width * p.s_row + n % p.width * p.s_column]);
  static_cast<T*>(p.y)[i] = from_float<T>(value + sum);
}

}  // namespace mirage::cuda
