// The packed weights of mixer_fuse: steps at equal distances, in the order in which a tile uses them. A step is a stage
// of the software pipeline: one to three panels (gemm.h) that a block copies to shared memory, unchanged, while it
// multiplies those of the previous step.
//
//   steps          contents                                     panels
//   channel_tiles  v: 16 rows, and their taps                   16 x c
//   channel_tiles  attention of the sample                      c x 16 (columns)
//   channel_tiles  gic1 of the detail                           c x 16
//   gate_steps     gic1: gate and, for the identity, value;     16 x c, 16 x c, c x 16; or without the second
//                  gic2
//   channel_tiles  proj_out                                     c x 16
//   mlp_steps      mlp_in, mlp_out                              16 x c, c x 16
//   out_steps      project_out                                  3c x 16
//
// c is a branch's channels rounded up to 16, channel_tiles of 16 each. Behind the steps are the generated kernels of
// each sample, in lines of eight taps. mixer_finalise writes all of this.
#pragma once

#include "common/cuda/copies.h"
#include "shared.h"

namespace mirage::cuda {

// The number of steps of each kind.
struct MixerSteps {
  int channel_tiles, identities, gate, mlp, out;

  MIRAGE_ANYWHERE static int channel_tiles_of(int channels) { return (channels + 15) / 16; }

  MIRAGE_ANYWHERE explicit MixerSteps(const MixerArguments& p)
      : channel_tiles(channel_tiles_of(p.branch)),
        identities(channel_tiles_of(p.hidden - p.branch)),
        gate(identities + channel_tiles),
        mlp(channel_tiles_of(2 * p.branch)),
        out(channel_tiles_of(3 * p.branch)) {}

  // Steps that all samples share; the attention has `channel_tiles` more for each sample.
  MIRAGE_ANYWHERE int of_weights() const { return 3 * channel_tiles + gate + mlp + out; }
  MIRAGE_ANYWHERE int all() const { return of_weights() + channel_tiles; }

  // The first channel of a step of the gate, and how many channels it has.
  MIRAGE_ANYWHERE int gate_first(const MixerArguments& p, int i) const {
    return i < identities ? 16 * i : p.hidden - p.branch + 16 * (i - identities);
  }
  MIRAGE_ANYWHERE int gate_rows(const MixerArguments& p, int i) const {
    const int left = (i < identities ? p.hidden - p.branch : p.hidden) - gate_first(p, i);
    return left < 16 ? left : 16;
  }
};

// Elements of a panel of c channels, and between steps. Floats in front of the steps: weight and bias of the layer norm
// [3c each] and of BatchNorm [c each], temperature, alphas; c is rounded up to 16.
MIRAGE_ANYWHERE constexpr int mixer_panel(int channel_tiles) { return 16 * 16 * channel_tiles; }
MIRAGE_ANYWHERE constexpr int mixer_step(int channel_tiles) { return 3 * mixer_panel(channel_tiles); }
MIRAGE_ANYWHERE constexpr int mixer_scalars(int channel_tiles) { return 8 * 16 * channel_tiles; }
MIRAGE_ANYWHERE constexpr int mixer_floats(int channel_tiles) { return mixer_scalars(channel_tiles) + 4; }

// Floats of the taps of 16 channels, twelve per channel.
constexpr int kMixerTapsOfStep = 16 * 12;

// Floats of a generated kernel: seven lines of seven taps and one float of padding.
constexpr int kMixerLine = 8, kMixerKernel = 7 * kMixerLine;

// The index in them of tap i of a sample's kernels [c, 49].
MIRAGE_DEVICE int place_of_tap(int i) {
  return i / kMixerTaps * kMixerKernel + i % kMixerTaps / 7 * kMixerLine + i % 7;
}

// Bytes for a whole batch, with elements of `size` bytes.
inline int64_t mixer_packed_bytes(const MixerArguments& p, int64_t size) {
  const MixerSteps steps(p);
  const int64_t all = steps.of_weights() + int64_t(p.batch) * steps.channel_tiles;
  const int64_t floats = mixer_floats(steps.channel_tiles) + int64_t(p.batch) * 16 * steps.channel_tiles * kMixerKernel;
  return floats * int64_t(sizeof(float)) + all * mixer_step(steps.channel_tiles) * size;
}

// The first step of the weights, and the first of a sample's attention.
template <class T>
MIRAGE_ANYWHERE T* mixer_weight_steps(const MixerArguments& p) {
  return reinterpret_cast<T*>(p.packed + mixer_floats(MixerSteps::channel_tiles_of(p.branch)));
}
template <class T>
MIRAGE_ANYWHERE T* mixer_attention_steps(const MixerArguments& p, int sample) {
  const MixerSteps steps(p);
  return mixer_weight_steps<T>(p) +
         (steps.of_weights() + int64_t(sample) * steps.channel_tiles) * mixer_step(steps.channel_tiles);
}

// A sample's generated kernels, [c, kMixerKernel].
template <class T>
MIRAGE_ANYWHERE float* mixer_kernels(const MixerArguments& p, int sample) {
  const int channel_tiles = MixerSteps::channel_tiles_of(p.branch);
  return reinterpret_cast<float*>(mixer_attention_steps<T>(p, p.batch)) +
         int64_t(sample) * 16 * channel_tiles * kMixerKernel;
}

// ---- writing -------------------------------------------------------------------------------------------------------

// Packs a block-diagonal matrix [c, c], in which channels of a head meet, as steps of 16 columns. value(row, column)
// provides its elements.
template <class Kind, class Value>
MIRAGE_DEVICE void pack_heads(const MixerArguments& p, typename Kind::Element* steps, Value value) {
  const int channel_tiles = MixerSteps::channel_tiles_of(p.branch), depth = p.depth();
  for (int i = 0; i < channel_tiles; ++i) {
    pack_panel<Kind, kTileThreads, 4>(
        steps + int64_t(i) * mixer_step(channel_tiles), 16 * channel_tiles, 16, [&](int row, int k) {
          const int column = 16 * i + k;
          const bool together = row < p.branch && column < p.branch && row / depth == column / depth;
          return together ? value(row, column) : 0.0f;
        });
  }
}

template <class W>
MIRAGE_DEVICE void pack_floats(const MixerArguments& p) {
  const int c = p.branch, channel_tiles = MixerSteps::channel_tiles_of(c), padded = 16 * channel_tiles;
  const struct {
    const void* from;
    int size, at;
  } all[] = {{p.norm_weight, 3 * c, 0},
             {p.norm_bias, 3 * c, 3 * padded},
             {p.bn_weight, c, 6 * padded},
             {p.bn_bias, c, 7 * padded},
             {p.gate_temperature, 1, mixer_scalars(channel_tiles)},
             {p.alpha_att, 1, mixer_scalars(channel_tiles) + 1},
             {p.alpha_conv, 1, mixer_scalars(channel_tiles) + 2},
             {p.alpha_mlp, 1, mixer_scalars(channel_tiles) + 3}};
  for (const auto& [from, size, at] : all) {
    for (int i = thread_index(); i < size; i += kTileThreads) p.packed[at + i] = p.weights<W>(from)[i];
  }
}

// A panel of a step: a block of a matrix or its transpose, padded with zeros to rows x depth.
template <class W>
struct PanelOf {
  Block<W> from;
  int rows, depth;
  bool transposed = false;
};

// The panels of a step, one after the other; those without rows do not exist.
template <class W>
struct StepOf {
  PanelOf<W> panels[3];
};

template <class W>
MIRAGE_DEVICE StepOf<W> step_of(const MixerArguments& p, const MixerSteps& steps, int i) {
  const int c = p.branch, padded = 16 * steps.channel_tiles, hidden = p.hidden;
  const W *gic1 = static_cast<const W*>(p.gic1), *gic2 = static_cast<const W*>(p.gic2);
  if (i < steps.channel_tiles) {
    return {{{{static_cast<const W*>(p.qkv), c, 2 * c + 16 * i, 0, c - 16 * i, c}, 16, padded}}};
  }
  i -= steps.channel_tiles;
  if (i < steps.channel_tiles) return {{{{gic1, c, 2 * hidden - c, 16 * i, c, c - 16 * i}, padded, 16}}};
  i -= steps.channel_tiles;
  if (i < steps.gate) {
    const int first = steps.gate_first(p, i), rows = steps.gate_rows(p, i);
    const PanelOf<W> gates{{gic1, c, first, 0, rows, c}, 16, padded},
        out{{gic2, hidden, 0, first, c, rows}, padded, 16};
    if (i >= steps.identities) return {{gates, out}};
    return {{gates, {{gic1, c, hidden + first, 0, rows, c}, 16, padded}, out}};
  }
  i -= steps.gate;
  if (i < steps.channel_tiles)
    return {{{{static_cast<const W*>(p.proj_out), c, 0, 16 * i, c, c - 16 * i}, padded, 16}}};
  i -= steps.channel_tiles;
  if (i < steps.mlp) {
    const int rows = 2 * c - 16 * i;
    return {{{{static_cast<const W*>(p.mlp_in), c, 16 * i, 0, rows, c}, 16, padded},
             {{static_cast<const W*>(p.mlp_out), 2 * c, 0, 16 * i, c, rows}, padded, 16}}};
  }
  i -= steps.mlp;
  return {{{{static_cast<const W*>(p.project_out), 3 * c, 0, 16 * i, 3 * c, 3 * c - 16 * i}, 3 * padded, 16}}};
}

// Writes the panels of a step, and returns where they end.
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

// Packs the depthwise taps of 16 channels of `third` of q, k, v, behind the panels of a step.
template <class W, class T>
MIRAGE_DEVICE void pack_taps(const MixerArguments& p, int third, int first, T* to) {
  const auto taps = p.weights<W>(p.qkv_dwconv);
  float* floats = reinterpret_cast<float*>(to);
  for (int j = thread_index(); j < 16 * 9; j += kTileThreads) {
    const int channel = first + j / 9;
    floats[j / 9 * 12 + j % 9] = channel < p.branch ? taps[int64_t(third * p.branch + channel) * 9 + j % 9] : 0.0f;
  }
}

// Packs step `step` of the weights.
template <class Kind, class W>
MIRAGE_DEVICE void pack_step(const MixerArguments& p, int step) {
  using T = typename Kind::Element;
  const MixerSteps steps(p);
  T* to = mixer_weight_steps<T>(p) + int64_t(step) * mixer_step(steps.channel_tiles);
  to = pack_panels<Kind, W>(step_of<W>(p, steps, step), to);
  if (step < steps.channel_tiles) pack_taps<W>(p, 2, 16 * step, to);
}

// ---- reading -------------------------------------------------------------------------------------------------------

// Double-buffered walk of a block through `count` steps: each is in one of two buffers while the next one is being
// copied to the other. Where provides kPanels, the most panels of a step, and jump(i, from), which sets `from` if step
// i does not follow the one before it in memory.
template <class T, int kChannelTiles, class Where>
class PanelStream {
 public:
  using Steps = Where;
  static constexpr int kPanel = mixer_panel(kChannelTiles), kStep = Where::kPanels * kPanel;

  // `elements`: how many are needed of the first step.
  MIRAGE_DEVICE PanelStream(const Where& where, int count, int elements, T (&buffers)[2][kStep])
      : where_(where), buffers_(buffers), count_(count) {
    fetch(elements);
  }

  // Returns the next step, and starts copying `following` elements of the one after it. Acts as a block barrier: what
  // threads wrote before is visible to all, and the previous step is no longer read.
  MIRAGE_DEVICE const T* next(int following) {
    wait_for_copies();
    sync_block();
    const T* const found = buffers_[step_ & 1];
    ++step_, from_ += mixer_step(kChannelTiles);
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

// The steps of forward: those of the sample's attention come in between the shared ones.
template <class T, int kChannelTiles>
struct MixerForwardSteps {
  static constexpr int kPanels = 3,
                       kFirst = mixer_panel(kChannelTiles) + kMixerTapsOfStep * int(sizeof(float) / sizeof(T));
  const MixerArguments& p;
  int sample;

  MIRAGE_DEVICE void jump(int i, const T*& from) const {
    if (i == 0) from = mixer_weight_steps<T>(p);
    if (i == kChannelTiles) from = mixer_attention_steps<T>(p, sample);
    if (i == 2 * kChannelTiles) from = mixer_weight_steps<T>(p) + kChannelTiles * mixer_step(kChannelTiles);
  }
};

}  // namespace mirage::cuda
