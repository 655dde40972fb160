// The fusion of three branches, pixel by pixel, and the kernels of tri_branch_fusion.
#pragma once

#include "common/cuda/elementary.h"
#include "common/cuda/sums.h"
#include "common/cuda/tensor_views.h"

namespace mirage::cuda {

struct FusionArguments {
  MapView branch[3];   // att, conv, mlp [B, C, H, W]
  AnyVector weight[3];    // modulation weights, [1] each
  void* out;            // [B, 3C, H, W]
  MapView grad_out;    // of the same shape
  void* grad_branch[3];
  float* partial;       // [parts, 3]: contributions to the gradients of the weights
  Pixels pixels;
  int channels;
  int64_t planes;       // planes of a branch
  int parts;
};

struct FusionWeights {
  float value[3];
};

MIRAGE_DEVICE FusionWeights weights_of(const FusionArguments& p) {
  return {{p.weight[0][0], p.weight[1][0], p.weight[2][0]}};
}

MIRAGE_DEVICE void fuse_branches(const FusionWeights& weight, float (&x)[3]) {
  const float a = x[0], b = x[1], c = x[2];
  x[0] = fmaf(weight.value[0], sigmoid(b + c), a);
  x[1] = fmaf(weight.value[1], sigmoid(a + c), b);
  x[2] = fmaf(weight.value[2], sigmoid(a + b), c);
}

// Backward of fuse_branches at the branches x. `grad` goes from the gradients of its results to those of x; the
// gradients of the weights are added to `sum`.
MIRAGE_DEVICE void fuse_branches_backward(const FusionWeights& weight, const float (&x)[3], float (&grad)[3],
                                          float (&sum)[3]) {
  const float total[3] = {x[1] + x[2], x[0] + x[2], x[0] + x[1]};
  float through[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const float s = sigmoid(total[i]);
    sum[i] = fmaf(grad[i], s, sum[i]);
    through[i] = grad[i] * weight.value[i] * fmaf(-s, s, s);
  }
  grad[0] += through[1] + through[2];
  grad[1] += through[0] + through[2];
  grad[2] += through[0] + through[1];
}

// The same for four pixels.
MIRAGE_DEVICE void fuse_pixels(const FusionWeights& weight, float (&value)[3][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float x[3] = {value[0][j], value[1][j], value[2][j]};
    fuse_branches(weight, x);
    value[0][j] = x[0], value[1][j] = x[1], value[2][j] = x[2];
  }
}

MIRAGE_DEVICE void fuse_pixels_backward(const FusionWeights& weight, const float (&value)[3][4], float (&grad)[3][4],
                                        float (&sum)[3]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float x[3] = {value[0][j], value[1][j], value[2][j]};
    float g[3] = {grad[0][j], grad[1][j], grad[2][j]};
    fuse_branches_backward(weight, x, g, sum);
    grad[0][j] = g[0], grad[1][j] = g[1], grad[2][j] = g[2];
  }
}

constexpr int kFusionThreads = 256, kFusionRun = 4 * kFusionThreads;  // pixels per block and iteration

MIRAGE_ANYWHERE int fusion_runs(const FusionArguments& p) { return (p.pixels.count + kFusionRun - 1) / kFusionRun; }

// Loads a run of pixels of a plane of each branch.
template <class T>
MIRAGE_DEVICE void load_branches(const FusionArguments& p, int64_t plane, int first, float (&value)[3][4]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const T* x = p.branch[i].plane<T>(plane / p.channels, plane % p.channels);
    load_pixels<kFusionThreads>(p.branch[i], x, p.pixels, first, thread_index(), value[i]);
  }
}

// The plane of out [B, 3C, H, W] for branch `which` of a plane of [B, C, H, W].
MIRAGE_DEVICE int64_t fused_plane(const FusionArguments& p, int64_t plane, int which) {
  return (plane / p.channels * 3 + which) * p.channels + plane % p.channels;
}

// One block per run of pixels of a plane. O: the dtype of out.
template <class T, class O>
MIRAGE_KERNEL(256) tri_branch_fusion_kernel(const FusionArguments p) {
  const int runs = fusion_runs(p), first = int(block_index() % runs) * kFusionRun;
  const int64_t plane = block_index() / runs;
  const FusionWeights weight = weights_of(p);
  float value[3][4];
  load_branches<T>(p, plane, first, value);
  fuse_pixels(weight, value);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    O* out = static_cast<O*>(p.out) + fused_plane(p, plane, i) * p.pixels.count;
    store_pixels<kFusionThreads>(out, p.pixels, first, thread_index(), value[i]);
  }
}

// One block per part of all runs.
template <class T, class O>
MIRAGE_KERNEL(256) tri_branch_fusion_backward_kernel(const FusionArguments p) {
  float* buffer = reinterpret_cast<float*>(shared_memory());
  const int runs = fusion_runs(p);
  const int64_t part = block_index(), all = p.planes * runs;
  const FusionWeights weight = weights_of(p);
  float sum[3] = {};
  for (int64_t run = all * part / p.parts; run < all * (part + 1) / p.parts; ++run) {
    const int64_t plane = run / runs;
    const int first = int(run % runs) * kFusionRun;
    float value[3][4], grad[3][4];
    load_branches<T>(p, plane, first, value);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int64_t sample = plane / p.channels;
      const O* of_out = p.grad_out.plane<O>(sample, fused_plane(p, plane, i) - sample * 3 * p.channels);
      load_pixels<kFusionThreads>(p.grad_out, of_out, p.pixels, first, thread_index(), grad[i]);
    }
    fuse_pixels_backward(weight, value, grad, sum);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      T* out = static_cast<T*>(p.grad_branch[i]) + plane * p.pixels.count;
      store_pixels<kFusionThreads>(out, p.pixels, first, thread_index(), grad[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const float total = block_all_reduce_sum<kFusionThreads>(sum[i], buffer);
    if (thread_index() == 0) p.partial[3 * part + i] = total;
  }
}

}  // namespace mirage::cuda
