// What the kernels of mixer_stage's backward read in steps of panels (pack.h), beside the steps of forward. Of the
// weights, in this order:
//
//   steps           what                                                          panels
//   out_steps       project_out transposed: 16 channels of grad_y to each branch  c x 16, c x 16, c x 16
//   kBlocks         proj_out transposed                                           c x 16
//   mlp_steps       mlp_in; mlp_out and mlp_in transposed                         16 x c, 16 x c, c x 16
//   2 gate_steps    gic1: gate and, of the identity, value; gic2 transposed;      16 x c, 16 x c, 16 x c
//                   the first two transposed                                      c x 16, c x 16
//   kBlocks         gic1 of the detail, transposed                                c x 16
//   3 kBlocks       q, then k, then v: rows of qkv, the same transposed           16 x c, c x 16
//
// and of each sample, c x 16 each: the attention transposed, the gradient of q k^T and its transpose (these two written by
// attention_backward, each row divided by its largest element). Behind all steps are the taps of q, k and v, 12 floats for
// each of c channels in sixteens.
#pragma once

#include "backward.h"

namespace mirage::cuda {

struct MixerBackwardSteps {
  MixerSteps forward;
  int out, proj, mlp, gate, detail, qkv, weights;  // where each kind begins; how many there are

  MIRAGE_ANYWHERE explicit MixerBackwardSteps(const MixerArguments& p)
      : forward(p), out(0), proj(forward.out), mlp(proj + forward.blocks), gate(mlp + forward.mlp),
        detail(gate + 2 * forward.gate), qkv(detail + forward.blocks), weights(qkv + 3 * forward.blocks) {}

  // From the beginning of all, in steps: kind 0 is the attention, 1 the gradient of q k^T, 2 its transpose.
  MIRAGE_ANYWHERE int64_t of_sample(int sample, int kind) const {
    return weights + (int64_t(sample) * 3 + kind) * forward.blocks;
  }
};

inline int64_t mixer_backward_packed_bytes(const MixerArguments& p, int64_t size) {
  const MixerBackwardSteps steps(p);
  const int64_t taps = 3 * 16 * steps.forward.blocks * 12 * int64_t(sizeof(float));
  return steps.of_sample(p.batch, 0) * mixer_step(steps.forward.blocks) * size + taps;
}

template <class T>
MIRAGE_ANYWHERE T* mixer_backward_step(const MixerBackwardArguments& p, int64_t step) {
  return reinterpret_cast<T*>(p.backward) + step * mixer_step(MixerSteps::sixteens(p.branch));
}

template <class W>
MIRAGE_DEVICE StepOf<W> backward_step_of(const MixerArguments& p, const MixerBackwardSteps& steps, int i) {
  const int c = p.branch, padded = 16 * steps.forward.blocks, hidden = p.hidden;
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
  const int third = i / steps.forward.blocks, first = 16 * (i % steps.forward.blocks);
  const Block<W> rows{static_cast<const W*>(p.qkv), c, third * c + first, 0, c - first, c};
  return {{{rows, 16, padded}, {rows, padded, 16, true}}};
}

template <class Kind, class W>
MIRAGE_DEVICE void pack_backward_step(const MixerBackwardArguments& p, int step) {
  using T = typename Kind::Element;
  pack_panels<Kind, W>(backward_step_of<W>(p, MixerBackwardSteps(p), step), mixer_backward_step<T>(p, step));
}

// [3, 16 kBlocks, 12].
template <class T>
MIRAGE_ANYWHERE float* mixer_backward_taps(const MixerBackwardArguments& p) {
  return reinterpret_cast<float*>(mixer_backward_step<T>(p, MixerBackwardSteps(p).of_sample(p.batch, 0)));
}

template <class T, class W>
MIRAGE_DEVICE void pack_backward_taps(const MixerBackwardArguments& p) {
  const int blocks = MixerSteps::sixteens(p.branch);
  for (int i = 0; i < 3 * blocks; ++i) {
    pack_taps<W>(p, i / blocks, 16 * (i % blocks), mixer_backward_taps<T>(p) + i * 16 * 12);
  }
}

// The steps of kind `kind` of a sample, from value(row, column).
template <class Kind, class Value>
MIRAGE_DEVICE void pack_sample(const MixerBackwardArguments& p, int sample, int kind, Value value) {
  const int64_t step = MixerBackwardSteps(p).of_sample(sample, kind);
  pack_heads<Kind>(p, mixer_backward_step<typename Kind::Element>(p, step), value);
}

}  // namespace mirage::cuda
