// The third kernel of mixer_stage: all three branches, their fusion and project_out, for one tile of the image a block.
#pragma once

#include "mixer_stage.h"

namespace mirage::cuda {

template <class Kind, int kBlocks, int kRows>
struct MixerFuseTile {
  using T = typename Kind::Element;
  using Far = Window<kRows, 3>;
  using Near = Window<kRows, 1>;
  using Inner = Window<kRows, 0>;
  static constexpr int kBranch = 16 * kBlocks, kHiddenPitch = Near::kHiddenPitch;
  static constexpr int kRun = Inner::kPixels * 16 / kTileThreads;

  static constexpr int largest(int a, int b) { return a > b ? a : b; }
  static constexpr int kWindows = kBranch * (Far::kPitch + Near::kPitch), kFused = 3 * kBranch * Inner::kPitch;
  static constexpr int kPanel = 16 * kBranch * largest(kBlocks, 3);

  // First the windows of detail and n1, at last the fused branches.
  alignas(16) T large[largest(kWindows, kFused)];
  alignas(16) T scaled[kBranch * Inner::kPitch];  // BatchNorm of n2, then the gated CNN before proj_out
  alignas(16) T other[kBranch * Inner::kPitch];   // v, then n3
  alignas(16) float hidden[16 * kHiddenPitch];
  alignas(16) T chunk[16 * Inner::kPitch];
  alignas(16) T panel[kPanel];
  alignas(16) T panel_out[16 * kBranch];

  MIRAGE_DEVICE T* detail() { return large; }
  MIRAGE_DEVICE T* normal() { return large + kBranch * Far::kPitch; }
};

template <class Tile>
using MixerFragments = float[Tile::kBranch / 16][Tile::Inner::kTiles][4];

// Fragments as rows of pixels.
template <class Tile, int MT>
MIRAGE_DEVICE void store_fragments(const float (&acc)[MT][Tile::Inner::kTiles][4], typename Tile::T* out) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::Inner::kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + g, pixel = 8 * (warp_index() * Tile::Inner::kTiles + n) + 2 * t;
        store_pair(out + row * Tile::Inner::kPitch + pixel, acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    }
  }
}

// acc += panel x the tile's pixels at `pixels`, of kDepth channels.
template <class Kind, int kDepth, class Tile, int MT>
MIRAGE_DEVICE void multiply_inner(const typename Tile::T* panel, const typename Tile::T* pixels,
                                  float (&acc)[MT][Tile::Inner::kTiles][4]) {
  multiply<kDepth>(Kind(), panel, pixels + 8 * Tile::Inner::kTiles * warp_index(), Tile::Inner::kPitch, acc);
}

// attention x v, v from n1 with its depthwise convolution.
template <class Kind, class W, class Tile>
MIRAGE_DEVICE void attend(const MixerArguments& p, const Corner& at, Tile& tile, MixerFragments<Tile>& acc) {
  using Near = typename Tile::Near;
  constexpr int kRun = Tile::kRun, kRuns = 16 / kRun, kRunsOfTile = Tile::Inner::kPixels / kRun;
  const auto weight = p.weights<W>(p.qkv_dwconv);
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const Block<W> block{static_cast<const W*>(p.qkv), p.branch, 2 * p.branch + first, 0, p.branch - first, p.branch};
    store_matrix<Kind, 16, Tile::kBranch, kTileThreads>(tile.panel, block);
    sync_block();
    float fragments[1][Near::kTiles][4] = {};
    multiply<Tile::kBranch>(Kind(), tile.panel, tile.normal() + 8 * Near::kTiles * warp_index(), Near::kPitch, fragments);
    store_lines<Near>(fragments, tile.hidden);
    const int i = thread_index() / kRunsOfTile, run = thread_index() % kRunsOfTile, channel = first + i;
    const int row = run / kRuns, column = run % kRuns * kRun;
    float taps[9], sum[kRun] = {};
#pragma unroll
    for (int t = 0; t < 9; ++t) {
      taps[t] = channel < p.branch ? weight[int64_t(2 * p.branch + channel) * 9 + t] : 0.0f;
    }
    sync_block();
    convolve_run(tile.hidden + i * Tile::kHiddenPitch + row * kHiddenLine + column, taps, sum);
    auto* out = tile.other + channel * Tile::Inner::kPitch + row * 16 + column;
#pragma unroll
    for (int j = 0; j < kRun; j += 2) store_pair(out + j, sum[j], sum[j + 1]);
    // hidden and panel are written again after the next barrier, which all reach after reading them here
  }
  const int depth = p.depth();
  const float* attention = p.attention + int64_t(at.sample) * p.heads * (2 * depth + 2) * depth;
  sync_block();
  store_panel<Kind, Tile::kBranch, Tile::kBranch, kTileThreads>(tile.panel, [&](int row, int k, float (&pair)[2]) {
    const float* of_row = attention + (int64_t(row / depth) * (2 * depth + 2) + row % depth) * depth;
#pragma unroll
    for (int j = 0; j < Kind::kUnit; ++j) {
      const bool together = row < p.branch && k + j < p.branch && row / depth == (k + j) / depth;
      pair[j] = together ? of_row[(k + j) % depth] : 0.0f;
    }
  });
  sync_block();
  multiply_inner<Kind, Tile::kBranch, Tile>(tile.panel, tile.other, acc);
}

// The detail over its window, in place: each warp reads and writes its own pixels.
template <class Kind, class W, class Tile>
MIRAGE_DEVICE void project_detail(const MixerArguments& p, Tile& tile) {
  using Far = typename Tile::Far;
  const Block<W> block{static_cast<const W*>(p.gic1), p.branch, 2 * p.hidden - p.branch, 0, p.branch, p.branch};
  store_matrix<Kind, Tile::kBranch, Tile::kBranch, kTileThreads>(tile.panel, block);
  sync_block();
  float acc[Tile::kBranch / 16][Far::kTiles][4] = {};
  const int first = 8 * Far::kTiles * warp_index(), g = lane_index() / 4, t = lane_index() % 4;
  multiply<Tile::kBranch>(Kind(), tile.panel, tile.detail() + first, Far::kPitch, acc);
  sync_warp();
#pragma unroll
  for (int m = 0; m < Tile::kBranch / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Far::kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_pair(tile.detail() + (16 * m + 8 * half + g) * Far::kPitch + first + 8 * n + 2 * t, acc[m][n][2 * half],
                   acc[m][n][2 * half + 1]);
      }
    }
  }
}

// chunk *= the 7x7 convolution of 16 channels of detail.
template <class Tile>
MIRAGE_DEVICE void multiply_by_convolution(const MixerArguments& p, const Corner& at, int first, Tile& tile) {
  using T = typename Tile::T;
  constexpr int kRun = Tile::kRun, kRuns = 16 / kRun, kRunsOfTile = Tile::Inner::kPixels / kRun;
  const int i = thread_index() / kRunsOfTile, run = thread_index() % kRunsOfTile, channel = first + i;
  const int row = run / kRuns, column = run % kRuns * kRun;
  const float* taps = p.kernels + (int64_t(at.sample) * p.branch + channel) * kMixerTaps;
  const T* line = tile.detail() + channel * Tile::Far::kPitch + row * Tile::Far::kLine + column;
  float sum[kRun] = {};
#pragma unroll 1
  for (int y = 0; y < 7; ++y, line += Tile::Far::kLine) {
    float value[kRun + 6];
#pragma unroll
    for (int j = 0; j < kRun + 6; j += 2) load_packed<2>(line + j, value + j);
#pragma unroll
    for (int x = 0; x < 7; ++x) {
      const float tap = channel < p.branch ? taps[7 * y + x] : 0.0f;
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[j] = fmaf(tap, value[x + j], sum[j]);
    }
  }
  T* gate = tile.chunk + i * Tile::Inner::kPitch + row * 16 + column;
#pragma unroll
  for (int j = 0; j < kRun; j += 2) {
    float both[2];
    load_packed<2>(gate + j, both);
    store_pair(gate + j, both[0] * sum[j], both[1] * sum[j + 1]);
  }
}

// gic2(gelu(gate / t) * concat(identity, convolution of detail)), 16 channels of the product at a time.
template <class Kind, class W, class Tile>
MIRAGE_DEVICE void gate(const MixerArguments& p, const Corner& at, Tile& tile, MixerFragments<Tile>& acc) {
  using T = typename Tile::T;
  constexpr int kTiles = Tile::Inner::kTiles;
  const W *gic1 = static_cast<const W*>(p.gic1), *gic2 = static_cast<const W*>(p.gic2);
  const float inverse = 1.0f / p.weights<W>(p.gate_temperature)[0];
  const int identities = p.hidden - p.branch;
  for (int first = 0; first < p.hidden;) {
    const bool identity = first < identities;
    const int rows = (identity ? identities : p.hidden) - first;  // of this kind from here on
    const Block<W> gates{gic1, p.branch, first, 0, rows, p.branch};
    store_matrix<Kind, 16, Tile::kBranch, kTileThreads>(tile.panel, gates);
    if (identity) {
      const Block<W> values{gic1, p.branch, p.hidden + first, 0, rows, p.branch};
      store_matrix<Kind, 16, Tile::kBranch, kTileThreads>(tile.panel + 16 * Tile::kBranch, values);
    }
    const Block<W> out{gic2, p.hidden, 0, first, p.branch, rows};
    store_matrix<Kind, Tile::kBranch, 16, kTileThreads>(tile.panel_out, out);
    sync_block();
    float gates_of[1][kTiles][4] = {};
    multiply_inner<Kind, Tile::kBranch, Tile>(tile.panel, tile.scaled, gates_of);
    float values_of[1][kTiles][4] = {};
    if (identity) {
      multiply_inner<Kind, Tile::kBranch, Tile>(tile.panel + 16 * Tile::kBranch, tile.scaled, values_of);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float opened = gelu<T>(gates_of[0][n][i] * inverse);
        gates_of[0][n][i] = identity ? opened * values_of[0][n][i] : opened;
      }
    }
    store_fragments<Tile>(gates_of, tile.chunk);
    sync_block();
    if (!identity) {
      multiply_by_convolution(p, at, first - identities, tile);
      sync_block();
    }
    multiply_inner<Kind, 16, Tile>(tile.panel_out, tile.chunk, acc);
    sync_block();
    first += identity && rows < 16 ? rows : 16;
  }
}

// proj_out(scale * acc + n2).
template <class Kind, class W, class Tile>
MIRAGE_DEVICE void project_branch(const MixerArguments& p, const Corner& at, Tile& tile, MixerFragments<Tile>& acc) {
  using T = typename Tile::T;
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch + int64_t(p.branch) * p.s_channel;
  const float* moments = p.moments + 2 * at.sample * p.plane();
  const auto weight = p.weights<W>(p.norm_weight), bias = p.weights<W>(p.norm_bias);
  const float scale = p.branch_scale ? p.branch_scale[at.sample] : 1.0f;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < Tile::Inner::kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pixel = 8 * (warp_index() * Tile::Inner::kTiles + n) + 2 * t + i;
      const int row = at.row + pixel / 16, column = at.column + pixel % 16;
      const bool known = inside(p, row, column);
      const int64_t place = int64_t(row) * p.width + column, offset = row * p.s_row + column * p.s_column;
      const float mean = known ? moments[place] : 0.0f, rstd = known ? moments[p.plane() + place] : 0.0f;
#pragma unroll
      for (int m = 0; m < 2 * Tile::kBranch / 16; ++m) {
        const int c = 8 * m + g;
        float& sum = acc[m / 2][n][m % 2 * 2 + i];
        if (known && c < p.branch) {
          const float normal = (to_float(x[c * p.s_channel + offset]) - mean) * rstd;
          sum = fmaf(scale, sum, fmaf(normal, weight[p.branch + c], bias[p.branch + c]));
        }
      }
    }
  }
  store_fragments<Tile>(acc, tile.scaled);
  const Block<W> block{static_cast<const W*>(p.proj_out), p.branch, 0, 0, p.branch, p.branch};
  store_matrix<Kind, Tile::kBranch, Tile::kBranch, kTileThreads>(tile.panel, block);
  sync_block();
#pragma unroll
  for (int m = 0; m < Tile::kBranch / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::Inner::kTiles; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
  }
  multiply_inner<Kind, Tile::kBranch, Tile>(tile.panel, tile.scaled, acc);
}

// mlp_out(gelu(mlp_in(n3))), 16 of the 2c hidden channels at a time.
template <class Kind, class W, class Tile>
MIRAGE_DEVICE void perceive(const MixerArguments& p, Tile& tile, MixerFragments<Tile>& acc) {
  using T = typename Tile::T;
  constexpr int kTiles = Tile::Inner::kTiles;
  for (int first = 0; first < 2 * p.branch; first += 16) {
    const int rows = 2 * p.branch - first;
    const Block<W> in{static_cast<const W*>(p.mlp_in), p.branch, first, 0, rows, p.branch};
    const Block<W> out{static_cast<const W*>(p.mlp_out), 2 * p.branch, 0, first, p.branch, rows};
    store_matrix<Kind, 16, Tile::kBranch, kTileThreads>(tile.panel, in);
    store_matrix<Kind, Tile::kBranch, 16, kTileThreads>(tile.panel_out, out);
    sync_block();
    float hidden[1][kTiles][4] = {};
    multiply_inner<Kind, Tile::kBranch, Tile>(tile.panel, tile.other, hidden);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) hidden[0][n][i] = gelu<T>(hidden[0][n][i]);
    }
    store_fragments<Tile>(hidden, tile.chunk);
    sync_block();
    multiply_inner<Kind, 16, Tile>(tile.panel_out, tile.chunk, acc);
    sync_block();
  }
}

// Each branch modulated by the sum of the other two, one after the other as channels of `large`; zero from 3c on.
template <class W, class Tile>
MIRAGE_DEVICE void fuse(const MixerArguments& p, const MixerFragments<Tile>& a, const MixerFragments<Tile>& b,
                        const MixerFragments<Tile>& c, Tile& tile) {
  constexpr int kPitch = Tile::Inner::kPitch;
  const float alpha_a = p.weights<W>(p.alpha_att)[0], alpha_b = p.weights<W>(p.alpha_conv)[0],
              alpha_c = p.weights<W>(p.alpha_mlp)[0];
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
        fused[0][i] = fmaf(alpha_a, sigmoid(y + z), x);
        fused[1][i] = fmaf(alpha_b, sigmoid(x + z), y);
        fused[2][i] = fmaf(alpha_c, sigmoid(x + y), z);
      }
      auto* out = tile.large + channel * kPitch + 8 * (warp_index() * Tile::Inner::kTiles + n) + 2 * t;
#pragma unroll
      for (int i = 0; i < 3; ++i) store_pair(out + i * p.branch * kPitch, fused[i][0], fused[i][1]);
    }
  }
}

// y = x + project_out(large), 16 channels of `large` at a time.
template <class Kind, class W, class Tile>
MIRAGE_DEVICE void project_out(const MixerArguments& p, const Corner& at, Tile& tile) {
  using T = typename Tile::T;
  constexpr int kTiles = Tile::Inner::kTiles, kChannels = 3 * Tile::kBranch;
  const int channels = 3 * p.branch;
  float acc[kChannels / 16][kTiles][4] = {};
  for (int first = 0; first < channels; first += 16) {
    const Block<W> block{static_cast<const W*>(p.project_out), channels, 0, first, channels, channels - first};
    store_matrix<Kind, kChannels, 16, kTileThreads>(tile.panel, block);
    sync_block();
    multiply_inner<Kind, 16, Tile>(tile.panel, tile.large + first * Tile::Inner::kPitch, acc);
    sync_block();
  }
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch;
  T* y = static_cast<T*>(p.y) + at.sample * channels * p.plane();
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pixel = 8 * (warp_index() * kTiles + n) + 2 * t + i;
      const int row = at.row + pixel / 16, column = at.column + pixel % 16;
      if (!inside(p, row, column)) continue;
      const int64_t from = row * p.s_row + column * p.s_column, to = int64_t(row) * p.width + column;
#pragma unroll
      for (int m = 0; m < 2 * kChannels / 16; ++m) {
        const int c = 8 * m + g;
        if (c >= channels) continue;
        const float value = to_float(x[c * p.s_channel + from]) + acc[m / 2][n][m % 2 * 2 + i];
        y[c * p.plane() + to] = from_float<T>(value);
      }
    }
  }
}

template <class Kind, class W, int kBlocks, int kRows>
MIRAGE_KERNEL(256, kBlocks <= 2 ? 2 : 1) mixer_fuse_kernel(const MixerArguments p) {
  using Tile = MixerFuseTile<Kind, kBlocks, kRows>;
  using T = typename Tile::T;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int across = (p.width + 15) / 16, tiles = across * ((p.height + kRows - 1) / kRows);
  const int i = int(block_index() % tiles);
  const Corner at{int(block_index() / tiles), i / across * kRows, i % across * 16};
  const MomentsOfPlane moments{p.moments + 2 * at.sample * p.plane(), p.plane()};
  const auto same = [](int, float value) { return value; };
  const auto weight = p.weights<W>(p.bn_weight), bias = p.weights<W>(p.bn_bias);
  const auto batch_norm = [&](int c, float value) {
    return fmaf((value - p.batch_mean[c]) * (1.0f / sqrtf(p.batch_var[c] + p.bn_eps)), weight[c], bias[c]);
  };
  load_normal<T, W, kBlocks, typename Tile::Near>(p, at, 0, moments, tile.normal(), same);
  load_normal<T, W, kBlocks, typename Tile::Far>(p, at, 1, moments, tile.detail(), batch_norm);
  load_normal<T, W, kBlocks, typename Tile::Inner>(p, at, 1, moments, tile.scaled, batch_norm);
  MixerFragments<Tile> attended = {};
  attend<Kind, W>(p, at, tile, attended);
  sync_block();
  load_normal<T, W, kBlocks, typename Tile::Inner>(p, at, 2, moments, tile.other, same);
  project_detail<Kind, W>(p, tile);
  sync_block();
  MixerFragments<Tile> gated = {};
  gate<Kind, W>(p, at, tile, gated);
  project_branch<Kind, W>(p, at, tile, gated);
  sync_block();
  MixerFragments<Tile> perceived = {};
  perceive<Kind, W>(p, tile, perceived);
  fuse<W>(p, attended, gated, perceived, tile);
  sync_block();
  project_out<Kind, W>(p, at, tile);
}

}  // namespace mirage::cuda
