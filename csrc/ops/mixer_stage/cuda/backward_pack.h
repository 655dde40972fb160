// The packed weights that the kernels of mixer_stage's backward read, besides those of forward: steps of panels as in
// pack.h, in this order:
//
//   steps            contents                                                      panels
//   out_steps        project_out transposed: 16 channels of grad_y to each branch  c x 16, c x 16, c x 16
//   channel_tiles    proj_out transposed                                           c x 16
//   mlp_steps        mlp_in; mlp_out and mlp_in transposed                         16 x c, 16 x c, c x 16
//   2 gate_steps     gic1: gate and, for the identity, value; gic2 transposed;     16 x c, 16 x c, 16 x c
//                    the first two transposed                                      c x 16, c x 16
//   channel_tiles    gic1 of the detail, transposed                                c x 16
//   3 channel_tiles  q, then k, then v: rows of qkv, the same transposed           16 x c, c x 16
//
// Then for each sample, c x 16 each: the attention transposed, the gradient of q k^T and its transpose (these two are
// written by attention_backward, with each row divided by its largest element). Behind all steps are the taps of q, k
// and v, 12 floats for each of c channels, rounded up to 16.
#pragma once

#include "backward.h"

namespace mirage::cuda {

struct MixerBackwardSteps {
  MixerSteps forward;
  int out, proj, mlp, gate, detail, qkv, weights;  // the first step of each kind; the number of steps

  MIRAGE_ANYWHERE explicit MixerBackwardSteps(const MixerArguments& p)
      : forward(p),
        out(0),
        proj(forward.out),
        mlp(proj + forward.channel_tiles),
        gate(mlp + forward.mlp),
        detail(gate + 2 * forward.gate),
        qkv(detail + forward.channel_tiles),
        weights(qkv + 3 * forward.channel_tiles) {}

  // The index of a sample's first step of a kind: 0 is the attention, 1 the gradient of q k^T, 2 its transpose.
  MIRAGE_ANYWHERE int64_t of_sample(int sample, int kind) const {
    return weights + (int64_t(sample) * 3 + kind) * forward.channel_tiles;
  }
};

inline int64_t mixer_backward_packed_bytes(const MixerArguments& p, int64_t size) {
  const MixerBackwardSteps steps(p);
  const int64_t taps = 3 * 16 * steps.forward.channel_tiles * 12 * int64_t(sizeof(float));
  return steps.of_sample(p.batch, 0) * mixer_step(steps.forward.channel_tiles) * size + taps;
}

template <class T>
MIRAGE_ANYWHERE T* mixer_backward_step(const MixerBackwardArguments& p, int64_t step) {
  return reinterpret_cast<T*>(p.backward) + step * mixer_step(MixerSteps::channel_tiles_of(p.branch));
}

template <class W>
MIRAGE_DEVICE StepOf<W> backward_step_of(const MixerArguments& p, const MixerBackwardSteps& steps, int i) {
  const int c = p.branch, padded = 16 * steps.forward.channel_tiles, hidden = p.hidden;
  const W *gic1 = static_cast<const W*>(p.gic1), *mlp_in = static_cast<const W*>(p.mlp_in);
  if (i < steps.proj) {
    const W* project_out = static_cast<const W*>(p.project_out);
    return {{{{project_out, 3 * c, 16 * i, 0, 3 * c - 16 * i, c}, padded, 16, true},
             {{project_out, 3 * c, 16 * i, c, 3 * c - 16 * i, c}, padded, 16, true},
             {{project_out, 3 * c, 16 * i, 2 * c, 3 * c - 16 * i, c}, padded, 16, true}}};
  }
  if (i < steps.mlp) {
    i -= steps.proj;
    return {{{{static_cast<const W*>(p.proj_out), c, 16 * i, 0, c - 16 * i, c}, padded, 16, true}}};
  }
  if (i < steps.gate) {
    i -= steps.mlp;
    const int rows = 2 * c - 16 * i;
    return {{{{mlp_in, c, 16 * i, 0, rows, c}, 16, padded},
             {{static_cast<const W*>(p.mlp_out), 2 * c, 0, 16 * i, c, rows}, 16, padded, true},
             {{mlp_in, c, 16 * i, 0, rows, c}, padded, 16, true}}};
  }
  if (i < steps.detail) {
    const bool back = (i - steps.gate) % 2;
    i = (i - steps.gate) / 2;
    const int first = steps.forward.gate_first(p, i), rows = steps.forward.gate_rows(p, i);
    const int values = i < steps.forward.identities ? rows : 0;
    const Block<W> gates{gic1, c, first, 0, rows, c}, contents{gic1, c, hidden + first, 0, values, c};
    if (back) return {{{gates, padded, 16, true}, {contents, padded, 16, true}}};
    const Block<W> gic2{static_cast<const W*>(p.gic2), hidden, 0, first, c, rows};
    return {{{gates, 16, padded}, {contents, 16, padded}, {gic2, 16, padded, true}}};
  }
  if (i < steps.qkv) {
    i -= steps.detail;
    return {{{{gic1, c, 2 * hidden - c + 16 * i, 0, c - 16 * i, c}, padded, 16, true}}};
  }
  i -= steps.qkv;
  const int third = i / steps.forward.channel_tiles, first = 16 * (i % steps.forward.channel_tiles);
  const Block<W> rows{static_cast<const W*>(p.qkv), c, third * c + first, 0, c - first, c};
  return {{{rows, 16, padded}, {rows, padded, 16, true}}};
}

template <class Kind, class W>
MIRAGE_DEVICE void pack_backward_step(const MixerBackwardArguments& p, int step) {
  using T = typename Kind::Element;
  pack_panels<Kind, W>(backward_step_of<W>(p, MixerBackwardSteps(p), step), mixer_backward_step<T>(p, step));
}

// The taps, [3, 16 channel_tiles, 12].
template <class T>
MIRAGE_ANYWHERE float* mixer_backward_taps(const MixerBackwardArguments& p) {
  return reinterpret_cast<float*>(mixer_backward_step<T>(p, MixerBackwardSteps(p).of_sample(p.batch, 0)));
}

template <class T, class W>
MIRAGE_DEVICE void pack_backward_taps(const MixerBackwardArguments& p) {
  const int channel_tiles = MixerSteps::channel_tiles_of(p.branch);
  for (int i = 0; i < 3 * channel_tiles; ++i) {
    pack_taps<W>(p, i / channel_tiles, 16 * (i % channel_tiles), mixer_backward_taps<T>(p) + i * 16 * 12);
  }
}

// Writes the steps of kind `kind` of a sample, from value(row, column).
template <class Kind, class Value>
MIRAGE_DEVICE void pack_sample(const MixerBackwardArguments& p, int sample, int kind, Value value) {
  const int64_t step = MixerBackwardSteps(p).of_sample(sample, kind);
  pack_heads<Kind>(p, mixer_backward_step<typename Kind::Element>(p, step), value);
}

}  // namespace mirage::cuda
