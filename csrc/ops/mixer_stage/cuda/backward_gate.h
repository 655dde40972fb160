// The kernel of mixer_stage's backward for gic2 and the gate of the gated CNN. It works pixel by pixel, as the kernel
// `fusion` has stored the convolved detail.
#pragma once

#include "backward_pack.h"
#include "common/cuda/sums.h"
#include "fuse.h"

namespace mirage::cuda {

// Two steps for each 16 channels of the gate.
template <class T, int kChannelTiles>
struct MixerGateSteps {
  static constexpr int kPanels = 3;
  const MixerBackwardArguments& p;

  MIRAGE_DEVICE void jump(int i, const T*& from) const {
    if (i == 0) from = mixer_backward_step<T>(p, MixerBackwardSteps(p).gate);
  }
};

template <class Kind, int kChannelTiles, int kRows>
struct MixerGateTile {
  using T = typename Kind::Element;
  using Inner = Window<kRows, 0>;
  using Stream = PanelStream<T, kChannelTiles, MixerGateSteps<T, kChannelTiles>>;
  static constexpr int kBranch = 16 * kChannelTiles, kPanel = 16 * kBranch, kMap = kBranch * Inner::kPitch;

  alignas(16) T normal[kMap];                 // BatchNorm of n2
  alignas(16) T grad_total[kMap];
  alignas(16) T product[16 * Inner::kPitch];  // input of gic2
  alignas(16) T grad_gate[16 * Inner::kPitch];
  alignas(16) T grad_content[16 * Inner::kPitch];
  alignas(16) T steps[2][Stream::kStep];

  MIRAGE_DEVICE PixelRows<T> rows(const T* map, int channels) const { return {map, Inner::kPitch, channels}; }
};

template <class Tile>
using MixerChunk = float[1][Tile::Inner::kTiles][4];

// Gate backward for 16 channels. In: pre-activation `gates`, `contents`, and d(product) in `product`. Out: d(gates) and
// d(contents) in place, and the product itself, the input of gic2, in `product`. Accumulates -temperature *
// d(temperature) into `grad_temperature`.
template <class Tile>
MIRAGE_DEVICE void gate_backward_chunk(float inverse, float scale, MixerChunk<Tile>& gates, MixerChunk<Tile>& contents,
                                       MixerChunk<Tile>& product, float& grad_temperature) {
#pragma unroll
  for (int n = 0; n < Tile::Inner::kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float gate = gates[0][n][i] * inverse, content = contents[0][n][i], grad = product[0][n][i] * scale;
      float slope;
      const float open = gelu_with_slope<typename Tile::T>(gate, slope), grad_gate = grad * content * slope;
      grad_temperature = fmaf(grad_gate, gate, grad_temperature);
      gates[0][n][i] = grad_gate * inverse;
      contents[0][n][i] = grad * open;
      product[0][n][i] = open * content * scale;
    }
  }
}

template <class Kind, class Tile>
MIRAGE_DEVICE void gate_backward(const MixerBackwardArguments& p, const Corner& at, bool is_first, float temperature,
                                 float* sums, Tile& tile, MixerFragments<Tile>& grad, float& grad_temperature) {
  using T = typename Tile::T;
  using Inner = typename Tile::Inner;
  const MixerSteps steps(p);
  const MixerSumsAt places(p);
  const int line = round_up_to_8(p.branch), line_out = 16 * steps.gate;
  const float scale = p.branch_scale ? p.branch_scale[at.sample] : 1.0f;
  typename Tile::Stream stream({p}, 2 * steps.gate, 3 * Tile::kPanel, tile.steps);
#pragma unroll 1
  for (int i = 0; i < steps.gate; ++i) {
    const bool identity = i < steps.identities;
    const int first = steps.gate_first(p, i), count = steps.gate_rows(p, i), detail = 16 * (i - steps.identities);
    const T* panels = stream.next(2 * Tile::kPanel);  // the previous chunks have been read
    MixerChunk<Tile> gates = {}, contents = {}, product = {};
    multiply_inner<Kind, Tile::kBranch, Tile>(panels, tile.normal, gates);
    multiply_inner<Kind, Tile::kBranch, Tile>(panels + 2 * Tile::kPanel, tile.grad_total, product);
    if (identity) {
      multiply_inner<Kind, Tile::kBranch, Tile>(panels + Tile::kPanel, tile.normal, contents);
    } else {
      const T* from = map_of<T>(p, p.content, at.sample) + detail * p.plane();
      for_in_bounds<Tile>(p, at, count, from, contents,
                          [](const T& content, float& value) { value = to_float(content); });
    }
    gate_backward_chunk<Tile>(1.0f / temperature, scale, gates, contents, product, grad_temperature);
    store_fragments<Tile>(product, tile.product);
    store_fragments<Tile>(gates, tile.grad_gate);
    if (identity) {
      store_fragments<Tile>(contents, tile.grad_content);
    } else {
      T* to = map_of<T>(p, p.grad_content, at.sample) + detail * p.plane();
      for_in_bounds<Tile>(p, at, count, to, contents,
                          [](T& grad_content, float value) { grad_content = from_float<T>(value); });
    }
    panels = stream.next(3 * Tile::kPanel);
    multiply_inner<Kind, 16, Tile>(panels, tile.grad_gate, grad);
    if (identity) multiply_inner<Kind, 16, Tile>(panels + Tile::kPanel, tile.grad_content, grad);
    const auto normal = tile.rows(tile.normal, p.branch);
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.grad_total, p.branch), tile.rows(tile.product, count),
                                     sums + places.gic2 + 16 * i, line_out);
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.grad_gate, count), normal,
                                     sums + places.gic1 + first * line, line, 3);
    if (!identity) continue;
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.grad_content, count), normal,
                                     sums + places.gic1 + (p.hidden + first) * line, line, 6);
  }
}

template <class Kind, int kChannelTiles, int kRows>
MIRAGE_KERNEL(256, mixer_gate_blocks(kChannelTiles)) mixer_gate_backward_kernel(const MixerBackwardArguments p) {
  using Tile = MixerGateTile<Kind, kChannelTiles, kRows>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  TileWalk<kRows> walk(p, block_index(), p.gate.blocks);
  float* sums = p.gate.of_block(block_index());
  float grad_temperature = 0.0f;
#pragma unroll 1
  for (; walk.left > 0; walk.next(p)) {
    const Corner at = walk.at;
    sync_block();  // all threads have finished with the previous tile
    load_third<typename Tile::Inner, kChannelTiles>(p, at, 1, tile.normal, MixerBatchNorm(p));
    load_map<typename Tile::Inner, kChannelTiles>(p, at, p.grad_total, tile.grad_total);
    MixerFragments<Tile> grad = {};
    gate_backward<Kind>(p, at, walk.is_first, p.packed[mixer_scalars(kChannelTiles)], sums, tile, grad,
                        grad_temperature);
    store_map<Tile>(p, at, grad, p.grad_bn);
  }
  grad_temperature = block_all_reduce_sum<kTileThreads>(grad_temperature, reinterpret_cast<float*>(tile.steps));
  if (thread_index() == 0) sums[MixerSumsAt(p).gate_temperature] = grad_temperature;
}

}  // namespace mirage::cuda
