// The third kernel of mixer_stage: all three branches, their fusion and project_out, one tile of the image per block.
// Matrices arrive in the steps of pack.h, each while the previous one is multiplied.
#pragma once

#include "pack.h"

namespace mirage::cuda {

template <class Kind, int kChannelTiles, int kRows>
struct MixerFuseTile {
  using T = typename Kind::Element;
  using Far = Window<kRows, 3>;
  using Near = Window<kRows, 1>;
  using Inner = Window<kRows, 0>;
  using Run = TileRun<Inner>;
  static constexpr int kBranch = 16 * kChannelTiles, kHiddenPitch = Near::kHiddenPitch;
  static constexpr int kRun = Run::kRun;

  static constexpr int largest(int a, int b) { return a > b ? a : b; }
  static constexpr int kWindows = kBranch * (Far::kPitch + Near::kPitch), kFused = 3 * kBranch * Inner::kPitch;
  using Forward = MixerForwardSteps<T, kChannelTiles>;
  using Stream = PanelStream<T, kChannelTiles, Forward>;
  static constexpr int kPanel = 16 * kBranch;

  // First the windows of detail and n1, at last the fused branches.
  alignas(16) T large[largest(kWindows, kFused)];
  alignas(16) T scaled[kBranch * Inner::kPitch];  // BatchNorm of n2, later the input of proj_out
  alignas(16) T other[kBranch * Inner::kPitch];   // v, later n3
  union {
    alignas(16) float lines[16 * kHiddenPitch];  // hidden channels from which v is computed
    alignas(16) T chunk[16 * Inner::kPitch];     // later the input of a step's second matrix product
  };
  alignas(16) T steps[2][Stream::kStep];
  alignas(16) float kernels[16 * kMixerKernel];  // of the channels of a step

  MIRAGE_DEVICE T* detail() { return large; }
  MIRAGE_DEVICE T* normal() { return large + kBranch * Far::kPitch; }
  MIRAGE_DEVICE T* values() { return other; }
  MIRAGE_DEVICE T* third() { return other; }
  MIRAGE_DEVICE float* hidden() { return lines; }
};

template <class Tile>
using MixerFragments = float[Tile::kBranch / 16][Tile::Inner::kTiles][4];

// Stores accumulators as rows of pixels.
template <class Tile, int MT>
MIRAGE_DEVICE void store_fragments(const float (&acc)[MT][Tile::Inner::kTiles][4], typename Tile::T* out) {
  const int thread = opaque(thread_index());
  const int g = thread % kLanes / 4, t = thread % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::Inner::kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + g, pixel = 8 * (thread / kLanes * Tile::Inner::kTiles + n) + 2 * t;
        store_pair(out + row * Tile::Inner::kPitch + pixel, acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    }
  }
}

// acc += panel times `pixels`, which has kDepth channels of the tile's pixels.
template <class Kind, int kDepth, class Tile, int MT>
MIRAGE_DEVICE void multiply_inner(const typename Tile::T* panel, const typename Tile::T* pixels,
                                  float (&acc)[MT][Tile::Inner::kTiles][4]) {
  multiply<kDepth>(Kind(), panel, pixels + 8 * Tile::Inner::kTiles * warp_index(), Tile::Inner::kPitch, acc);
}

// acc += the matrix product with all channels at `pixels`, one step per 16 channels. Starts with a barrier.
// `following`: the elements that will be needed of the next step after these.
template <class Kind, class Tile, int MT>
MIRAGE_DEVICE void multiply_steps(typename Tile::Stream& stream, const typename Tile::T* pixels, int following,
                                  float (&acc)[MT][Tile::Inner::kTiles][4]) {
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const auto* panel = stream.next(first + 16 < Tile::kBranch ? Tile::kPanel : following);
    multiply_inner<Kind, 16, Tile>(panel, pixels + first * Tile::Inner::kPitch, acc);
  }
}

// The attention branch: attention times v; v is computed from n1 and its depthwise convolution.
template <class Kind, class Tile>
MIRAGE_DEVICE void attention_branch(typename Tile::Stream& stream, Tile& tile, MixerFragments<Tile>& acc) {
  const int thread = opaque(thread_index());
  using Near = typename Tile::Near;
  const typename Tile::Run run(thread);
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const auto* panel = stream.next(Tile::Forward::kFirst);  // the previous hidden channels have been read
    float fragments[1][Near::kTiles][4] = {};
    multiply<Tile::kBranch>(Kind(), panel, tile.normal() + 8 * Near::kTiles * (thread / kLanes), Near::kPitch,
                            fragments);
    store_lines<Near>(fragments, tile.hidden());
    sync_block();
    float taps[9], sum[Tile::kRun] = {};
    read_taps(reinterpret_cast<const float*>(panel + Tile::kPanel) + 12 * run.channel, taps);
    convolve_run(tile.hidden() + run.channel * Tile::kHiddenPitch + run.row * kHiddenLine + run.column, taps, sum);
    auto* out = tile.values() + first * Tile::Inner::kPitch + run.place();
#pragma unroll
    for (int j = 0; j < Tile::kRun; j += 2) store_pair(out + j, sum[j], sum[j + 1]);
  }
  multiply_steps<Kind, Tile>(stream, tile.values(), Tile::kPanel, acc);
}

// Computes the detail over its window, in place: each warp reads and writes its own pixels. For `following` see
// multiply_steps.
template <class Kind, class Tile>
MIRAGE_DEVICE void project_detail(typename Tile::Stream& stream, Tile& tile, int following) {
  const int thread = opaque(thread_index());
  using Far = typename Tile::Far;
  float acc[Tile::kBranch / 16][Far::kTiles][4] = {};
  const int start = 8 * Far::kTiles * (thread / kLanes), g = thread % kLanes / 4, t = thread % 4;
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const auto* panel = stream.next(first + 16 < Tile::kBranch ? Tile::kPanel : following);
    multiply<16>(Kind(), panel, tile.detail() + first * Far::kPitch + start, Far::kPitch, acc);
  }
  sync_warp();
#pragma unroll
  for (int m = 0; m < Tile::kBranch / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Far::kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_pair(tile.detail() + (16 * m + 8 * half + g) * Far::kPitch + start + 8 * n + 2 * t, acc[m][n][2 * half],
                   acc[m][n][2 * half + 1]);
      }
    }
  }
}

// sum += the 7x7 convolution of one channel for a run of pixels, optionally with the kernel flipped along both axes.
// `line` points to the top left of the run's window, in a window with a halo of three.
template <class Far, bool kFlipped, class T, int kRun>
MIRAGE_DEVICE void convolve_run_7x7(const T* line, const float* kernel, float (&sum)[kRun]) {
  const float* taps = kernel + (kFlipped ? 6 * kMixerLine : 0);
#pragma unroll 1
  for (int y = 0; y < 7; ++y, line += Far::kLine, taps += kFlipped ? -kMixerLine : kMixerLine) {
    float value[kRun + 6], of_line[kMixerLine];
    load_packed<4>(taps, of_line);
    load_packed<4>(taps + 4, of_line + 4);
#pragma unroll
    for (int j = 0; j < kRun + 6; j += 2) load_packed<2>(line + j, value + j);
#pragma unroll
    for (int x = 0; x < 7; ++x) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[j] = fmaf(of_line[kFlipped ? 6 - x : x], value[x + j], sum[j]);
    }
  }
}

// Multiplies `chunk` by the 7x7 depthwise convolution of 16 detail channels; calls keep(channel, pixel, values) with
// each result.
template <class Tile, class Keep>
MIRAGE_DEVICE void multiply_by_convolution(const MixerArguments& p, int first, Tile& tile, Keep keep) {
  using T = typename Tile::T;
  const typename Tile::Run run(opaque(thread_index()));
  const int channel = first + run.channel;
  if (channel >= p.branch) return;  // the gates of these channels are zero
  const T* line = tile.detail() + channel * Tile::Far::kPitch + run.row * Tile::Far::kLine + run.column;
  float sum[Tile::kRun] = {};
  convolve_run_7x7<typename Tile::Far, false>(line, tile.kernels + run.channel * kMixerKernel, sum);
  keep(channel, run.row * 16 + run.column, sum);
  T* gate = tile.chunk + run.place();
#pragma unroll
  for (int j = 0; j < Tile::kRun; j += 2) {
    float both[2];
    load_packed<2>(gate + j, both);
    store_pair(gate + j, both[0] * sum[j], both[1] * sum[j + 1]);
  }
}

// The gated branch: gic2(gelu(gate / t) * concat(identity, convolution of detail)), 16 input channels of gic2 at a
// time.
template <class Kind, class Tile, class Keep>
MIRAGE_DEVICE void gated_branch(const MixerArguments& p, const Corner& at, float temperature,
                                typename Tile::Stream& stream, Tile& tile, MixerFragments<Tile>& acc, Keep keep) {
  using T = typename Tile::T;
  const float* kernels = mixer_kernels<T>(p, at.sample);
  constexpr int kTiles = Tile::Inner::kTiles;
  const MixerSteps steps(p);
  const float inverse = 1.0f / temperature;
#pragma unroll 1
  for (int step = 0; step < steps.gate; ++step) {
    const bool identity = step < steps.identities;
    const int first = 16 * (step - steps.identities);  // channel of the detail
    const int following = step + 1 < steps.identities ? 3 : step + 1 < steps.gate ? 2 : 1;
    const T* panels = stream.next(following * Tile::kPanel);  // the previous product has been read
    if (!identity) copy_to_block<kTileThreads>(tile.kernels, kernels + first * kMixerKernel);
    float gates_of[1][kTiles][4] = {};
    multiply_inner<Kind, Tile::kBranch, Tile>(panels, tile.scaled, gates_of);
    float values_of[1][kTiles][4] = {};
    if (identity) multiply_inner<Kind, Tile::kBranch, Tile>(panels + Tile::kPanel, tile.scaled, values_of);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float opened = gelu<T>(gates_of[0][n][i] * inverse);
        gates_of[0][n][i] = identity ? opened * values_of[0][n][i] : opened;
      }
    }
    store_fragments<Tile>(gates_of, tile.chunk);
    if (!identity) wait_for_copies();
    sync_block();
    if (!identity) {
      multiply_by_convolution(p, first, tile, keep);
      sync_block();
    }
    multiply_inner<Kind, 16, Tile>(panels + (identity ? 2 : 1) * Tile::kPanel, tile.chunk, acc);
  }
}

// The end of the gated branch: proj_out(scale * acc + n2).
template <class Kind, class Tile>
MIRAGE_DEVICE void gated_branch_out(const MixerArguments& p, const Corner& at, const Weights<float>& weight,
                                    const Weights<float>& bias, typename Tile::Stream& stream, Tile& tile,
                                    MixerFragments<Tile>& acc) {
  using T = typename Tile::T;
  const FragmentPixels<Tile::Inner::kTiles> pixels(p.height, p.width, at);
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch + corner_of(at, p.s_row, p.s_column);
  const MomentsOfPlane moments(p, at, 0);
  const float scale = p.branch_scale ? p.branch_scale[at.sample] : 1.0f;
  NormMoments of[pixels.kCount];
#pragma unroll
  for (int i = 0; i < pixels.kCount; ++i) of[i] = moments(0, pixels.in_bounds(i) ? pixels.offset(i, p.width, 1) : 0);
#pragma unroll
  for (int m = 0; m < 2 * Tile::kBranch / 16; ++m) {
    const int c = p.branch + 8 * m + pixels.group;
    if (c >= 2 * p.branch) continue;
    const T* channel = opaque_global(x + c * p.s_channel);
    const float w = weight[c], b = bias[c];
#pragma unroll
    for (int i = 0; i < pixels.kCount; ++i) {
      if (!pixels.in_bounds(i)) continue;
      const T* from = channel + pixels.offset(i, int(p.s_row), int(p.s_column));
      const float normal = (to_float(load_constant(from)) - of[i].mean) * of[i].rstd;
      float& sum = acc[m / 2][i / 2][m % 2 * 2 + i % 2];
      sum = fmaf(scale, sum, fmaf(normal, w, b));
    }
  }
  store_fragments<Tile>(acc, tile.scaled);  // no longer read since the last barrier in gated_branch
#pragma unroll
  for (int m = 0; m < Tile::kBranch / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::Inner::kTiles; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
  }
  multiply_steps<Kind, Tile>(stream, tile.scaled, 2 * Tile::kPanel, acc);
}

// The MLP branch: mlp_out(gelu(mlp_in(n3))), 16 of the 2c hidden channels at a time.
template <class Kind, class Tile>
MIRAGE_DEVICE void mlp_branch(const MixerArguments& p, typename Tile::Stream& stream, Tile& tile,
                              MixerFragments<Tile>& acc) {
  using T = typename Tile::T;
  constexpr int kTiles = Tile::Inner::kTiles;
#pragma unroll 1
  for (int first = 0; first < 2 * p.branch; first += 16) {
    const int following = first + 16 < 2 * p.branch ? 2 : 3;
    const T* panels = stream.next(following * Tile::kPanel);  // the previous hidden channels have been read
    float hidden[1][kTiles][4] = {};
    multiply_inner<Kind, Tile::kBranch, Tile>(panels, tile.third(), hidden);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) hidden[0][n][i] = gelu<T>(hidden[0][n][i]);
    }
    store_fragments<Tile>(hidden, tile.chunk);
    sync_block();
    multiply_inner<Kind, 16, Tile>(panels + Tile::kPanel, tile.chunk, acc);
  }
}

// Fuses the accumulators of the branches: each is modulated by the sum of the other two. Stores the results as channels
// of `large`, one branch after the other; zero from 3c on.
template <class Tile>
MIRAGE_DEVICE void fuse_fragments(const MixerArguments& p, const float* alphas, const MixerFragments<Tile>& a,
                                  const MixerFragments<Tile>& b, const MixerFragments<Tile>& c, Tile& tile) {
  constexpr int kPitch = Tile::Inner::kPitch;
  const float alpha_att = alphas[0], alpha_conv = alphas[1], alpha_mlp = alphas[2];
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = thread_index(); i < (3 * Tile::kBranch - 3 * p.branch) * kPitch; i += kTileThreads) {
    tile.large[3 * p.branch * kPitch + i] = from_float<typename Tile::T>(0.0f);
  }
#pragma unroll
  for (int m = 0; m < 2 * Tile::kBranch / 16; ++m) {
    const int channel = 8 * m + g;
    if (channel >= p.branch) continue;
#pragma unroll
    for (int n = 0; n < Tile::Inner::kTiles; ++n) {
      float fused[3][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = m % 2 * 2 + i;
        const float x = a[m / 2][n][at], y = b[m / 2][n][at], z = c[m / 2][n][at];
        fused[0][i] = fmaf(alpha_att, sigmoid(y + z), x);
        fused[1][i] = fmaf(alpha_conv, sigmoid(x + z), y);
        fused[2][i] = fmaf(alpha_mlp, sigmoid(x + y), z);
      }
      auto* out = tile.large + channel * kPitch + 8 * (warp_index() * Tile::Inner::kTiles + n) + 2 * t;
#pragma unroll
      for (int i = 0; i < 3; ++i) store_pair(out + i * p.branch * kPitch, fused[i][0], fused[i][1]);
    }
  }
}

// y = x + project_out(large), 16 channels of `large` at a time.
template <class Kind, class Tile>
MIRAGE_DEVICE void project_out(const MixerArguments& p, const Corner& at, typename Tile::Stream& stream, Tile& tile) {
  using T = typename Tile::T;
  constexpr int kTiles = Tile::Inner::kTiles, kChannels = 3 * Tile::kBranch;
  const int channels = 3 * p.branch;
  float acc[kChannels / 16][kTiles][4] = {};
#pragma unroll 1
  for (int first = 0; first < channels; first += 16) {
    const T* panel = stream.next(3 * Tile::kPanel);
    multiply_inner<Kind, 16, Tile>(panel, tile.large + first * Tile::Inner::kPitch, acc);
  }
  const FragmentPixels<kTiles> pixels(p.height, p.width, at);
  const T* from = static_cast<const T*>(p.x) + at.sample * p.s_batch + corner_of(at, p.s_row, p.s_column);
  T* to = static_cast<T*>(p.y) + at.sample * channels * p.plane() + corner_of(at, p.width, 1);
  store_sum(pixels, channels, from, p.s_channel, int(p.s_row), int(p.s_column), to, p.plane(), p.width, acc);
}

// BatchNorm of the gated branch's input, as a function of the channel and then of the value.
struct MixerBatchNorm {
  struct OfChannel {
    float mean, factor, bias;
    MIRAGE_DEVICE float operator()(float value) const { return fmaf(value - mean, factor, bias); }
  };

  const float *mean, *var, *weight, *bias;
  float eps;

  MIRAGE_DEVICE explicit MixerBatchNorm(const MixerArguments& p)
      : mean(p.batch_mean), var(p.batch_var), weight(p.packed + 6 * 16 * MixerSteps::channel_tiles_of(p.branch)),
        bias(weight + 16 * MixerSteps::channel_tiles_of(p.branch)), eps(p.bn_eps) {}

  MIRAGE_DEVICE OfChannel operator()(int c) const { return {mean[c], weight[c] / sqrtf(var[c] + eps), bias[c]}; }
};

// Loads third `third` of the normalised x in a window and applies `change`, with the packed weights of the layer norm
// and the stored moments.
template <class Window, int kChannelTiles, class T, class Change>
MIRAGE_DEVICE void load_third(const MixerArguments& p, const Corner& at, int third, T* out, Change change) {
  const MomentsOfPlane moments(p, at, (Window::kLine - Window::kColumns) / 2);
  const Weights<float> weight{p.packed}, bias{p.packed + 3 * 16 * kChannelTiles};
  load_normal<T, float, kChannelTiles, Window>(p, at, third, weight, bias, moments, out, change);
}

template <class Window, int kChannelTiles, class T>
MIRAGE_DEVICE void load_third(const MixerArguments& p, const Corner& at, int third, T* out) {
  load_third<Window, kChannelTiles>(p, at, third, out, Unchanged());
}

// Loads the inputs of the branches with their halos: n1, and BatchNorm of n2.
template <int kChannelTiles, class Tile>
MIRAGE_DEVICE void load_windows(const MixerArguments& p, const Corner& at, Tile& tile) {
  load_third<typename Tile::Near, kChannelTiles>(p, at, 0, tile.normal());
  load_third<typename Tile::Far, kChannelTiles>(p, at, 1, tile.detail(), MixerBatchNorm(p));
}

template <class Kind, int kChannelTiles, int kRows>
MIRAGE_KERNEL(256, kChannelTiles == 1 ? 3 : kChannelTiles == 2 ? 2 : 1) mixer_fuse_kernel(const MixerArguments p) {
  using Tile = MixerFuseTile<Kind, kChannelTiles, kRows>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const Corner at = Tiling<kRows>(p).corner(int(block_index()));
  typename Tile::Stream stream({p, at.sample}, MixerSteps(p).all(), Tile::Forward::kFirst, tile.steps);
  load_windows<kChannelTiles>(p, at, tile);
  MixerFragments<Tile> attended = {};
  attention_branch<Kind>(stream, tile, attended);
  copy_inner<Tile>(tile.detail(), tile.scaled);
  project_detail<Kind>(stream, tile, 3 * Tile::kPanel);  // after its first barrier v is no longer read
  load_third<typename Tile::Inner, kChannelTiles>(p, at, 2, tile.third());
  MixerFragments<Tile> gated = {};
  gated_branch<Kind>(p, at, p.packed[mixer_scalars(kChannelTiles)], stream, tile, gated, [](int, int, const auto&) {});
  gated_branch_out<Kind>(p, at, {p.packed}, {p.packed + 3 * Tile::kBranch}, stream, tile, gated);
  MixerFragments<Tile> mlp = {};
  mlp_branch<Kind>(p, stream, tile, mlp);
  fuse_fragments(p, p.packed + mixer_scalars(kChannelTiles) + 1, attended, gated, mlp, tile);
  project_out<Kind>(p, at, stream, tile);
}

}  // namespace mirage::cuda
