// The weights of mixer_fuse as it wants them: one step after the other, at equal distances, in the order in which a tile
// takes them, each made of panels (products.h). A block copies them as they lie, one step ahead of the products.
//
//   steps           what                                         panels
//   kBlocks         v: 16 rows, and their taps                   16 x c
//   kBlocks         attention, of the sample                     c x 16 (columns)
//   kBlocks         gic1 of the detail                           c x 16
//   gate_steps      gic1: gate and, of the identity, value;      16 x c, 16 x c, c x 16; or without the second
//                   gic2
//   kBlocks         proj_out                                     c x 16
//   mlp_steps       mlp_in, mlp_out                              16 x c, c x 16
//   out_steps       project_out                                  3c x 16
//
// c is a branch's channels in sixteens, kBlocks of them. Behind the steps are the generated kernels of each sample, with
// lines of eight taps. mixer_finalise writes all of this.
#pragma once

#include "common/cuda/copies.h"
#include "shared.h"

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

// Elements of a panel, and from one step to the next; floats before the steps: weight and bias of the layer norm [3c each]
// and of BatchNorm [c each], temperature, alphas. c in sixteens.
MIRAGE_ANYWHERE constexpr int mixer_panel(int blocks) { return 16 * 16 * blocks; }
MIRAGE_ANYWHERE constexpr int mixer_step(int blocks) { return 3 * mixer_panel(blocks); }
MIRAGE_ANYWHERE constexpr int mixer_scalars(int blocks) { return 8 * 16 * blocks; }
MIRAGE_ANYWHERE constexpr int mixer_floats(int blocks) { return mixer_scalars(blocks) + 4; }

// Floats of the taps of 16 channels, 12 for each.
constexpr int kMixerTapsOfStep = 16 * 12;

// Floats of a generated kernel: seven lines of seven taps, each with one more.
constexpr int kMixerLine = 8, kMixerKernel = 7 * kMixerLine;

// Of tap i of a sample's kernels [c, 49], among these.
MIRAGE_DEVICE int place_of_tap(int i) {
  return i / kMixerTaps * kMixerKernel + i % kMixerTaps / 7 * kMixerLine + i % 7;
}

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

// A matrix [c, c] in which a channel meets those of its head, value(row, column), as steps of 16 columns each.
template <class Kind, class Value>
MIRAGE_DEVICE void pack_heads(const MixerArguments& p, typename Kind::Element* steps, Value value) {
  const int blocks = MixerSteps::sixteens(p.branch), depth = p.depth();
  for (int i = 0; i < blocks; ++i) {
    pack_panel<Kind, kTileThreads, 4>(steps + int64_t(i) * mixer_step(blocks), 16 * blocks, 16, [&](int row, int k) {
      const int column = 16 * i + k;
      const bool together = row < p.branch && column < p.branch && row / depth == column / depth;
      return together ? value(row, column) : 0.0f;
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

// A panel of a step: a part of a matrix or the transpose of one, zero beyond, filled up to rows x depth.
template <class W>
struct PanelOf {
  Block<W> from;
  int rows, depth;
  bool transposed = false;
};

// The panels of a step, one after the other; those without rows are none.
template <class W>
struct StepOf {
  PanelOf<W> panels[3];
};

template <class W>
MIRAGE_DEVICE StepOf<W> step_of(const MixerArguments& p, const MixerSteps& steps, int i) {
  const int c = p.branch, padded = 16 * steps.blocks, hidden = p.hidden;
  const W *gic1 = static_cast<const W*>(p.gic1), *gic2 = static_cast<const W*>(p.gic2);
  if (i < steps.blocks) {
    return {{{{static_cast<const W*>(p.qkv), c, 2 * c + 16 * i, 0, c - 16 * i, c}, 16, padded}}};
  }
  i -= steps.blocks;
  if (i < steps.blocks) return {{{{gic1, c, 2 * hidden - c, 16 * i, c, c - 16 * i}, padded, 16}}};
  i -= steps.blocks;
  if (i < steps.gate) {
    const int first = steps.gate_first(p, i), rows = steps.gate_rows(p, i);
    const PanelOf<W> gates{{gic1, c, first, 0, rows, c}, 16, padded}, out{{gic2, hidden, 0, first, c, rows}, padded, 16};
    if (i >= steps.identities) return {{gates, out}};
    return {{gates, {{gic1, c, hidden + first, 0, rows, c}, 16, padded}, out}};
  }
  i -= steps.gate;
  if (i < steps.blocks) return {{{{static_cast<const W*>(p.proj_out), c, 0, 16 * i, c, c - 16 * i}, padded, 16}}};
  i -= steps.blocks;
  if (i < steps.mlp) {
    const int rows = 2 * c - 16 * i;
    return {{{{static_cast<const W*>(p.mlp_in), c, 16 * i, 0, rows, c}, 16, padded},
             {{static_cast<const W*>(p.mlp_out), 2 * c, 0, 16 * i, c, rows}, padded, 16}}};
  }
  i -= steps.mlp;
  return {{{{static_cast<const W*>(p.project_out), 3 * c, 0, 16 * i, 3 * c, 3 * c - 16 * i}, 3 * padded, 16}}};
}

// Where the panels end.
template <class Kind, class W>
MIRAGE_DEVICE typename Kind::Element* pack_panels(const StepOf<W>& of, typename Kind::Element* to) {
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const PanelOf<W>& panel = of.panels[j];
    const Block<W>& from = panel.from;
    pack_panel<Kind, kTileThreads, 4>(to, panel.rows, panel.depth, [&](int i, int k) {
      const int row = panel.transposed ? k : i, column = panel.transposed ? i : k;
      const bool exists = row < from.rows && column < from.columns;
      return exists ? to_float(from.data[int64_t(from.row + row) * from.stride + from.column + column]) : 0.0f;
    });
    to += panel.rows * panel.depth;
  }
  return to;
}

// Depthwise taps of 16 channels of `third` of q, k, v, behind the panels of a step.
template <class W, class T>
MIRAGE_DEVICE void pack_taps(const MixerArguments& p, int third, int first, T* to) {
  const auto taps = p.weights<W>(p.qkv_dwconv);
  float* floats = reinterpret_cast<float*>(to);
  for (int j = thread_index(); j < 16 * 9; j += kTileThreads) {
    const int channel = first + j / 9;
    floats[j / 9 * 12 + j % 9] = channel < p.branch ? taps[int64_t(third * p.branch + channel) * 9 + j % 9] : 0.0f;
  }
}

// Step `step` of the weights.
template <class Kind, class W>
MIRAGE_DEVICE void pack_step(const MixerArguments& p, int step) {
  using T = typename Kind::Element;
  const MixerSteps steps(p);
  T* to = mixer_weight_steps<T>(p) + int64_t(step) * mixer_step(steps.blocks);
  to = pack_panels<Kind, W>(step_of<W>(p, steps, step), to);
  if (step < steps.blocks) pack_taps<W>(p, 2, 16 * step, to);
}

// ---- reading -------------------------------------------------------------------------------------------------------

// A block's way through `count` steps, each of which it finds in one of two buffers while the next is on its way to the
// other. Where: kPanels, the most that a step has; and jump(i, from), which sets `from` where step i does not lie behind the
// one before it.
template <class T, int kBlocks, class Where>
class PanelStream {
 public:
  using Steps = Where;
  static constexpr int kPanel = mixer_panel(kBlocks), kStep = Where::kPanels * kPanel;

  // Of the first step `elements` are wanted.
  MIRAGE_DEVICE PanelStream(const Where& where, int count, int elements, T (&buffers)[2][kStep])
      : where_(where), buffers_(buffers), count_(count) {
    fetch(elements);
  }

  // The next step; of the one behind it `following` elements will be wanted. A barrier for the block: what any thread has
  // written before it is there for all, and the step before is read no more.
  MIRAGE_DEVICE const T* next(int following) {
    wait_for_copies();
    sync_block();
    const T* const found = buffers_[step_ & 1];
    ++step_, from_ += mixer_step(kBlocks);
    if (step_ < count_) fetch(following);
    return found;
  }

 private:
  MIRAGE_DEVICE void fetch(int elements) {
    where_.jump(step_, from_);
    copy_to_block<kTileThreads>(buffers_[step_ & 1], from_, elements);
  }

  const Where where_;
  const T* from_ = nullptr;
  T (&buffers_)[2][kStep];
  int count_, step_ = 0;
};

// The steps of forward: those of the sample's attention stand between the others.
template <class T, int kBlocks>
struct MixerForwardSteps {
  static constexpr int kPanels = 3, kFirst = mixer_panel(kBlocks) + kMixerTapsOfStep * int(sizeof(float) / sizeof(T));
  const MixerArguments& p;
  int sample;

  MIRAGE_DEVICE void jump(int i, const T*& from) const {
    if (i == 0) from = mixer_weight_steps<T>(p);
    if (i == kBlocks) from = mixer_attention_steps<T>(p, sample);
    if (i == 2 * kBlocks) from = mixer_weight_steps<T>(p) + kBlocks * mixer_step(kBlocks);
  }
};

}  // namespace mirage::cuda
