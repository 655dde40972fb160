// The kernel of mixer_stage's backward that sees all three branches. It recomputes them as mixer_fuse does, and
// computes the backward of project_out, the fusion, the MLP, proj_out, and attention times v. The other kernels then
// work on single pixels, or need sums over all pixels first.
#pragma once

#include "backward_pack.h"
#include "fuse.h"
#include "ops/tri_branch_fusion/cuda_kernels.h"

namespace mirage::cuda {

// Steps: those of forward without project_out, then those of backward: project_out, attention, proj_out and the MLP.
template <class T, int kChannelTiles>
struct MixerFusionSteps {
  static constexpr int kPanels = 3;
  const MixerBackwardArguments& p;
  int sample;

  MIRAGE_DEVICE static int all(const MixerBackwardArguments& p) {
    const MixerSteps steps(p);
    return steps.all() + 2 * kChannelTiles + steps.mlp;
  }

  MIRAGE_DEVICE void jump(int i, const T*& from) const {
    MixerForwardSteps<T, kChannelTiles>{p, sample}.jump(i, from);
    const MixerSteps steps(p);
    i -= steps.all();
    if (i == -steps.out) from = mixer_backward_step<T>(p, 0);
    if (i == 0) from = mixer_backward_step<T>(p, MixerBackwardSteps(p).of_sample(sample, 0));  // attention
    if (i == kChannelTiles) from = mixer_backward_step<T>(p, steps.out);
  }
};

template <class Kind, int kChannelTiles, int kRows>
struct MixerFusionTile {
  using T = typename Kind::Element;
  using Far = Window<kRows, 3>;
  using Near = Window<kRows, 1>;
  using Inner = Window<kRows, 0>;
  using Run = TileRun<Inner>;
  static constexpr int kBranch = 16 * kChannelTiles, kHiddenPitch = Near::kHiddenPitch;
  static constexpr int kRun = Run::kRun, kPanel = 16 * kBranch;
  static constexpr int kMap = kBranch * Inner::kPitch;
  static constexpr int largest(int a, int b) { return a > b ? a : b; }
  static constexpr int kWindows = kBranch * (Far::kPitch + Near::kPitch);
  using Forward = MixerForwardSteps<T, kChannelTiles>;
  using Stream = PanelStream<T, kChannelTiles, MixerFusionSteps<T, kChannelTiles>>;

  alignas(16) T large[largest(kWindows, 3 * kMap)];  // the windows of detail and n1, then the fused branches
  alignas(16) T scaled[kMap];                        // BatchNorm of n2, then the input of proj_out
  alignas(16) T other[kMap];                         // v, at last n3
  alignas(16) T branches[3 * kMap];                  // hidden channels of v; n3; the branches, then their gradients
  alignas(16) T chunk[16 * Inner::kPitch];
  alignas(16) T second[16 * Inner::kPitch];
  alignas(16) T steps[2][Stream::kStep];
  alignas(16) float kernels[16 * kMixerKernel];
  float grad_alphas[3 * kTileWarps];  // of each warp, over all tiles
  static_assert(16 * kHiddenPitch * sizeof(float) <= sizeof(branches));

  MIRAGE_DEVICE T* detail() { return large; }
  MIRAGE_DEVICE T* normal() { return large + kBranch * Far::kPitch; }
  MIRAGE_DEVICE T* values() { return other; }
  MIRAGE_DEVICE T* third() { return branches + 2 * kMap; }
  MIRAGE_DEVICE float* hidden() { return reinterpret_cast<float*>(branches); }
  MIRAGE_DEVICE PixelRows<T> rows(const T* map, int channels) const { return {map, Inner::kPitch, channels}; }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// Recomputes the three branches into `branches`, one after the other. For `keep` see multiply_by_convolution.
template <class Kind, int kChannelTiles, class Tile, class Keep>
MIRAGE_DEVICE void recompute_branches(const MixerArguments& p, const Corner& at, typename Tile::Stream& stream,
                                      Tile& tile, Keep keep) {
  load_windows<kChannelTiles>(p, at, tile);
  {
    MixerFragments<Tile> attended = {};
    attention_branch<Kind>(stream, tile, attended);
    store_fragments<Tile>(attended, tile.branches);  // overwrites hidden channels, which have been read
  }
  copy_inner<Tile>(tile.detail(), tile.scaled);
  project_detail<Kind>(stream, tile, 3 * Tile::kPanel);
  load_third<typename Tile::Inner, kChannelTiles>(p, at, 2, tile.third());
  {
    MixerFragments<Tile> gated = {};
    gated_branch<Kind>(p, at, p.packed[mixer_scalars(kChannelTiles)], stream, tile, gated, keep);
    gated_branch_out<Kind>(p, at, {p.packed}, {p.packed + 3 * Tile::kBranch}, stream, tile, gated);
    store_fragments<Tile>(gated, tile.branches + Tile::kMap);
  }
  MixerFragments<Tile> mlp = {};
  mlp_branch<Kind>(p, stream, tile, mlp);
  sync_warp();  // a warp reads its own pixels only
  store_fragments<Tile>(mlp, tile.third());
}

template <int kChannelTiles>
MIRAGE_DEVICE FusionWeights alphas_of(const MixerArguments& p) {
  const float* scalars = p.packed + mixer_scalars(kChannelTiles);  // the first one is the temperature of the gate
  return {{scalars[1], scalars[2], scalars[3]}};
}

// Fuses the branches in `branches` into channels of `large`; zero from 3c on. One warp per channel.
template <class Tile>
MIRAGE_DEVICE void fuse_stored(const MixerArguments& p, const FusionWeights& alphas, Tile& tile) {
  using T = typename Tile::T;
  constexpr int kPitch = Tile::Inner::kPitch;
  for (int i = thread_index(); i < (3 * Tile::kBranch - 3 * p.branch) * kPitch; i += kTileThreads) {
    tile.large[3 * p.branch * kPitch + i] = from_float<T>(0.0f);
  }
#pragma unroll 1
  for (int c = warp_index(); c < p.branch; c += kTileWarps) {
#pragma unroll
    for (int n = 2 * lane_index(); n < Tile::Inner::kPixels; n += 2 * kLanes) {
      float value[3][2];
#pragma unroll
      for (int i = 0; i < 3; ++i) load_packed<2>(tile.branches + i * Tile::kMap + c * kPitch + n, value[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x[3] = {value[0][j], value[1][j], value[2][j]};
        fuse_branches(alphas, x);
        value[0][j] = x[0], value[1][j] = x[1], value[2][j] = x[2];
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) store_pair(tile.large + (i * p.branch + c) * kPitch + n, value[i][0], value[i][1]);
    }
  }
}

// ---- project_out and the fusion ------------------------------------------------------------------------------------

// Computes the gradients of the fused branches, 16 channels of grad_y at a time, and that of project_out.
template <class Kind, class Tile>
MIRAGE_DEVICE void project_out_backward(const MixerBackwardArguments& p, const Corner& at, bool is_first, float* sums,
                                        typename Tile::Stream& stream, Tile& tile, MixerFragments<Tile> (&grad)[3]) {
  using T = typename Tile::T;
  using Inner = typename Tile::Inner;
  const int channels = 3 * p.branch, line = round_up_to_8(channels);
  const T* from = static_cast<const T*>(p.grad_y) + at.sample * p.g_batch;
#pragma unroll 1
  for (int first = 0; first < channels; first += 16) {
    const int count = channels - first < 16 ? channels - first : 16;
    const T* panels = stream.next((first + 16 < channels ? 3 : 1) * Tile::kPanel);  // the previous chunk has been read
    load_window<Inner, 16>(p, at, from + first * p.g_channel, p.g_channel, p.g_row, p.g_column, count, tile.chunk);
    sync_block();
#pragma unroll
    for (int i = 0; i < 3; ++i) multiply_inner<Kind, 16, Tile>(panels + i * Tile::kPanel, tile.chunk, grad[i]);
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.chunk, count), tile.rows(tile.large, channels),
                                     sums + int64_t(first) * line, line);
  }
}

// Backward of the fusion: replaces the branches by their gradients. Each thread has the same channels and pixels of all
// three.
template <class Tile>
MIRAGE_DEVICE void fusion_backward(const FusionWeights& alphas, const MixerFragments<Tile> (&grad)[3], Tile& tile) {
  float grad_alphas[3] = {};
  const int thread = opaque(thread_index());
  const int g = thread % kLanes / 4, t = thread % 4;
#pragma unroll
  for (int m = 0; m < 2 * Tile::kBranch / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::Inner::kTiles; ++n) {
      const int pixel = 8 * (thread / kLanes * Tile::Inner::kTiles + n) + 2 * t;
      auto* here = tile.branches + (8 * m + g) * Tile::Inner::kPitch + pixel;
      float value[3][2], grad_branch[2][3];
#pragma unroll
      for (int i = 0; i < 3; ++i) load_packed<2>(here + i * Tile::kMap, value[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float x[3] = {value[0][j], value[1][j], value[2][j]};
#pragma unroll
        for (int i = 0; i < 3; ++i) grad_branch[j][i] = grad[i][m / 2][n][m % 2 * 2 + j];
        fuse_branches_backward(alphas, x, grad_branch[j], grad_alphas);
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) store_pair(here + i * Tile::kMap, grad_branch[0][i], grad_branch[1][i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const float sum = warp_all_reduce_sum(grad_alphas[i]);
    if (thread % kLanes == 0) tile.grad_alphas[3 * (thread / kLanes) + i] += sum;
  }
}

// ---- the branches --------------------------------------------------------------------------------------------------

// Adds the gradient of the attention [c, d] of a sample, or initialises it: sums over pixels of the branch's gradient
// times v.
template <class Kind, class Tile>
MIRAGE_DEVICE void add_attention(const MixerArguments& p, bool is_first, float* sums, const Tile& tile) {
  constexpr int kPitch = Tile::Inner::kPitch, kAcross = 2 * Tile::kBranch / 16;
  const int depth = p.depth(), thread = opaque(thread_index()), g = thread % kLanes / 4, t = thread % 4;
#pragma unroll 1
  for (int item = thread / kLanes; item < Tile::kBranch / 16 * kAcross; item += kTileWarps) {
    const int first = item / kAcross * 16, across = item % kAcross * 8;
    if (first >= p.branch || across >= p.branch) continue;
    if (first / depth > (across + 7) / depth || across / depth > (first + 15) / depth) continue;  // different heads
    float acc[4] = {};
    multiply_rows<Tile::Inner::kPixels>(Kind(), tile.branches + first * kPitch, kPitch, tile.other + across * kPitch,
                                        kPitch, acc);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = first + g + j / 2 * 8, column = across + 2 * t + j % 2;
      if (row >= p.branch || column >= p.branch || row / depth != column / depth) continue;
      float& sum = sums[row * depth + column % depth];
      sum = (is_first ? 0.0f : sum) + acc[j];
    }
  }
}

// Backward of the MLP, 16 of its 2c hidden channels at a time: the gradients of its input n3, which is in `other`, and
// of its matrices.
template <class Kind, class Tile>
MIRAGE_DEVICE void mlp_backward(const MixerBackwardArguments& p, bool is_first, float* of_in, float* of_out,
                                typename Tile::Stream& stream, Tile& tile, MixerFragments<Tile>& grad) {
  using T = typename Tile::T;
  using Inner = typename Tile::Inner;
  const int line_in = round_up_to_8(p.branch), line_out = round_up_to_8(2 * p.branch);
  const T* grad_mlp = tile.branches + 2 * Tile::kMap;
#pragma unroll 1
  for (int first = 0; first < 2 * p.branch; first += 16) {
    const int count = 2 * p.branch - first < 16 ? 2 * p.branch - first : 16;
    const T* panels = stream.next(3 * Tile::kPanel);  // the previous hidden channels have been read
    float hidden[1][Inner::kTiles][4] = {}, grad_hidden[1][Inner::kTiles][4] = {};
    multiply_inner<Kind, Tile::kBranch, Tile>(panels, tile.other, hidden);
    multiply_inner<Kind, Tile::kBranch, Tile>(panels + Tile::kPanel, grad_mlp, grad_hidden);
#pragma unroll
    for (int n = 0; n < Inner::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float slope;
        hidden[0][n][i] = gelu_with_slope<T>(hidden[0][n][i], slope);
        grad_hidden[0][n][i] *= slope;
      }
    }
    store_fragments<Tile>(hidden, tile.chunk);
    store_fragments<Tile>(grad_hidden, tile.second);
    sync_block();
    multiply_inner<Kind, 16, Tile>(panels + 2 * Tile::kPanel, tile.second, grad);
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.second, count), tile.rows(tile.other, p.branch),
                                     of_in + first * line_in, line_in);
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(grad_mlp, p.branch), tile.rows(tile.chunk, count),
                                     of_out + first, line_out, kTileWarps / 2);
  }
}

// Backward of the three branches, whose gradients fusion_backward has left in `branches`.
template <class Kind, int kChannelTiles, class Tile>
MIRAGE_DEVICE void branches_backward(const MixerBackwardArguments& p, const Corner& at, bool is_first,
                                     bool is_first_of_sample, float* sums, typename Tile::Stream& stream, Tile& tile) {
  using Inner = typename Tile::Inner;
  const MixerSumsAt places(p);
  {
    MixerFragments<Tile> grad = {};
    multiply_steps<Kind, Tile>(stream, tile.branches, Tile::kPanel, grad);  // begins with a barrier
    store_map<Tile>(p, at, grad, p.grad_v);
    add_attention<Kind>(p, is_first_of_sample, p.fusion.of(block_index(), at.sample), tile);
  }
  {
    const auto* grad_conv = tile.branches + Tile::kMap;
    MixerFragments<Tile> grad = {};
    multiply_steps<Kind, Tile>(stream, grad_conv, 3 * Tile::kPanel, grad);
    store_map<Tile>(p, at, grad, p.grad_total);
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(grad_conv, p.branch), tile.rows(tile.scaled, p.branch),
                                     sums + places.proj_out, round_up_to_8(p.branch));
  }
  load_third<Inner, kChannelTiles>(p, at, 2, tile.other);  // v has been read, two barriers ago
  MixerFragments<Tile> grad = {};
  mlp_backward<Kind>(p, is_first, sums + places.mlp_in, sums + places.mlp_out, stream, tile, grad);
  store_map<Tile>(p, at, grad, p.grad_n3);
}

template <class Kind, int kChannelTiles, int kRows>
MIRAGE_KERNEL(256, mixer_fusion_blocks(kChannelTiles)) mixer_fusion_backward_kernel(const MixerBackwardArguments p) {
  using Tile = MixerFusionTile<Kind, kChannelTiles, kRows>;
  using T = typename Tile::T;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  TileWalk<kRows> walk(p, block_index(), p.fusion.blocks);
  float* sums = p.fusion.of_block(block_index());
  if (thread_index() < 3 * kTileWarps) tile.grad_alphas[thread_index()] = 0.0f;
#pragma unroll 1
  for (; walk.left > 0; walk.next(p)) {
    const Corner at = walk.at;
    const bool is_first = walk.is_first, is_first_of_sample = walk.is_first_of_sample();
    sync_block();  // all threads have finished with the previous tile
    typename Tile::Stream stream({p, at.sample}, MixerFusionSteps<T, kChannelTiles>::all(p), Tile::Forward::kFirst,
                                 tile.steps);
    {
      T* content = map_of<T>(p, p.content, at.sample);
      const auto keep = [&](int channel, int pixel, const auto& run) {
        const int row = at.row + pixel / 16, column = at.column + pixel % 16;
        if (row >= p.height) return;
        T* to = opaque_global(content + channel * p.plane() + int64_t(row) * p.width + column);
#pragma unroll
        for (int j = 0; j < Tile::kRun; ++j) {
          if (column + j < p.width) to[j] = from_float<T>(run[j]);
        }
      };
      recompute_branches<Kind, kChannelTiles>(p, at, stream, tile, keep);
    }
    sync_block();
    fuse_stored(p, alphas_of<kChannelTiles>(p), tile);
    {
      MixerFragments<Tile> grad[3] = {};
      project_out_backward<Kind>(p, at, is_first, sums, stream, tile, grad);
      fusion_backward(alphas_of<kChannelTiles>(p), grad, tile);
    }
    branches_backward<Kind, kChannelTiles>(p, at, is_first, is_first_of_sample, sums, stream, tile);
  }
  if (thread_index() >= 3) return;  // there were barriers since, in the steps of the last tile
  float sum = 0.0f;
  for (int warp = 0; warp < kTileWarps; ++warp) sum += tile.grad_alphas[3 * warp + thread_index()];
  sums[MixerSumsAt(p).alphas + thread_index()] = sum;
}

}  // namespace mirage::cuda
