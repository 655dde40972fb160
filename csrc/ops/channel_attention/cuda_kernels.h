// Attention over channels: the passes over q and k, and the small d x d matrices of each head. A block holds all
// channels of a head in shared memory, as float, for 128 pixels at a time.
#pragma once

#include "common/cuda/gemm.h"
#include "common/cuda/sums.h"
#include "common/cuda/tensor_views.h"
#include "cuda_softmax.h"

namespace mirage::cuda {

struct AttentionArguments {
  MapView q, k, v, grad_out;       // [B, heads d, H, W]
  AnyVector temperature;              // [heads]
  float* matrices;                  // [B, heads, 2d + 2, d]: attn, q k^T, |q|, |k|
  float* partial;  // [B, heads, parts, d d + 2d]: parts of q k^T, |q|^2, |k|^2; or [.., d d]: of attn's gradient
  float* small;  // [B, heads, d + 2, d]: gradient of q k^T; the factors of q and of k in their own gradients
  float* grad_scale;                // [B, heads]: gradient of the temperature
  void *out, *grad_q, *grad_k, *grad_v;
  Pixels pixels;
  int batch, heads, d, parts;

  MIRAGE_ANYWHERE int channels() const { return heads * d; }
  MIRAGE_ANYWHERE int matrix() const { return d * d; }
};

constexpr int kAttentionThreads = 256, kAttentionWarps = kAttentionThreads / kLanes;
constexpr int kAttentionPixels = 4 * kLanes, kAttentionPitch = kAttentionPixels + 8;
constexpr int kAttentionTiles = kAttentionPixels / 8 / kAttentionWarps;  // MMA tiles of 8 pixels per warp

// kChannelTiles: channels of a head in sixteens.
template <int kChannelTiles>
struct HeadTile {
  static constexpr int kDepth = 16 * kChannelTiles;
  // left right^T consists of 16 x 8 items. If there are fewer of them than warps, several warps share an item, with a
  // share of the pixels each; if there are more, a warp has several.
  static constexpr int kItems = 2 * kChannelTiles * kChannelTiles,
                       kShares = kItems < kAttentionWarps ? kAttentionWarps / kItems : 1;
  static constexpr int kItemsOfWarp = (kItems * kShares + kAttentionWarps - 1) / kAttentionWarps;
  static constexpr int kShare = kAttentionPixels / kShares;

  alignas(16) float left[kDepth * kAttentionPitch];
  alignas(16) float right[kDepth * kAttentionPitch];
};

template <int kChannelTiles>
using HeadProducts = float[HeadTile<kChannelTiles>::kItemsOfWarp][4];

template <int kChannelTiles>
using HeadFragments = float[kChannelTiles][kAttentionTiles][4];

// The head of a block, and the runs of pixels that it computes.
struct HeadWork {
  int sample, head, first, last;
};

MIRAGE_DEVICE HeadWork head_work(const AttentionArguments& p) {
  const int64_t head = block_index() / p.parts, part = block_index() % p.parts;
  const int64_t runs = (p.pixels.count + kAttentionPixels - 1) / kAttentionPixels;
  return {int(head / p.heads), int(head % p.heads), int(runs * part / p.parts), int(runs * (part + 1) / p.parts)};
}

// Loads the channels of a head from pixel `first` on; zero beyond the last pixel and from channel d on.
template <class T, int kChannelTiles>
MIRAGE_DEVICE void load_head(const AttentionArguments& p, const MapView& map, const HeadWork& work, int first,
                             float* out) {
  for (int c = warp_index(); c < HeadTile<kChannelTiles>::kDepth; c += kAttentionWarps) {
    float value[4] = {};
    if (c < p.d) {
      const T* plane = map.plane<T>(work.sample, work.head * p.d + c);
      cuda::load_pixels<kLanes>(map, plane, p.pixels, first, lane_index(), value);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) out[c * kAttentionPitch + pixel_of<kLanes>(p.pixels, 0, lane_index(), j)] = value[j];
  }
}

template <class T>
MIRAGE_DEVICE void store_head(const AttentionArguments& p, const HeadWork& work, int first, const float* tile,
                              void* out) {
  for (int c = warp_index(); c < p.d; c += kAttentionWarps) {
    T* plane = static_cast<T*>(out) + (int64_t(work.sample) * p.channels() + work.head * p.d + c) * p.pixels.count;
    float value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = tile[c * kAttentionPitch + pixel_of<kLanes>(p.pixels, 0, lane_index(), j)];
    store_pixels<kLanes>(plane, p.pixels, first, lane_index(), value);
  }
}

// acc += left right^T over the pixels of a run.
template <class Kind, int kChannelTiles>
MIRAGE_DEVICE void add_products(int d, const HeadTile<kChannelTiles>& tile, HeadProducts<kChannelTiles>& acc) {
  using Tile = HeadTile<kChannelTiles>;
#pragma unroll
  for (int i = 0; i < Tile::kItemsOfWarp; ++i) {
    const int item = (kAttentionWarps * i + warp_index()) / Tile::kShares, share = warp_index() % Tile::kShares;
    const int row = item / (2 * kChannelTiles) * 16, column = item % (2 * kChannelTiles) * 8;
    if (row >= d || column >= d) continue;
    multiply_rows<Tile::kShare>(Kind(), tile.left + row * kAttentionPitch + share * Tile::kShare, kAttentionPitch,
                                tile.right + column * kAttentionPitch + share * Tile::kShare, kAttentionPitch, acc[i]);
  }
}

// Writes the accumulators to [d, d] in global memory. The tile is no longer needed: shares are added up in its place,
// in their order.
template <int kChannelTiles>
MIRAGE_DEVICE void store_products(int d, const HeadProducts<kChannelTiles>& acc, HeadTile<kChannelTiles>& tile,
                                  float* out) {
  using Tile = HeadTile<kChannelTiles>;
  const int g = lane_index() / 4, t = lane_index() % 4;
  float* buffer = tile.left;  // [kShares, kDepth, kDepth]
  static_assert(Tile::kShares * Tile::kDepth <= kAttentionPitch);
  sync_block();
#pragma unroll
  for (int i = 0; i < Tile::kItemsOfWarp; ++i) {
    const int item = (kAttentionWarps * i + warp_index()) / Tile::kShares, share = warp_index() % Tile::kShares;
    const int row = item / (2 * kChannelTiles) * 16 + g, column = item % (2 * kChannelTiles) * 8 + 2 * t;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      buffer[(share * Tile::kDepth + row + j / 2 * 8) * Tile::kDepth + column + j % 2] = acc[i][j];
  }
  sync_block();
  for (int i = thread_index(); i < d * d; i += kAttentionThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int share = 0; share < Tile::kShares; ++share) {
      sum += buffer[(share * Tile::kDepth + i / d) * Tile::kDepth + i % d];
    }
    out[i] = sum;
  }
}

// Writes a panel of a d x d matrix in global memory, or of its transpose.
template <class Kind, int kChannelTiles, bool kTransposed>
MIRAGE_DEVICE void store_square(const float* matrix, int d, float* panel) {
  store_panel<Kind, 16 * kChannelTiles, 16 * kChannelTiles, kAttentionThreads>(
      panel, [&](int row, int k, float(&pair)[2]) {
        pair[0] = row < d && k < d ? matrix[kTransposed ? k * d + row : row * d + k] : 0.0f;
      });
}

template <class Kind, int kChannelTiles>
MIRAGE_DEVICE void multiply_head(const float* panel, const float* pixels, HeadFragments<kChannelTiles>& acc) {
  multiply<16 * kChannelTiles>(Kind(), panel, pixels + 8 * kAttentionTiles * warp_index(), kAttentionPitch, acc);
}

// Replaces each value of the tile by change(row, value, accumulator).
template <int kChannelTiles, class Change>
MIRAGE_DEVICE void store_fragments(const HeadFragments<kChannelTiles>& acc, float* tile, Change change) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int m = 0; m < kChannelTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kAttentionTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = 16 * m + g + j / 2 * 8;
        float& value = tile[row * kAttentionPitch + 8 * (kAttentionTiles * warp_index() + n) + 2 * t + j % 2];
        value = change(row, value, acc[m][n][j]);
      }
    }
  }
}

// One block per head and part of its pixels: contributions to q k^T, |q|^2 and |k|^2.
template <class Kind, class T, int kChannelTiles>
MIRAGE_KERNEL(256) attention_gram_kernel(const AttentionArguments p) {
  using Tile = HeadTile<kChannelTiles>;
  constexpr int kRows = 2 * Tile::kDepth / kAttentionWarps;  // rows of q and k whose squares a warp adds up
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const HeadWork work = head_work(p);
  HeadProducts<kChannelTiles> acc = {};
  float squares[kRows] = {};
  for (int run = work.first; run < work.last; ++run) {
    load_head<T, kChannelTiles>(p, p.q, work, run * kAttentionPixels, tile.left);
    load_head<T, kChannelTiles>(p, p.k, work, run * kAttentionPixels, tile.right);
    sync_block();
    add_products<Kind>(p.d, tile, acc);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = kAttentionWarps * i + warp_index();
      const float* line = (row < Tile::kDepth ? tile.left : tile.right) + row % Tile::kDepth * kAttentionPitch;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        squares[i] = fmaf(line[kLanes * j + lane_index()], line[kLanes * j + lane_index()], squares[i]);
    }
    sync_block();
  }
  float* out = p.partial + block_index() * (p.matrix() + 2 * p.d);
  store_products(p.d, acc, tile, out);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = kAttentionWarps * i + warp_index(), c = row % Tile::kDepth;
    const float sum = warp_all_reduce_sum(squares[i]);
    if (lane_index() == 0 && c < p.d) out[p.matrix() + row / Tile::kDepth * p.d + c] = sum;
  }
}

// One block per head: adds up the parts of q k^T, and computes attn.
template <int kThreads>
MIRAGE_KERNEL(kThreads) attention_softmax_kernel(const AttentionArguments p) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int entries = p.matrix() + 2 * p.d;
  const int64_t head = block_index();
  float* out = p.matrices + head * (2 * p.d + 2) * p.d;
  sum_parts<kThreads>(p.partial + head * p.parts * entries, p.parts, entries, entries, sums + entries, sums);
  const float *norm_q = sums + p.matrix(), *norm_k = norm_q + p.d;
  for (int i = p.matrix() + thread_index(); i < entries; i += kThreads) sums[i] = sqrtf(sums[i]);
  sync_block();
  const float scale = p.temperature[int(head % p.heads)];
  for (int i = thread_index(); i < entries; i += kThreads) out[p.matrix() + i] = sums[i];
  sync_block();
  for (int i = warp_index(); i < p.d; i += kThreads / kLanes)
    softmax_row(sums + i * p.d, norm_q[i], norm_k, scale, p.d);
  sync_block();
  for (int i = thread_index(); i < p.matrix(); i += kThreads) out[i] = sums[i];
}

// One block per head: adds up the parts of attn's gradient, and computes the gradients of q k^T and of the temperature,
// and the factors of q and k in their own gradients.
template <int kThreads>
MIRAGE_KERNEL(kThreads) attention_softmax_backward_kernel(const AttentionArguments p) {
  float* grad = reinterpret_cast<float*>(shared_memory());  // [d, d], then the gradient of the scores times the cosines
  float* buffer = grad + p.matrix();
  const int64_t head = block_index();
  const float *attn = p.matrices + head * (2 * p.d + 2) * p.d, *gram = attn + p.matrix();
  const float *norm_q = gram + p.matrix(), *norm_k = norm_q + p.d;
  float *out = p.small + head * (p.d + 2) * p.d, *scale_q = out + p.matrix(), *scale_k = scale_q + p.d;
  sum_parts<kThreads>(p.partial + head * p.parts * p.matrix(), p.parts, p.matrix(), p.matrix(), buffer, grad);
  const float scale = p.temperature[int(head % p.heads)];
  float total = 0.0f;
  for (int i = thread_index(); i < p.d; i += kThreads) {
    const float inverse_q = 1.0f / floored(norm_q[i]);
    float along = 0.0f, centre = 0.0f, grad_row = 0.0f;
    for (int j = 0; j < p.d; ++j) {
      const int at = i * p.d + j;
      along = fmaf(grad[at], attn[at], along);
      centre = fmaf(gram[at] * (inverse_q / floored(norm_k[j])), attn[at], centre);
    }
    // The gradients of a row's scores add up to zero. Their sum with the cosines is therefore that with centred
    // cosines, which is not sensitive to the rounding of `along`.
    for (int j = 0; j < p.d; ++j) {
      const int at = i * p.d + j;
      const float grad_score = attn[at] * (grad[at] - along), inverse = inverse_q / floored(norm_k[j]);
      const float cosine = gram[at] * inverse;
      out[at] = grad_score * inverse * scale;
      grad[at] = grad_score * cosine;
      grad_row = fmaf(grad_score, cosine - centre, grad_row);
    }
    // Below the floor q is divided by a constant, so its norm has no gradient.
    scale_q[i] = norm_q[i] < kNormFloor ? 0.0f : -scale * grad_row * inverse_q * inverse_q;
    total += grad_row;
  }
  total = block_all_reduce_sum<kThreads>(total, buffer);
  if (thread_index() == 0) p.grad_scale[head] = total;
  for (int j = thread_index(); j < p.d; j += kThreads) {
    float grad_column = 0.0f;
    for (int i = 0; i < p.d; ++i) grad_column += grad[i * p.d + j];
    const float inverse_k = 1.0f / floored(norm_k[j]);
    scale_k[j] = norm_k[j] < kNormFloor ? 0.0f : -scale * grad_column * inverse_k * inverse_k;
  }
}

// One block per head and run of pixels: the gradients of q and k. `parts` is the number of runs.
template <class Kind, class T, int kChannelTiles>
MIRAGE_KERNEL(256) attention_inputs_kernel(const AttentionArguments p) {
  using Tile = HeadTile<kChannelTiles>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  float* panel_q = reinterpret_cast<float*>(shared_memory() + sizeof(Tile));
  float* panel_k = panel_q + Tile::kDepth * Tile::kDepth;
  const HeadWork work = head_work(p);
  const int first = work.first * kAttentionPixels;
  const float *grad_gram = p.small + block_index() / p.parts * (p.d + 2) * p.d, *scale = grad_gram + p.matrix();
  load_head<T, kChannelTiles>(p, p.q, work, first, tile.left);
  load_head<T, kChannelTiles>(p, p.k, work, first, tile.right);
  store_square<Kind, kChannelTiles, false>(grad_gram, p.d, panel_q);
  store_square<Kind, kChannelTiles, true>(grad_gram, p.d, panel_k);
  sync_block();
  HeadFragments<kChannelTiles> grad_q = {}, grad_k = {};
  multiply_head<Kind, kChannelTiles>(panel_q, tile.right, grad_q);
  multiply_head<Kind, kChannelTiles>(panel_k, tile.left, grad_k);
  sync_block();
  const auto scaled = [&](int which) {
    return
        [=](int row, float value, float sum) { return row < p.d ? fmaf(value, scale[which * p.d + row], sum) : 0.0f; };
  };
  store_fragments<kChannelTiles>(grad_q, tile.left, scaled(0));
  store_fragments<kChannelTiles>(grad_k, tile.right, scaled(1));
  sync_block();
  store_head<T>(p, work, first, tile.left, p.grad_q);
  store_head<T>(p, work, first, tile.right, p.grad_k);
}

}  // namespace mirage::cuda
