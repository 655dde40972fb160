// Attention over channels: the pass over v, with or without the fusion of the branches.
#pragma once

#include "cuda_kernels.h"
#include "ops/tri_branch_fusion/cuda_kernels.h"

namespace mirage::cuda {

template <int kChannelTiles>
struct ApplyTile {
  static constexpr int kDepth = 16 * kChannelTiles;
  HeadTile<kChannelTiles> head;
  alignas(16) float attn[kDepth * kDepth];
};

template <int kChannelTiles>
struct ApplyBackwardTile : ApplyTile<kChannelTiles> {
  alignas(16) float transposed[16 * kChannelTiles * 16 * kChannelTiles];
  float buffer[kAttentionWarps];
};

MIRAGE_DEVICE const float* attn_of(const AttentionArguments& p) {
  return p.matrices + block_index() / p.parts * (2 * p.d + 2) * p.d;
}

struct Replace {
  MIRAGE_DEVICE float operator()(int, float, float sum) const { return sum; }
};

// Replaces `out` by attn v for a run of pixels. v is in tile.head.right, which may be `out`.
template <class Kind, int kChannelTiles, class Tile>
MIRAGE_DEVICE void apply_attention(Tile& tile, float* out) {
  HeadFragments<kChannelTiles> acc = {};
  multiply_head<Kind, kChannelTiles>(tile.attn, tile.head.right, acc);
  sync_block();
  store_fragments<kChannelTiles>(acc, out, Replace());
  sync_block();
}

// One block per head and run of pixels. `parts` is the number of runs.
template <class Kind, class T, int kChannelTiles>
MIRAGE_KERNEL(256) attention_apply_kernel(const AttentionArguments p) {
  auto& tile = *reinterpret_cast<ApplyTile<kChannelTiles>*>(shared_memory());
  const HeadWork work = head_work(p);
  const int first = work.first * kAttentionPixels;
  load_head<T, kChannelTiles>(p, p.v, work, first, tile.head.right);
  store_square<Kind, kChannelTiles, false>(attn_of(p), p.d, tile.attn);
  sync_block();
  apply_attention<Kind, kChannelTiles>(tile, tile.head.right);
  store_head<T>(p, work, first, tile.head.right, p.out);
}

// The plane of `out` for channel c of a head in branch `which`.
MIRAGE_DEVICE int64_t fused_plane(const AttentionArguments& p, const HeadWork& work, int c, int which) {
  return (int64_t(work.sample) * 3 + which) * p.channels() + work.head * p.d + c;
}

// Loads the inputs of the fusion for a channel: the attention's output from `tile`, the other branches from memory.
template <class T>
MIRAGE_DEVICE void load_branches(const AttentionArguments& p, const FusionArguments& f, const HeadWork& work, int first,
                                 int c, const float* tile, float (&value)[3][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) value[0][j] = tile[c * kAttentionPitch + pixel_of<kLanes>(p.pixels, 0, lane_index(), j)];
#pragma unroll
  for (int i = 1; i < 3; ++i) {
    const T* plane = f.branch[i].plane<T>(work.sample, work.head * p.d + c);
    load_pixels<kLanes>(f.branch[i], plane, p.pixels, first, lane_index(), value[i]);
  }
}

// The same followed by the fusion of the branches. O: the dtype of out.
template <class Kind, class T, class O, int kChannelTiles>
MIRAGE_KERNEL(256) attention_fuse_kernel(const AttentionArguments p, const FusionArguments f) {
  auto& tile = *reinterpret_cast<ApplyTile<kChannelTiles>*>(shared_memory());
  const HeadWork work = head_work(p);
  const int first = work.first * kAttentionPixels;
  load_head<T, kChannelTiles>(p, p.v, work, first, tile.head.right);
  store_square<Kind, kChannelTiles, false>(attn_of(p), p.d, tile.attn);
  const FusionWeights weight = weights_of(f);
  sync_block();
  apply_attention<Kind, kChannelTiles>(tile, tile.head.right);
  for (int c = warp_index(); c < p.d; c += kAttentionWarps) {
    float value[3][4];
    load_branches<T>(p, f, work, first, c, tile.head.right, value);
    fuse_pixels(weight, value);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      O* out = static_cast<O*>(f.out) + fused_plane(p, work, c, i) * p.pixels.count;
      store_pixels<kLanes>(out, p.pixels, first, lane_index(), value[i]);
    }
  }
}

// Expects the gradient of the attention's output in tile.head.left and v in tile.head.right. Adds the run's
// contribution to the gradient of attn to `acc`, and writes the gradient of v.
template <class Kind, class T, int kChannelTiles, class Tile>
MIRAGE_DEVICE void apply_attention_backward(const AttentionArguments& p, const HeadWork& work, int first, Tile& tile,
                                            HeadProducts<kChannelTiles>& acc) {
  add_products<Kind>(p.d, tile.head, acc);
  HeadFragments<kChannelTiles> grad_v = {};
  multiply_head<Kind, kChannelTiles>(tile.transposed, tile.head.left, grad_v);
  sync_block();
  store_fragments<kChannelTiles>(grad_v, tile.head.right, Replace());
  sync_block();
  store_head<T>(p, work, first, tile.head.right, p.grad_v);
  sync_block();
}

// One block per head and part of its pixels: the gradient of v, and the part's contribution to that of attn.
template <class Kind, class T, int kChannelTiles>
MIRAGE_KERNEL(256) attention_apply_backward_kernel(const AttentionArguments p) {
  auto& tile = *reinterpret_cast<ApplyBackwardTile<kChannelTiles>*>(shared_memory());
  const HeadWork work = head_work(p);
  store_square<Kind, kChannelTiles, true>(attn_of(p), p.d, tile.transposed);
  HeadProducts<kChannelTiles> acc = {};
  for (int run = work.first; run < work.last; ++run) {
    const int first = run * kAttentionPixels;
    load_head<T, kChannelTiles>(p, p.grad_out, work, first, tile.head.left);
    load_head<T, kChannelTiles>(p, p.v, work, first, tile.head.right);
    sync_block();
    apply_attention_backward<Kind, T, kChannelTiles>(p, work, first, tile, acc);
  }
  store_products(p.d, acc, tile.head, p.partial + block_index() * p.matrix());
}

// Backward of the fusion. Replaces the attention's output in tile.head.left by its gradient, writes the gradients of
// the other two branches, and adds those of the weights to `sum`.
template <class T, class O, class Tile>
MIRAGE_DEVICE void fuse_backward(const AttentionArguments& p, const FusionArguments& f, const HeadWork& work, int first,
                                 const FusionWeights& weight, Tile& tile, float (&sum)[3]) {
  for (int c = warp_index(); c < p.d; c += kAttentionWarps) {
    float value[3][4], grad[3][4];
    load_branches<T>(p, f, work, first, c, tile.head.left, value);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const O* plane = f.grad_out.plane<O>(work.sample, int64_t(i) * p.channels() + work.head * p.d + c);
      load_pixels<kLanes>(f.grad_out, plane, p.pixels, first, lane_index(), grad[i]);
    }
    fuse_pixels_backward(weight, value, grad, sum);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      tile.head.left[c * kAttentionPitch + pixel_of<kLanes>(p.pixels, 0, lane_index(), j)] = grad[0][j];
    }
#pragma unroll
    for (int i = 1; i < 3; ++i) {
      T* out = static_cast<T*>(f.grad_branch[i]) +
               (int64_t(work.sample) * p.channels() + work.head * p.d + c) * p.pixels.count;
      store_pixels<kLanes>(out, p.pixels, first, lane_index(), grad[i]);
    }
  }
}

// The same with the fusion's backward. Why two blocks per SM: see mixer_finalise_kernel.
template <class Kind, class T, class O, int kChannelTiles>
MIRAGE_KERNEL(256, 2) attention_fuse_backward_kernel(const AttentionArguments p, const FusionArguments f) {
  auto& tile = *reinterpret_cast<ApplyBackwardTile<kChannelTiles>*>(shared_memory());
  const HeadWork work = head_work(p);
  store_square<Kind, kChannelTiles, false>(attn_of(p), p.d, tile.attn);
  store_square<Kind, kChannelTiles, true>(attn_of(p), p.d, tile.transposed);
  const FusionWeights weight = weights_of(f);
  HeadProducts<kChannelTiles> acc = {};
  float sum[3] = {};
  for (int run = work.first; run < work.last; ++run) {
    const int first = run * kAttentionPixels;
    load_head<T, kChannelTiles>(p, p.v, work, first, tile.head.right);
    sync_block();
    apply_attention<Kind, kChannelTiles>(tile, tile.head.left);
    fuse_backward<T, O>(p, f, work, first, weight, tile, sum);
    sync_block();
    apply_attention_backward<Kind, T, kChannelTiles>(p, work, first, tile, acc);
  }
  store_products(p.d, acc, tile.head, p.partial + block_index() * p.matrix());
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const float total = block_all_reduce_sum<kAttentionThreads>(sum[i], tile.buffer);
    if (thread_index() == 0) f.partial[3 * block_index() + i] = total;
  }
}

}  // namespace mirage::cuda
