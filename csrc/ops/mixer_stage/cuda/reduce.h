// The first kernel of mixer_stage: all sums over pixels. A block has some of the tiles of one sample.
#pragma once

#include "shared.h"

namespace mirage::cuda {

// kChannelTiles: channels of a branch in sixteens.
template <class Kind, int kChannelTiles, int kRows>
struct MixerReduceTile {
  using T = typename Kind::Element;
  using Near = Window<kRows, 1>;
  using Inner = Window<kRows, 0>;
  using Run = TileRun<Inner>;
  static constexpr int kBranch = 16 * kChannelTiles, kHiddenPitch = Near::kHiddenPitch;
  static constexpr int kRun = Run::kRun;
  // q k^T consists of 16 x 8 items, of which a warp has every eighth.
  static constexpr int kItems = 2 * kChannelTiles * kChannelTiles,
                       kItemsOfWarp = (kItems + kTileWarps - 1) / kTileWarps;

  alignas(16) T normal[kBranch * Near::kPitch];
  alignas(16) T panels[kChannelTiles][32 * kBranch];  // 16 rows of q, 16 rows of k
  alignas(16) float hidden[32 * kHiddenPitch];
  alignas(16) T q[kBranch * Inner::kPitch];
  alignas(16) T k[kBranch * Inner::kPitch];
  NormMoments moments[Near::kPadded];
  float squares[2 * kBranch];                         // |q|^2, |k|^2
  float branch_mean[kBranch], deviations[kBranch];    // running mean and squared deviations of n2
};

// Computes the layer norm's moments for each pixel of the window, one thread per pixel. Those of the tile itself are
// also stored for mixer_fuse.
template <class Tile>
MIRAGE_DEVICE void compute_moments(const MixerArguments& p, const Corner& at, Tile& tile) {
  using T = typename Tile::T;
  using Near = typename Tile::Near;
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch;
  NormMoments* kept = p.moments + at.sample * p.plane();
  for (int n = thread_index(); n < Near::kPixels; n += kTileThreads) {
    const int i = n / Near::kLine - 1, j = n % Near::kLine - 1, row = at.row + i, column = at.column + j;
    if (!is_in_bounds(p, row, column)) continue;
    const T* pixel = x + row * p.s_row + column * p.s_column;
    const NormMoments moments = norm_moments(pixel, p.s_channel, 3 * p.branch, p.eps);
    tile.moments[n] = moments;
    if (i >= 0 && j >= 0 && n / Near::kLine <= Near::kPixels / Near::kLine - 2 && j < Near::kColumns) {
      kept[int64_t(row) * p.width + column] = moments;
    }
  }
}

// Computes mean and squared deviations of n2 over the tile, and merges them with those of `before` pixels. One warp per
// channel.
template <class W, class Tile>
MIRAGE_DEVICE void add_branch_moments(const MixerArguments& p, const Corner& at, float before, float count,
                                      Tile& tile) {
  using T = typename Tile::T;
  using Inner = typename Tile::Inner;
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch + int64_t(p.branch) * p.s_channel;
  const auto weight = p.weights<W>(p.norm_weight), bias = p.weights<W>(p.norm_bias);
  for (int c = warp_index(); c < p.branch; c += kTileWarps) {
    const float w = weight[p.branch + c], b = bias[p.branch + c];
    float value[Inner::kPixels / kLanes], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < Inner::kPixels / kLanes; ++j) {
      const int n = kLanes * j + lane_index(), i = n / 16, k = n % 16, place = (i + 1) * Tile::Near::kLine + k + 1;
      const bool in_bounds = is_in_bounds(p, at.row + i, at.column + k);
      const T* pixel = x + c * p.s_channel + (at.row + i) * p.s_row + (at.column + k) * p.s_column;
      value[j] =
          in_bounds ? fmaf((to_float(*pixel) - tile.moments[place].mean) * tile.moments[place].rstd, w, b) : 0.0f;
      sum += value[j];
    }
    const float about = warp_all_reduce_sum(sum) / count;
    float rest = 0.0f;
#pragma unroll
    for (int j = 0; j < Inner::kPixels / kLanes; ++j) {
      const int n = kLanes * j + lane_index();
      value[j] = is_in_bounds(p, at.row + n / 16, at.column + n % 16) ? value[j] - about : 0.0f;
      rest += value[j];
    }
    // A second pass removes the rounding error of the mean. The mean of equal values is then exactly that value;
    // otherwise BatchNorm would take the rounding error for a deviation, and magnify it.
    const float mean = about + warp_all_reduce_sum(rest) / count;
#pragma unroll
    for (int j = 0; j < Inner::kPixels / kLanes; ++j) squares = fmaf(value[j], value[j], squares);
    squares = warp_all_reduce_sum(squares);
    if (lane_index() != 0) continue;
    const float total = before + count, delta = before > 0.0f ? mean - tile.branch_mean[c] : 0.0f;
    tile.branch_mean[c] = before > 0.0f ? tile.branch_mean[c] + delta * (count / total) : mean;
    tile.deviations[c] =
        (before > 0.0f ? tile.deviations[c] : 0.0f) + squares + delta * delta * (before * count / total);
  }
}

// Computes q and k for 16 channels over the tile; zero out of bounds.
template <class W, class Tile>
MIRAGE_DEVICE void convolve_q_and_k(const MixerArguments& p, const Corner& at, int chunk, Tile& tile) {
  using T = typename Tile::T;
  const auto weight = p.weights<W>(p.qkv_dwconv);
  const typename Tile::Run run(thread_index());
  const int channel = 16 * chunk + run.channel;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float taps[9], sum[Tile::kRun] = {};
#pragma unroll
    for (int t = 0; t < 9; ++t) {
      taps[t] = channel < p.branch ? weight[int64_t(which * p.branch + channel) * 9 + t] : 0.0f;
    }
    convolve_run(tile.hidden + (16 * which + run.channel) * Tile::kHiddenPitch + run.row * kHiddenLine + run.column,
                 taps, sum);
    T* out = (which ? tile.k : tile.q) + 16 * chunk * Tile::Inner::kPitch + run.place();
    store_in_bounds(p, at.row + run.row, at.column + run.column, sum, out);
  }
}

template <class Kind, class Tile>
MIRAGE_DEVICE void add_products(const MixerArguments& p, Tile& tile, float (&acc)[Tile::kItemsOfWarp][4]) {
  using Inner = typename Tile::Inner;
  const int depth = p.depth();
#pragma unroll
  for (int i = 0; i < Tile::kItemsOfWarp; ++i) {
    const int item = kTileWarps * i + warp_index();
    const int row = item / (2 * Tile::kBranch / 16) * 16, column = item % (2 * Tile::kBranch / 16) * 8;
    if (item >= Tile::kItems || row >= p.branch || column >= p.branch) continue;
    if (row / depth > (column + 7) / depth || column / depth > (row + 15) / depth) continue;  // different heads
    multiply_rows<Inner::kPixels>(Kind(), tile.q + row * Inner::kPitch, Inner::kPitch, tile.k + column * Inner::kPitch,
                                  Inner::kPitch, acc[i]);
  }
  for (int c = warp_index(); c < 2 * p.branch; c += kTileWarps) {
    const auto* line = c < p.branch ? tile.q + c * Inner::kPitch : tile.k + (c - p.branch) * Inner::kPitch;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Inner::kPixels / kLanes; ++j) {
      const float value = to_float(line[kLanes * j + lane_index()]);
      sum = fmaf(value, value, sum);
    }
    sum = warp_all_reduce_sum(sum);
    if (lane_index() == 0) tile.squares[c] += sum;
  }
}

template <class Tile>
MIRAGE_DEVICE void store_partial(const MixerArguments& p, float* out, float count, const Tile& tile,
                                 const float (&acc)[Tile::kItemsOfWarp][4]) {
  const int depth = p.depth(), g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < Tile::kItemsOfWarp; ++i) {
    const int item = kTileWarps * i + warp_index();
    const int first = item / (2 * Tile::kBranch / 16) * 16, across = item % (2 * Tile::kBranch / 16) * 8;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = first + g + j / 2 * 8, column = across + 2 * t + j % 2;
      if (item < Tile::kItems && row < p.branch && column < p.branch && row / depth == column / depth) {
        out[row * depth + column % depth] = acc[i][j];
      }
    }
  }
  for (int c = thread_index(); c < p.branch; c += kTileThreads) {
    out[p.squares_at() + c] = tile.squares[c];
    out[p.squares_at() + p.branch + c] = tile.squares[p.branch + c];
    out[p.means_at() + c] = tile.branch_mean[c];
    out[p.means_at() + p.branch + c] = tile.deviations[c];
  }
  if (thread_index() == 0) out[p.count_at()] = count;
}

template <class Kind, class W, int kChannelTiles, int kRows>
MIRAGE_KERNEL(256, kChannelTiles == 1 ? 3 : kChannelTiles == 2 ? 2 : 1) mixer_reduce_kernel(const MixerArguments p) {
  using Tile = MixerReduceTile<Kind, kChannelTiles, kRows>;
  using T = typename Tile::T;
  using Near = typename Tile::Near;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int across = (p.width + 15) / 16, tiles = across * ((p.height + kRows - 1) / kRows);
  const int sample = int(block_index()) / p.parts, part = int(block_index()) % p.parts;
  const int last = int(int64_t(tiles) * (part + 1) / p.parts);
  for (int chunk = 0; chunk < kChannelTiles; ++chunk) {
    const int rows = p.branch - 16 * chunk;
    for (int which = 0; which < 2; ++which) {
      const Block<W> block{static_cast<const W*>(p.qkv), p.branch, which * p.branch + 16 * chunk, 0, rows, p.branch};
      store_matrix<Kind, 16, Tile::kBranch, kTileThreads>(tile.panels[chunk] + which * 16 * Tile::kBranch, block);
    }
  }
  for (int c = thread_index(); c < 2 * Tile::kBranch; c += kTileThreads) tile.squares[c] = 0.0f;
  float acc[Tile::kItemsOfWarp][4] = {}, count = 0.0f;
  for (int i = int(int64_t(tiles) * part / p.parts); i < last; ++i) {
    const Corner at{sample, i / across * kRows, i % across * 16};
    const float pixels = float(at.row + kRows < p.height ? kRows : p.height - at.row) *
                         float(at.column + 16 < p.width ? 16 : p.width - at.column);
    compute_moments(p, at, tile);
    sync_block();
    const MomentsOfWindow moments{tile.moments};
    load_normal<T, W, kChannelTiles, Near>(p, at, 0, p.weights<W>(p.norm_weight), p.weights<W>(p.norm_bias), moments,
                                           tile.normal, Unchanged());
    add_branch_moments<W>(p, at, count, pixels, tile);
    count += pixels;
    sync_block();
    for (int chunk = 0; chunk < kChannelTiles; ++chunk) {
      float fragments[2][Near::kTiles][4] = {};
      multiply<Tile::kBranch>(Kind(), tile.panels[chunk], tile.normal + 8 * Near::kTiles * warp_index(), Near::kPitch,
                              fragments);
      store_lines<Near>(fragments, tile.hidden);
      sync_block();
      convolve_q_and_k<W>(p, at, chunk, tile);
      sync_block();
    }
    add_products<Kind>(p, tile, acc);  // two barriers follow before the next q and k
  }
  sync_block();
  store_partial(p, p.partial + int64_t(block_index()) * p.partial_size(), count, tile, acc);
}

}  // namespace mirage::cuda
