// The last kernel of feed_forward_stage's backward: adds up the weight gradients that the blocks have left. It is no
// template, so only one source file may include this.
#pragma once

#include "norm_gradient.h"

namespace mirage::cuda {

// Where element i of a block's sums (kFeedForwardSums) belongs in the gradients, or null if that pair or channel does
// not exist.
MIRAGE_DEVICE float* place_of_sum(const FeedForwardBackwardArguments& p, int64_t i, int size) {
  const int first = int(i / size) * 16, fragments = 6 * p.channel_tiles;
  int rest = int(i % size);
  if (rest >= 128 * fragments) {
    rest -= 128 * fragments;
    const int pair = first + rest / 18, t = rest % 18;
    return pair < p.pairs ? p.grad_dwconv + (int64_t(t / 9) * p.pairs + pair) * 9 + t % 9 : nullptr;
  }
  const int fragment = rest / 128, lane = rest % 128 / 4, part = rest % 4;
  const int row = lane / 4 + 8 * (part / 2), column = 2 * (lane % 4) + part % 2, out = fragment - 4 * p.channel_tiles;
  const int pair = first + (out < 0 ? row : out % 2 * 8 + column);
  const int c = out < 0 ? fragment / 2 * 8 + column : out / 2 * 16 + row;
  if (pair >= p.pairs || c >= p.channels) return nullptr;
  if (out >= 0) return p.grad_project_out + int64_t(c) * p.pairs + pair;
  return p.grad_project_in + (int64_t(fragment % 2) * p.pairs + pair) * p.channels + c;
}

// Each block adds up 32 elements over all blocks of the previous kernels, each warp every eighth of them. The first
// blocks have the elements of the matrices and taps, `size` for each of `chunks`; the rest have those of the layer
// norm.
MIRAGE_KERNEL(256) feed_forward_weights_kernel(const FeedForwardBackwardArguments p, const int64_t chunks,
                                               const int size) {
  float* memory = reinterpret_cast<float*>(shared_memory());  // [warps, lanes]
  const int64_t matrices = (chunks * size + kLanes - 1) / kLanes;
  const bool is_norm = block_index() >= matrices;
  const int64_t i = (block_index() - (is_norm ? matrices : 0)) * kLanes + lane_index();
  const int64_t count = is_norm ? 2 * p.channels : chunks * size;
  const float* from = is_norm ? p.norm_sums : p.sums;
  const int parts = i < count ? (is_norm ? p.groups : p.ranges) : 0;
  float sum = 0.0f;
  for (int part = warp_index(); part < parts; part += kTileWarps) sum += from[part * count + i];
  sum = sum_over_warps(sum, kTileWarps, memory);
  if (warp_index() != 0 || i >= count) return;
  float* to = nullptr;
  if (!is_norm) to = place_of_sum(p, i, size);
  else to = i < p.channels ? p.grad_norm_weight + i : p.grad_norm_bias + (i - p.channels);
  if (to) *to = sum;
}

}  // namespace mirage::cuda
