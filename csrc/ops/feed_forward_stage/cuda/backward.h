// The main kernel of feed_forward_stage's backward, for each math mode (gemm.h): one tile of the image at a time, it
// computes the gradient of the layer norm's output and the gradients of the three weight matrices.
//
// As in forward, a block takes 16 pairs of hidden channels at a time. It recomputes their values from the normalised
// pixels of its tile with a halo of two: one pixel for the depthwise convolution, the other for its gradient. With h =
// project_in normal, a = gelu(h), d = dwconv a, s = gelu(d1) d2, and g... for "the gradient of ...":
//
//   gs = project_out^T gy, gd from gs and d, gh = gelu'(h) dwconv^T gd, gnormal = project_in^T gh
//   gproject_in = gh normal^T, gproject_out = gy s^T, gdwconv = the sums over pixels of gd times a
//
// Sums over pixels stay in memory that belongs to the block, as fragments; another kernel (weight_gradient.h) adds them
// up over the blocks. gnormal is written to global memory as well, once by each of the blocks that share a tile.
// Nothing with 2M channels reaches global memory.
#pragma once

#include "backward_tile.h"

namespace mirage::cuda {

// ---- a chunk -------------------------------------------------------------------------------------------------------

// Stores gelu of a fragment of h, and within the tile its derivative too.
template <bool kWithSlope, class Tile>
MIRAGE_DEVICE void activate_fragment(const float (&h)[2][4], int lane, int pixel, int place, int in_bounds,
                                     Tile& tile) {
  using T = typename Tile::T;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * (i / 2) + lane / 4 + 8 * (i % 2);
    float value[2], slope[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float x = h[i / 2][i % 2 * 2 + k];
      value[k] = kWithSlope ? gelu_with_slope<T>(x, slope[k]) : gelu<T>(x);
      if (!(in_bounds >> k & 1)) value[k] = 0.0f;
    }
    store_pair(tile.activated + row * Tile::kActivatedPitch + place, value[0], value[1]);
    if constexpr (kWithSlope) store_pair(tile.slope + row * Tile::kInnerPitch + pixel, slope[0], slope[1]);
  }
}

// Computes gelu(project_in normal) and its derivative.
template <class Kind, class Tile>
MIRAGE_DEVICE void recompute_project_in(Tile& tile) {
  constexpr int kTiles = Tile::Outer::kTiles;
  float acc[2][kTiles][4] = {};
  const int thread = opaque(thread_index()), lane = thread % kLanes, first = 8 * kTiles * (thread / kLanes);
  multiply<Tile::kChannels>(Kind(), tile.panel_in, tile.normal + first, Tile::Outer::kPitch, acc);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float h[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i / 4][i % 4] = acc[i / 4][n][i % 4];
    const int pixel = first + 8 * n + lane % 4 * 2;
    const int place = tile.outer_places[pixel / 2] / 4, in_bounds = tile.outer_places[pixel / 2] % 4;
    if (first + 8 * n < Tile::kInner) activate_fragment<true>(h, lane, pixel, place, in_bounds, tile);
    else activate_fragment<false>(h, lane, pixel, place, in_bounds, tile);
  }
}

// Computes gs = project_out^T gy, over the tile with a halo of one pixel.
template <class Kind, class Tile>
MIRAGE_DEVICE void project_out_backward(Tile& tile) {
  const int thread = opaque(thread_index()), warp = thread / kLanes, lane = thread % kLanes;
  if (warp < Tile::kFirst) return;
  float acc[1][Tile::kNearTiles][4] = {};
  const int first = 8 * Tile::kNearTiles * (warp - Tile::kFirst);
  multiply<Tile::kChannels>(Kind(), tile.panel_out, tile.grad_y + first, Tile::Near::kPitch, acc);
#pragma unroll
  for (int n = 0; n < Tile::kNearTiles; ++n) {
    const auto places = *reinterpret_cast<const Packed<uint16_t, 2>*>(tile.near_places + first + 8 * n + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tile.grad[(lane / 4 + i / 2 * 8) * Tile::kGradPitch + places.value[i % 2]] = acc[0][n][i];
    }
  }
}

// ---- depthwise convolution -----------------------------------------------------------------------------------------

// Warp reduce-scatter of N values: each total goes to one lane. Returns which of them this lane got, or -1. Each step
// halves the number of values, N, (N + 1) / 2, ..., so nine values take twelve shuffles.
template <int kStep = kLanes / 2, int N>
MIRAGE_DEVICE int reduce_scatter_warp(float (&value)[N]) {
  if constexpr (kStep == 0) {
    static_assert(N == 1);
    return 0;
  } else {
    constexpr int kHalf = (N + 1) / 2;
    const bool upper = lane_index() & kStep;
    float kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float other = i + kHalf < N ? value[i + kHalf < N ? i + kHalf : 0] : 0.0f;
      kept[i] = (upper ? other : value[i]) + shfl_xor(upper ? value[i] : other, kStep);
    }
    const int found = reduce_scatter_warp<kStep / 2>(kept);
    value[0] = kept[0];
    const int index = found + (upper ? kHalf : 0);
    return found >= 0 && index < N ? index : -1;
  }
}

// Loads what the convolution of a run reads of line i: the run and one pixel on either side.
template <class Tile>
MIRAGE_DEVICE void load_activated(const Tile& tile, int channel, int line, int start, float (&value)[Tile::kRun + 2]) {
  const float* from = tile.activated + channel * Tile::kActivatedPitch + line * kHiddenLine + start;
#pragma unroll
  for (int j = 0; j < Tile::kRun + 2; j += 2) load_packed<2>(from + j, value + j);
}

// Computes s, and gd in place of gs. A warp has a pair of channels, a lane a run of pixels, bit j of `in_bounds_mask`
// says whether pixel j of the run is in bounds.
template <class Tile>
MIRAGE_DEVICE void gate_run(Tile& tile, int pair, int line, int start, uint32_t in_bounds_mask,
                            float (&grad_d)[2][Tile::kRun]) {
  using T = typename Tile::T;
  constexpr int kRun = Tile::kRun;
  float d[2][kRun] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = pair + half * Tile::kPairs;
    float taps[9];
    read_taps(tile.taps + 12 * channel, taps);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      float value[kRun + 2];
      load_activated(tile, channel, line + i, start, value);
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        // each line is summed separately: shorter chains of roundings
        const float two = fmaf(taps[3 * i + 1], value[k + 1], taps[3 * i] * value[k]);
        const float three = fmaf(taps[3 * i + 2], value[k + 2], two);
        d[half][k] = i == 0 ? three : d[half][k] + three;
      }
    }
  }
  float* grad = tile.grad + pair * Tile::kGradPitch + line * kHiddenLine + start;
  T* gate = tile.gate + pair * Tile::kInnerPitch + (line - 1) * 16 + start - 1;
#pragma unroll
  for (int k = 0; k < kRun; k += 2) {
    float grad_s[2];
    load_packed<2>(grad + k, grad_s);
#pragma unroll
    for (int i = k; i < k + 2; ++i) {
      float slope;
      const float first = gelu_with_slope<T>(d[0][i], slope);
      const bool in_bounds = in_bounds_mask >> i & 1;
      grad_d[0][i] = in_bounds ? grad_s[i - k] * d[1][i] * slope : 0.0f;
      grad_d[1][i] = in_bounds ? grad_s[i - k] * first : 0.0f;
      const int column = start + i - 1;
      if (line < 1 || line > Tile::kRows || column < 0 || column >= 16) continue;
      gate[i] = from_float<T>(in_bounds ? first * d[1][i] : 0.0f);
    }
    store_pair(grad + k, grad_d[0][k], grad_d[0][k + 1]);
    store_pair(grad + Tile::kPairs * Tile::kGradPitch + k, grad_d[1][k], grad_d[1][k + 1]);
  }
}

// Adds what a run contributes to the gradient of a channel's taps. `counted`: the mask of the pixels to count.
template <class Tile>
MIRAGE_DEVICE void add_taps(const Tile& tile, int channel, int line, int start, uint32_t counted,
                            const float (&grad_d)[Tile::kRun], float (&sum)[9]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    float value[Tile::kRun + 2];
    load_activated(tile, channel, line + i, start, value);
#pragma unroll
    for (int j = 0; j < 3; ++j) {
#pragma unroll
      for (int k = 0; k < Tile::kRun; ++k) {
        if (counted >> k & 1) sum[3 * i + j] = fmaf(grad_d[k], value[j + k], sum[3 * i + j]);
      }
    }
  }
}

// Does both for all pairs. The gradient of the taps is added to `sums` ([pairs, 18]), or initialises them.
template <class Tile>
MIRAGE_DEVICE void gate_pairs(const FeedForwardArguments& p, const FeedForwardWork& work, bool is_first, float* sums,
                              Tile& tile) {
  const int thread = opaque(thread_index()), lane = thread % kLanes;
  const int line = lane / Tile::kRuns, start = lane % Tile::kRuns * Tile::kRun;
  uint32_t in_bounds_mask = 0, counted = 0;
#pragma unroll
  for (int k = 0; k < Tile::kRun; ++k) {
    const int row = work.row + line - 1, near = start + k - 1, column = work.column + near;
    const bool in_bounds = near <= 16 && row >= 0 && row < p.height && column >= 0 && column < p.width;
    if (!in_bounds) continue;
    in_bounds_mask |= 1u << k;
    if (line >= 1 && line <= Tile::kRows && near >= 0 && near < 16) counted |= 1u << k;
  }
#pragma unroll 1
  for (int pair = thread / kLanes; pair < Tile::kPairs; pair += Tile::kWarps) {
    float grad_d[2][Tile::kRun] = {};
    if (lane < 30) gate_run(tile, pair, line, start, in_bounds_mask, grad_d);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum[9] = {};
      if (counted) add_taps(tile, pair + half * Tile::kPairs, line, start, counted, grad_d[half], sum);
      const int index = reduce_scatter_warp(sum);
      if (index < 0) continue;
      float* to = sums + pair * 18 + half * 9 + index;
      *to = (is_first ? 0.0f : *to) + sum[0];
    }
  }
}

// Computes gh. A thread has a channel and a run of eight pixels of the tile.
template <class Tile>
MIRAGE_DEVICE void depthwise_gelu_backward(const FeedForwardArguments& p, const FeedForwardWork& work, Tile& tile) {
  using T = typename Tile::T;
  const int thread = opaque(thread_index()), channel = thread / (2 * Tile::kRows), run = thread % (2 * Tile::kRows);
  const int row = run / 2, column = run % 2 * 8, pixel = row * 16 + column;
  float taps[9], flipped[9], sum[8] = {}, slope[8];
  read_taps(tile.taps + 12 * channel, taps);
#pragma unroll
  for (int i = 0; i < 9; ++i) flipped[i] = taps[8 - i];
  convolve_run(tile.grad + channel * Tile::kGradPitch + row * kHiddenLine + column, flipped, sum);
  const T* from = tile.slope + channel * Tile::kInnerPitch + pixel;
#pragma unroll
  for (int k = 0; k < 8; k += 4) load_packed<4>(from + k, slope + k);
  const bool in_bounds = work.row + row < p.height;
#pragma unroll
  for (int k = 0; k < 8; ++k) sum[k] = in_bounds && work.column + column + k < p.width ? sum[k] * slope[k] : 0.0f;
  T* to = tile.grad_hidden() + channel * Tile::kInnerPitch + pixel;
#pragma unroll
  for (int k = 0; k < 8; k += 2) store_pair(to + k, sum[k], sum[k + 1]);
}

// ---- gradients of the matrices -------------------------------------------------------------------------------------

// Adds the tile's fragments of gproject_in and of gproject_out to the block's sums, or initialises them.
template <class Kind, int kChannelTiles, class Tile>
MIRAGE_DEVICE void add_matrices(bool is_first, float* sums, Tile& tile) {
  using T = typename Tile::T;
  const int thread = opaque(thread_index()), lane = thread % kLanes;
#pragma unroll 1
  for (int f = thread / kLanes; f < 6 * kChannelTiles; f += Tile::kWarps) {
    const int rest = f - 4 * kChannelTiles;
    const T* left = rest < 0 ? tile.grad_hidden() + f % 2 * 16 * Tile::kInnerPitch
                             : tile.grad_y + rest / 2 * 16 * Tile::Near::kPitch;
    const T* right = rest < 0 ? tile.normal + f / 2 * 8 * Tile::Outer::kPitch
                              : tile.gate + rest % 2 * 8 * Tile::kInnerPitch;
    auto& sum = reinterpret_cast<Packed<float, 4>*>(sums)[f * kLanes + lane];
    Packed<float, 4> before{};
    if (!is_first) before = sum;
    float acc[4] = {};
    multiply_rows<Tile::kInner>(Kind(), left, rest < 0 ? Tile::kInnerPitch : Tile::Near::kPitch, right,
                                rest < 0 ? Tile::Outer::kPitch : Tile::kInnerPitch, acc);
    sum = {before.value[0] + acc[0], before.value[1] + acc[1], before.value[2] + acc[2], before.value[3] + acc[3]};
  }
}

// Stores the part of gnormal that comes from the block's pairs.
template <class Tile>
MIRAGE_DEVICE void store_grad_normal(const FeedForwardArguments& p, const FeedForwardWork& work,
                                     const float (&acc)[Tile::kChannels / 16][1][4]) {
  const int64_t plane = int64_t(p.height) * p.width, sample = int64_t(work.split) * p.batch + work.sample;
  const FragmentPixels<1> pixels(p.height, p.width, work);
  for_in_bounds(pixels, p.channels, p.partial + sample * p.channels * plane + corner_of(work, p.width, 1), plane,
                p.width, acc, [](float& element, float value) { element = value; });
}

// A block's walk through its range of the tiles, with its split of the pairs. If tiles do not divide evenly, the first
// ranges have one more.
template <int kRows>
struct FeedForwardWalk {
  FeedForwardWork at;
  int left;  // tiles left, the current one included
  bool is_first = true;

  MIRAGE_DEVICE FeedForwardWalk(const FeedForwardBackwardArguments& p, int range, int split, int chunks) {
    const int across = (p.width + 15) / 16, down = (p.height + kRows - 1) / kRows;
    const int each = p.tiles / p.ranges, more = p.tiles % p.ranges;
    const int begin = range * each + (range < more ? range : more);
    left = each + (range < more), at.split = split;
    at.first_chunk = chunks * split / p.splits, at.last_chunk = chunks * (split + 1) / p.splits;
    at.column = begin % across * 16, at.row = begin / across % down * kRows, at.sample = begin / across / down;
  }

  MIRAGE_DEVICE void next(const FeedForwardBackwardArguments& p) {
    --left, is_first = false, at.column += 16;
    if (at.column < p.width) return;
    at.column = 0, at.row += kRows;
    if (at.row < p.height) return;
    at.row = 0, ++at.sample;
  }
};

// Loads and normalises a tile, and copies the panels of its first chunk.
template <class Packed, class Tile>
MIRAGE_DEVICE void start_tile(const FeedForwardBackwardArguments& p, const Packed& packed, const FeedForwardWork& work,
                              Tile& tile) {
  using T = typename Tile::T;
  load_ring<typename Tile::Outer, Tile::kChannels>(p, work, static_cast<const T*>(p.x) + work.sample * p.s_batch,
                                                   p.s_channel, p.s_row, p.s_column, tile.normal);
  load_ring<typename Tile::Near, Tile::kChannels>(p, work, static_cast<const T*>(p.grad_y) + work.sample * p.g_batch,
                                                  p.g_channel, p.g_row, p.g_column, tile.grad_y);
  if (work.first_chunk < work.last_chunk) {
    const auto& panels = packed.chunks[work.first_chunk];
    copy_to_block<Tile::kThreads>(tile.panel_in, panels.in);
    copy_to_block<Tile::kThreads>(tile.panel_out, panels.out);
    copy_to_block<Tile::kThreads>(tile.taps, panels.taps);
  }
  store_places(p, work, tile);
  sync_block();
  normalise_window<typename Tile::Outer, Tile::kThreads>(p, packed, tile.normal);
  wait_for_copies();
  sync_block();
}

template <class Kind, int kChannelTiles, int kRows>
MIRAGE_KERNEL(64 * kRows, 1) feed_forward_backward_kernel(const FeedForwardBackwardArguments p) {
  using Tile = FeedForwardBackwardTile<Kind, kChannelTiles, kRows>;
  using T = typename Tile::T;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const auto& packed = *static_cast<const FeedForwardPacked<FeedForwardBackwardPanels<Kind, kChannelTiles>>*>(p.packed);
  const int range = int(block_index()) / p.splits, chunks = (p.pairs + 15) / 16;
  FeedForwardWalk<kRows> walk(p, range, int(block_index()) % p.splits, chunks);
  const FeedForwardWork& work = walk.at;
  for (; walk.left > 0; walk.next(p)) {
    sync_block();  // all threads have finished with the previous tile
    start_tile(p, packed, work, tile);
    float acc[kChannelTiles][1][4] = {};
    for (int chunk = work.first_chunk; chunk < work.last_chunk; ++chunk) {
      float* sums = p.sums + (int64_t(range) * chunks + chunk) * kFeedForwardSums<kChannelTiles>;
      recompute_project_in<Kind>(tile);
      project_out_backward<Kind>(tile);
      sync_block();  // gelu(h), its slope and gs are complete; the panels are free
      const bool more = chunk + 1 < work.last_chunk;
      const auto& next = packed.chunks[more ? chunk + 1 : chunk];
      copy_to_block<Tile::kThreads>(tile.panel_back(), packed.chunks[chunk].back);
      if (!Tile::kOnePanel && more) copy_to_block<Tile::kThreads>(tile.panel_in, next.in);
      if (more) copy_to_block<Tile::kThreads>(tile.panel_out, next.out);
      gate_pairs(p, work, walk.is_first, sums + 6 * kChannelTiles * 128, tile);
      wait_for_copies();
      sync_block();  // s and gd are complete; gelu(h) is free
      depthwise_gelu_backward(p, work, tile);
      sync_block();  // gh is complete; the taps are free
      if (more) copy_to_block<Tile::kThreads>(tile.taps, next.taps);
      const T* grad_hidden = tile.grad_hidden() + opaque(thread_index()) / kLanes * 8;
      multiply<2 * Tile::kPairs>(Kind(), tile.panel_back(), grad_hidden, Tile::kInnerPitch, acc);
      add_matrices<Kind, kChannelTiles>(walk.is_first, sums, tile);
      wait_for_copies();
      sync_block();  // gh has been read, and gelu(h) may overwrite it
      if (!Tile::kOnePanel || !more) continue;
      copy_to_block<Tile::kThreads>(tile.panel_in, next.in);
      wait_for_copies();
      sync_block();
    }
    store_grad_normal<Tile>(p, work, acc);
  }
}

}  // namespace mirage::cuda
