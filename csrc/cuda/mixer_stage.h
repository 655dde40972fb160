// What the three kernels of mixer_stage share. y = x + project_out(fuse(attention(n1), gated(n2), mlp(n3))), n1 to n3 thirds of
// layer_norm(x):
//
//   mixer_reduce    reads x: moments of each pixel, q k^T, |q|^2, |k|^2, mean and variance of n2. q and k stay on chip.
//   mixer_finalise  small: softmax of the attention, BatchNorm's statistics, the generated 7x7 kernels; and it packs the
//                   weights of mixer_fuse (mixer_pack.h).
//   mixer_fuse      reads x and writes y, a tile at a time; nothing else of the size of a feature map exists.
#pragma once

#include "elementary.h"
#include "products.h"
#include "tiles.h"

namespace mirage::cuda {

constexpr int kMixerTaps = 49;

struct MixerArguments {
  const void* x;
  int64_t s_batch, s_channel, s_row, s_column;
  void* y;
  // The order of MixerWeights in mirage/mixer_stage.h. All of one type.
  const void *norm_weight, *norm_bias, *qkv, *qkv_dwconv, *temperature, *bn_weight, *bn_bias, *bn_mean, *bn_var, *gic1,
      *generator_in, *generator_out, *gate_temperature, *gic2, *proj_out, *mlp_in, *mlp_out, *alpha_att, *alpha_conv,
      *alpha_mlp, *project_out;
  bool wide;  // the weights are float, whatever x is
  const float* branch_scale;
  float eps, bn_eps;
  bool training;
  int batch, branch, heads, hidden, height, width;  // branch: C / 3
  int parts;                                        // of a sample, in mixer_reduce
  float* moments;                                   // [B, 2, H W]: mean and reciprocal deviation
  float* partial;                                   // [B, parts, partial_size()]
  float* packed;                                    // see mixer_pack.h; aligned to 16 bytes
  float *attention, *kernels, *branch_mean, *batch_mean, *batch_var;  // MixerStatistics

  MIRAGE_ANYWHERE int depth() const { return branch / heads; }
  MIRAGE_ANYWHERE int64_t plane() const { return int64_t(height) * width; }

  // What a part leaves: q k^T of each head [c, d], |q|^2, |k|^2, mean of n2 and sum of its squared deviations, [c] each, and
  // how many pixels they are of.
  MIRAGE_ANYWHERE int squares_at() const { return branch * depth(); }
  MIRAGE_ANYWHERE int means_at() const { return squares_at() + 2 * branch; }
  MIRAGE_ANYWHERE int count_at() const { return means_at() + 2 * branch; }
  MIRAGE_ANYWHERE int partial_size() const { return count_at() + 1; }

  template <class W>
  MIRAGE_DEVICE static Weights<W> weights(const void* data) { return {static_cast<const W*>(data)}; }
};

MIRAGE_DEVICE bool inside(const MixerArguments& p, int row, int column) {
  return row >= 0 && row < p.height && column >= 0 && column < p.width;
}

// Where the tiles of an image are.
template <int kRows>
struct Tiling {
  int across, of_sample;

  MIRAGE_ANYWHERE explicit Tiling(const MixerArguments& p)
      : across((p.width + 15) / 16), of_sample(across * ((p.height + kRows - 1) / kRows)) {}

  MIRAGE_DEVICE Corner corner(int64_t tile) const {
    const int i = int(tile % of_sample);
    return {int(tile / of_sample), i / across * kRows, i % across * 16};
  }
};

// Where the moments of the layer norm are: in shared memory for the pixels of a window, or in global memory for all.
struct MomentsOfWindow {
  const float *mean, *rstd;
  MIRAGE_DEVICE float mean_of(int n, int64_t) const { return mean[n]; }
  MIRAGE_DEVICE float rstd_of(int n, int64_t) const { return rstd[n]; }
};

struct MomentsOfPlane {
  const float* data;
  int64_t plane;
  MIRAGE_DEVICE float mean_of(int, int64_t pixel) const { return data[pixel]; }
  MIRAGE_DEVICE float rstd_of(int, int64_t pixel) const { return data[plane + pixel]; }
};

// Third `third` of the normalised x in a window, `change`d; zero outside the image, and channels from c on to 16 kBlocks.
template <class T, class W, int kBlocks, class Window, class Moments, class Change>
MIRAGE_DEVICE void load_normal(const MixerArguments& p, const Corner& at, int third, const Weights<W>& weight,
                               const Weights<W>& bias, const Moments& moments, T* out, Change change) {
  constexpr int kMargin = (Window::kLine - Window::kColumns) / 2;
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch + int64_t(third) * p.branch * p.s_channel;
  int64_t offset[Window::kGroups];
  float mean[Window::kGroups], rstd[Window::kGroups];
  uint32_t within = 0;
  const int thread = renewed(thread_index()), lane = thread % kLanes;
#pragma unroll
  for (int j = 0; j < Window::kGroups; ++j) {
    const int n = kLanes * j + lane;
    const int row = at.row + n / Window::kLine - kMargin, column = at.column + n % Window::kLine - kMargin;
    const bool known = n < Window::kPixels && inside(p, row, column);
    const int64_t pixel = int64_t(row) * p.width + column;
    within |= uint32_t(known) << j;
    offset[j] = row * p.s_row + column * p.s_column;
    mean[j] = known ? moments.mean_of(n, pixel) : 0.0f;
    rstd[j] = known ? moments.rstd_of(n, pixel) : 0.0f;
  }
  for (int c = thread / kLanes; c < 16 * kBlocks; c += kTileWarps) {
    const bool exists = c < p.branch;
    const float w = exists ? weight[third * p.branch + c] : 0.0f, b = exists ? bias[third * p.branch + c] : 0.0f;
#pragma unroll
    for (int j = 0; j < Window::kGroups; ++j) {
      const bool known = exists && (within >> j & 1);
      const float value = known ? to_float(x[c * p.s_channel + offset[j]]) : 0.0f;
      const float normal = fmaf((value - mean[j]) * rstd[j], w, b);
      out[c * Window::kPitch + kLanes * j + lane] = from_float<T>(known ? change(c, normal) : 0.0f);
    }
  }
}

// Fragments of a product over a window with a margin of 1, to a hidden tile.
template <class Window, int MT>
MIRAGE_DEVICE void store_lines(const float (&acc)[MT][Window::kTiles][4], float* hidden) {
  const int thread = renewed(thread_index());
  const int g = thread % kLanes / 4, t = thread % 4;
#pragma unroll
  for (int n = 0; n < Window::kTiles; ++n) {
    const int pixel = 8 * (thread / kLanes * Window::kTiles + n) + 2 * t;
    if (pixel >= Window::kPixels) continue;
    const int place = hidden_place<Window>(pixel);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      const int row = 16 * (i / 2) + g + 8 * (i % 2);
      store_pair(hidden + row * Window::kHiddenPitch + place, acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]);
    }
  }
}

}  // namespace mirage::cuda
