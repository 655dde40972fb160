// The weights of mixer_fuse as it wants them: one step after the other of equal size, in the order in which a tile takes
// them, each made of panels (products.h). A block copies them as they lie, one step ahead of the products.
//
//   steps           what                                         panels
//   kBlocks         v: 16 rows, and their taps                   16 x c
//   kBlocks         attention, of the sample                     c x 16 (columns)
//   kBlocks         gic1 of the detail                           c x 16
//   gate_steps      gic1: gate and, of the identity, value;      16 x c, 16 x c, c x 16
//                   gic2
//   kBlocks         proj_out                                     c x 16
//   mlp_steps       mlp_in, mlp_out                              16 x c, c x 16
//   out_steps       project_out                                  3c x 16
//
// c is a branch's channels in sixteens, kBlocks of them. Behind the steps are the generated kernels of each sample, with
// lines of eight taps. mixer_finalise writes all of this.
#pragma once

#include "copies.h"
#include "mixer_stage.h"

namespace mirage::cuda {

// Steps: how many there are of each kind, and where they are in memory.
struct MixerSteps {
  int blocks, identities, gate, mlp, out;

  MIRAGE_ANYWHERE static int sixteens(int channels) { return (channels + 15) / 16; }

  MIRAGE_ANYWHERE explicit MixerSteps(const MixerArguments& p)
      : blocks(sixteens(p.branch)), identities(sixteens(p.hidden - p.branch)), gate(identities + blocks),
        mlp(sixteens(2 * p.branch)), out(sixteens(3 * p.branch)) {}

  // Those that are the same for all samples; attention has `blocks` for each sample.
  MIRAGE_ANYWHERE int of_weights() const { return 3 * blocks + gate + mlp + out; }
  MIRAGE_ANYWHERE int all() const { return of_weights() + blocks; }

  // The first channel of a gate's step, and how many it has.
  MIRAGE_ANYWHERE int gate_first(const MixerArguments& p, int i) const {
    return i < identities ? 16 * i : p.hidden - p.branch + 16 * (i - identities);
  }
  MIRAGE_ANYWHERE int gate_rows(const MixerArguments& p, int i) const {
    const int left = (i < identities ? p.hidden - p.branch : p.hidden) - gate_first(p, i);
    return left < 16 ? left : 16;
  }
};

// Elements of a step; floats before the steps: weight and bias of the layer norm [3c each] and of BatchNorm [c each],
// temperature, alphas. c in sixteens.
MIRAGE_ANYWHERE constexpr int mixer_step(int blocks) { return 48 * 16 * blocks; }
MIRAGE_ANYWHERE constexpr int mixer_scalars(int blocks) { return 8 * 16 * blocks; }
MIRAGE_ANYWHERE constexpr int mixer_floats(int blocks) { return mixer_scalars(blocks) + 4; }

// Floats of a generated kernel: seven lines of seven taps, each with one more.
constexpr int kMixerLine = 8, kMixerKernel = 7 * kMixerLine;

// Of element size `size`, of a whole batch.
inline int64_t mixer_packed_bytes(const MixerArguments& p, int64_t size) {
  const MixerSteps steps(p);
  const int64_t all = steps.of_weights() + int64_t(p.batch) * steps.blocks;
  const int64_t floats = mixer_floats(steps.blocks) + int64_t(p.batch) * 16 * steps.blocks * kMixerKernel;
  return floats * int64_t(sizeof(float)) + all * mixer_step(steps.blocks) * size;
}

// Beginning of the steps of weights, and of those of a sample's attention.
template <class T>
MIRAGE_ANYWHERE T* mixer_weight_steps(const MixerArguments& p) {
  return reinterpret_cast<T*>(p.packed + mixer_floats(MixerSteps::sixteens(p.branch)));
}
template <class T>
MIRAGE_ANYWHERE T* mixer_attention_steps(const MixerArguments& p, int sample) {
  const MixerSteps steps(p);
  return mixer_weight_steps<T>(p) + (steps.of_weights() + int64_t(sample) * steps.blocks) * mixer_step(steps.blocks);
}

// A sample's generated kernels, [c, kMixerKernel].
template <class T>
MIRAGE_ANYWHERE float* mixer_kernels(const MixerArguments& p, int sample) {
  const int blocks = MixerSteps::sixteens(p.branch);
  return reinterpret_cast<float*>(mixer_attention_steps<T>(p, p.batch)) + int64_t(sample) * 16 * blocks * kMixerKernel;
}

// ---- writing -------------------------------------------------------------------------------------------------------

// Part of a matrix [.., stride] from (row, column) on; zero beyond `rows` x `columns`.
template <class Kind, class W>
MIRAGE_DEVICE void pack_matrix(typename Kind::Element* panel, int padded_rows, int padded_columns, const Block<W>& block) {
  pack_panel<Kind, kTileThreads>(panel, padded_rows, padded_columns, [&](int row, int k) {
    const bool exists = row < block.rows && k < block.columns;
    return exists ? to_float(block.data[int64_t(block.row + row) * block.stride + block.column + k]) : 0.0f;
  });
}

// Columns 16 i ... of a sample's attention, in which a channel meets those of its head.
template <class Kind>
MIRAGE_DEVICE void pack_attention(const MixerArguments& p, int sample, const float* attention) {
  using T = typename Kind::Element;
  const int blocks = MixerSteps::sixteens(p.branch), depth = p.depth();
  T* steps = mixer_attention_steps<T>(p, sample);
  for (int i = 0; i < blocks; ++i) {
    pack_panel<Kind, kTileThreads>(steps + int64_t(i) * mixer_step(blocks), 16 * blocks, 16, [&](int row, int k) {
      const int column = 16 * i + k;
      const bool together = row < p.branch && column < p.branch && row / depth == column / depth;
      return together ? attention[row * depth + column % depth] : 0.0f;
    });
  }
}

template <class W>
MIRAGE_DEVICE void pack_floats(const MixerArguments& p) {
  const int c = p.branch, blocks = MixerSteps::sixteens(c), padded = 16 * blocks;
  const struct {
    const void* from;
    int size, at;
  } all[] = {{p.norm_weight, 3 * c, 0},
             {p.norm_bias, 3 * c, 3 * padded},
             {p.bn_weight, c, 6 * padded},
             {p.bn_bias, c, 7 * padded},
             {p.gate_temperature, 1, mixer_scalars(blocks)},
             {p.alpha_att, 1, mixer_scalars(blocks) + 1},
             {p.alpha_conv, 1, mixer_scalars(blocks) + 2},
             {p.alpha_mlp, 1, mixer_scalars(blocks) + 3}};
  for (const auto& [from, size, at] : all) {
    for (int i = thread_index(); i < size; i += kTileThreads) p.packed[at + i] = p.weights<W>(from)[i];
  }
}

// Step `step` of the weights.
template <class Kind, class W>
MIRAGE_DEVICE void pack_step(const MixerArguments& p, int step) {
  using T = typename Kind::Element;
  const MixerSteps steps(p);
  const int c = p.branch, padded = 16 * steps.blocks, panel = 16 * padded, hidden = p.hidden;
  T* to = mixer_weight_steps<T>(p) + int64_t(step) * mixer_step(steps.blocks);
  const W *gic1 = static_cast<const W*>(p.gic1), *gic2 = static_cast<const W*>(p.gic2);
  int i = step;
  if (i < steps.blocks) {
    pack_matrix<Kind, W>(to, 16, padded, {static_cast<const W*>(p.qkv), c, 2 * c + 16 * i, 0, c - 16 * i, c});
    const auto taps = p.weights<W>(p.qkv_dwconv);
    float* floats = reinterpret_cast<float*>(to + panel);
    for (int j = thread_index(); j < 16 * 9; j += kTileThreads) {
      const int channel = 16 * i + j / 9;
      floats[j / 9 * 12 + j % 9] = channel < c ? taps[int64_t(2 * c + channel) * 9 + j % 9] : 0.0f;
    }
    return;
  }
  i -= steps.blocks;
  if (i < steps.blocks) return pack_matrix<Kind, W>(to, padded, 16, {gic1, c, 2 * hidden - c, 16 * i, c, c - 16 * i});
  i -= steps.blocks;
  if (i < steps.gate) {
    const int first = steps.gate_first(p, i), rows = steps.gate_rows(p, i);
    pack_matrix<Kind, W>(to, 16, padded, {gic1, c, first, 0, rows, c});
    if (i < steps.identities) pack_matrix<Kind, W>(to + panel, 16, padded, {gic1, c, hidden + first, 0, rows, c});
    return pack_matrix<Kind, W>(to + 2 * panel, padded, 16, {gic2, hidden, 0, first, c, rows});
  }
  i -= steps.gate;
  if (i < steps.blocks) {
    return pack_matrix<Kind, W>(to, padded, 16, {static_cast<const W*>(p.proj_out), c, 0, 16 * i, c, c - 16 * i});
  }
  i -= steps.blocks;
  if (i < steps.mlp) {
    const int rows = 2 * c - 16 * i;
    pack_matrix<Kind, W>(to, 16, padded, {static_cast<const W*>(p.mlp_in), c, 16 * i, 0, rows, c});
    return pack_matrix<Kind, W>(to + panel, padded, 16, {static_cast<const W*>(p.mlp_out), 2 * c, 0, 16 * i, c, rows});
  }
  i -= steps.mlp;
  const Block<W> out{static_cast<const W*>(p.project_out), 3 * c, 0, 16 * i, 3 * c, 3 * c - 16 * i};
  pack_matrix<Kind, W>(to, 3 * padded, 16, out);
}

// ---- reading -------------------------------------------------------------------------------------------------------

// A block's way through the steps, each of which it finds in one of two buffers while the next is on its way to the other.
template <class T, int kBlocks>
class MixerStream {
 public:
  static constexpr int kStep = mixer_step(kBlocks);

  MIRAGE_DEVICE MixerStream(const MixerArguments& p, int sample, T (&buffers)[2][kStep])
      : weights_(mixer_weight_steps<T>(p)), attention_(mixer_attention_steps<T>(p, sample)), buffers_(buffers),
        steps_(MixerSteps(p).all()) {
    fetch();
  }

  // A barrier for the block: what any thread has written before it is there for all, and the step before is read no more.
  MIRAGE_DEVICE const T* next() {
    wait_for_copies();
    sync_block();
    const T* const found = buffers_[step_ & 1];
    ++step_;
    if (step_ < steps_) fetch();
    return found;
  }

 private:
  MIRAGE_DEVICE void fetch() {
    const T* from = step_ < kBlocks       ? weights_ + int64_t(step_) * kStep
                    : step_ < 2 * kBlocks ? attention_ + int64_t(step_ - kBlocks) * kStep
                                          : weights_ + int64_t(step_ - kBlocks) * kStep;
    copy_to_block<kTileThreads>(buffers_[step_ & 1], from);
  }

  const T *weights_, *attention_;
  T (&buffers_)[2][kStep];
  int steps_, step_ = 0;
};

}  // namespace mirage::cuda
