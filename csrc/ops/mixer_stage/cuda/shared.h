// What the three kernels of mixer_stage share. y = x + project_out(fuse(attention(n1), gated(n2), mlp(n3))), where n1
// to n3 are the thirds of layer_norm(x):
//
//   mixer_reduce    reads x: moments of each pixel, q k^T, |q|^2, |k|^2, mean and variance of n2. q and k stay on chip.
//   mixer_finalise  small: softmax of the attention, BatchNorm's statistics, the generated 7x7 kernels. It also packs
//                   the weights of mixer_fuse (pack.h).
//   mixer_fuse      reads x and writes y, one tile at a time. Nothing else of the size of a feature map exists.
#pragma once

#include "common/cuda/elementary.h"
#include "common/cuda/norm.h"
#include "common/cuda/gemm.h"
#include "common/cuda/tiles.h"
#include "mirage/mixer_stage.h"

namespace mirage::cuda {

constexpr int kMixerTaps = 49;

struct MixerArguments {
  const void* x;
  int64_t s_batch, s_channel, s_row, s_column;
  void* y;
  // The weights by name, all of one type.
#define MIRAGE_WEIGHT_POINTER(name, ...) const void* name;
  MIRAGE_MIXER_WEIGHTS(MIRAGE_WEIGHT_POINTER, MIRAGE_WEIGHT_POINTER, MIRAGE_WEIGHT_POINTER)
#undef MIRAGE_WEIGHT_POINTER
  bool float_weights;  // the weights are float, even if x is not
  const float* branch_scale;
  float eps, bn_eps;
  bool training;
  int batch, branch, heads, hidden, height, width;  // branch: channels of a branch, C / 3
  int parts;                                        // of a sample, in mixer_reduce
  NormMoments* moments;                             // [B, H W]: moments of the layer norm
  float* partial;                                   // [B, parts, partial_size()]
  float* packed;                                    // packed weights, see pack.h; aligned to 16 bytes
  float *attention, *kernels, *branch_mean, *batch_mean, *batch_var;  // MixerStatistics

  MIRAGE_ANYWHERE int depth() const { return branch / heads; }
  MIRAGE_ANYWHERE int64_t plane() const { return int64_t(height) * width; }

  // The results of a part: q k^T of each head [c, d]; |q|^2, |k|^2, mean of n2 and sum of its squared deviations, [c]
  // each; and the number of pixels.
  MIRAGE_ANYWHERE int squares_at() const { return branch * depth(); }
  MIRAGE_ANYWHERE int means_at() const { return squares_at() + 2 * branch; }
  MIRAGE_ANYWHERE int count_at() const { return means_at() + 2 * branch; }
  MIRAGE_ANYWHERE int partial_size() const { return count_at() + 1; }

  template <class W>
  MIRAGE_DEVICE static Weights<W> weights(const void* data) { return {static_cast<const W*>(data)}; }
};

MIRAGE_DEVICE bool is_in_bounds(const MixerArguments& p, int row, int column) {
  return is_in_bounds(p.height, p.width, row, column);
}

// Stores the first `count` (even) pixels of a run from (row, column) on, zero out of bounds.
template <class T, int kRun>
MIRAGE_DEVICE void store_in_bounds(const MixerArguments& p, int row, int column, const float (&value)[kRun], T* to,
                                   int count = kRun) {
#pragma unroll
  for (int j = 0; j < kRun; j += 2) {
    if (j >= count) continue;
    store_pair(to + j, is_in_bounds(p, row, column + j) ? value[j] : 0.0f,
               is_in_bounds(p, row, column + j + 1) ? value[j + 1] : 0.0f);
  }
}

// The tiles of an image.
template <int kRows>
struct Tiling {
  int across, of_sample;

  MIRAGE_ANYWHERE explicit Tiling(const MixerArguments& p)
      : across((p.width + 15) / 16), of_sample(across * ((p.height + kRows - 1) / kRows)) {}

  template <class Index>
  MIRAGE_DEVICE Corner corner(Index tile) const {
    const int i = int(tile % of_sample);
    return {int(tile / of_sample), i / across * kRows, i % across * 16};
  }
};

// The layer norm's moments of a window: in shared memory at pixel n, or in global memory at `offset` from those of the
// window's corner.
struct MomentsOfWindow {
  const NormMoments* data;
  MIRAGE_DEVICE NormMoments operator()(unsigned n, unsigned) const { return data[n]; }
};

struct MomentsOfPlane {
  const NormMoments* data;

  // `halo` is that of the window.
  MIRAGE_DEVICE MomentsOfPlane(const MixerArguments& p, const Corner& at, int halo)
      : data(opaque_global(p.moments + at.sample * p.plane() + corner_of(at, p.width, 1) -
                           halo * (int64_t(p.width) + 1))) {}
  MIRAGE_DEVICE NormMoments operator()(unsigned, unsigned offset) const { return load_constant(data + offset); }
};

// Loads third `third` of the normalised x in a window, each value replaced by change(channel)(value). Zero out of
// bounds, and for channels from c on to 16 kChannelTiles.
template <class T, class W, int kChannelTiles, class Window, class Moments, class Change>
MIRAGE_DEVICE void load_normal(const MixerArguments& p, const Corner& at, int third, const Weights<W>& weight,
                               const Weights<W>& bias, const Moments& moments, T* out, Change change) {
  constexpr int kHalo = (Window::kLine - Window::kColumns) / 2;
  const unsigned s_row = unsigned(p.s_row), s_column = unsigned(p.s_column), width = unsigned(p.width);
  const Corner first{at.sample, at.row - kHalo, at.column - kHalo};  // corner of the window
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch + int64_t(third) * p.branch * p.s_channel +
               corner_of(first, p.s_row, p.s_column);
  // Pixels out of bounds read the tile's corner, which is always in bounds, and are marked by a negative rstd.
  unsigned offset[Window::kGroups];
  NormMoments of[Window::kGroups];
  const unsigned thread = unsigned(opaque(thread_index())), lane = thread % kLanes;
#pragma unroll
  for (int j = 0; j < Window::kGroups; ++j) {
    const unsigned n = kLanes * j + lane, row = n / Window::kLine, column = n % Window::kLine;
    const bool in_bounds = n < Window::kPixels && is_in_bounds(p, first.row + int(row), first.column + int(column));
    offset[j] = in_bounds ? row * s_row + column * s_column : kHalo * (s_row + s_column);
    of[j] =
        moments(in_bounds ? n : kHalo * (Window::kLine + 1), in_bounds ? row * width + column : kHalo * (width + 1));
    if (!in_bounds) of[j].rstd = -1.0f;
  }
  for (int c = int(thread / kLanes); c < 16 * kChannelTiles; c += kTileWarps) {
    T* to = out + c * Window::kPitch + lane;
    if (c >= p.branch) {
#pragma unroll
      for (int j = 0; j < Window::kGroups; ++j) to[kLanes * j] = from_float<T>(0.0f);
      continue;
    }
    const float w = weight[third * p.branch + c], b = bias[third * p.branch + c];
    const auto changed = change(c);
    const T* channel = opaque_global(x + c * p.s_channel);
    T value[Window::kGroups];
#pragma unroll
    for (int j = 0; j < Window::kGroups; ++j) value[j] = load_constant(channel + offset[j]);
#pragma unroll
    for (int j = 0; j < Window::kGroups; ++j) {
      const float normal = changed(fmaf((to_float(value[j]) - of[j].mean) * of[j].rstd, w, b));
      to[kLanes * j] = from_float<T>(of[j].rstd < 0.0f ? 0.0f : normal);
    }
  }
}

// The identity, as a `change` of load_normal.
struct Unchanged {
  MIRAGE_DEVICE Unchanged operator()(int) const { return *this; }
  MIRAGE_DEVICE float operator()(float value) const { return value; }
};

// A thread's share of 16 channels over a tile (window Inner): one channel, and a run of pixels of a line.
template <class Inner>
struct TileRun {
  static constexpr int kRun = Inner::kPixels * 16 / kTileThreads, kOfLine = 16 / kRun;
  static constexpr int kOfChannel = Inner::kPixels / kRun;
  int channel, row, column;

  MIRAGE_DEVICE explicit TileRun(int thread)
      : channel(thread / kOfChannel), row(thread % kOfChannel / kOfLine), column(thread % kOfLine * kRun) {}

  // Its index among rows of the tile's pixels, and in a window with a halo around the tile.
  MIRAGE_DEVICE int place() const { return channel * Inner::kPitch + row * 16 + column; }
  template <class Window>
  MIRAGE_DEVICE int place_in() const {
    constexpr int kHalo = (Window::kLine - Window::kColumns) / 2;
    return channel * Window::kPitch + (row + kHalo) * Window::kLine + column + kHalo;
  }
};

// Copies the tile's own pixels out of the window Far, which has to be complete.
template <class Tile>
MIRAGE_DEVICE void copy_inner(const typename Tile::T* window, typename Tile::T* to) {
  using Far = typename Tile::Far;
  const typename Tile::Run run(opaque(thread_index()));
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const auto* from = window + first * Far::kPitch + run.template place_in<Far>();
    Packed<typename Tile::T, Tile::kRun> all;
#pragma unroll
    for (int j = 0; j < Tile::kRun; ++j) all.value[j] = from[j];
    *reinterpret_cast<decltype(all)*>(to + first * Tile::Inner::kPitch + run.place()) = all;
  }
}

// Stores the accumulators of a matrix product over a window with a halo of one as a tile of hidden channels.
template <class Window, int MT>
MIRAGE_DEVICE void store_lines(const float (&acc)[MT][Window::kTiles][4], float* hidden) {
  const int thread = opaque(thread_index());
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
