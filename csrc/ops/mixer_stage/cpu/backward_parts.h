// What the three passes of mixer_stage's backward share: the layout of the gradients' sums, the tensors between the
// passes, transposed weights.
#pragma once

#include "common/cpu/gradients.h"
#include "parts.h"

namespace mirage::cpu::MIRAGE_ISA {

// The sums that the passes gather over all pixels, one run of them per chunk of tiles. All but the norm's come from the
// first two passes.
template <class A>
struct Gradients {
  int64_t norm_weight, norm_bias, qkv, qkv_dwconv, bn_weight, bn_bias, gic1, gic2, proj_out, mlp_in, mlp_out, alphas,
      project_out, count;

  explicit Gradients(const Mixer<A>& w) {
    int64_t next = 0;
    auto take = [&](int64_t n) { const int64_t at = next; next += n; return at; };
    norm_weight = take(w.C);
    norm_bias = take(w.C);
    qkv = take(3 * w.c * w.c);
    qkv_dwconv = take(3 * w.c * 9);
    bn_weight = take(w.c);
    bn_bias = take(w.c);
    gic1 = take(2 * w.h * w.c);
    gic2 = take(w.c * w.h);
    proj_out = take(w.c * w.c);
    mlp_in = take(2 * w.c * w.c);
    mlp_out = take(2 * w.c * w.c);
    alphas = take(3);
    project_out = take(w.C * w.C);
    count = next;
  }
};

// Feature maps that one pass leaves to the next, [B, channels, H, W] of the accumulator type: 2 C channels in all.
template <class A>
struct Between {
  int64_t batch, c, height, width;
  Buffer<A> dynamic, value, residual, normed;

  Between(const Mixer<A>& w, const Tensor& x)
      : batch(x.size[0]), c(w.c), height(x.size[2]), width(x.size[3]), dynamic(size(1)), value(size(1)),
        residual(size(1)), normed(size(3)) {}

  int64_t plane() const { return height * width; }
  int64_t size(int64_t branches) const { return batch * branches * c * plane(); }

  // A sample of the buffers: gradients of the dynamic convolution's output, of v, of the gated CNN's residual; and of the
  // normalised x, in branches (attention, BatchNorm's output, MLP).
  A* dynamic_of(int64_t b) const { return dynamic.get() + b * c * plane(); }
  A* value_of(int64_t b) const { return value.get() + b * c * plane(); }
  A* residual_of(int64_t b) const { return residual.get() + b * c * plane(); }
  A* normed_of(int64_t b, int64_t branch) const { return normed.get() + (b * 3 + branch) * c * plane(); }

  // Wraps one sample's planes for load_tile.
  Tensor planes(A* data) const {
    Tensor t;
    t.data = data;
    t.ndim = 4;
    t.stride[1] = plane();
    t.stride[2] = width;
    t.stride[3] = 1;
    return t;
  }
};

// The weights as the backward passes multiply by them. gic1's gate rows are divided by the gate's temperature.
template <class A>
struct BackwardWeights {
  Buffer<A> gic1;
  Transposed<A> gic1_t, gic2_t, qkv_t, proj_out_t, mlp_in_t, mlp_out_t, project_out_t;

  explicit BackwardWeights(const Mixer<A>& w)
      : gic1(2 * w.h * w.c), gic1_t(tempered(w, gic1.get()), 2 * w.h, w.c), gic2_t(w.products.gic2.data, w.c, w.h),
        qkv_t(w.products.qkv.data, 3 * w.c, w.c), proj_out_t(w.products.proj_out.data, w.c, w.c),
        mlp_in_t(w.products.mlp_in.data, 2 * w.c, w.c), mlp_out_t(w.products.mlp_out.data, w.c, 2 * w.c),
        project_out_t(w.products.project_out.data, w.C, w.C) {}

 private:
  static const A* tempered(const Mixer<A>& w, A* out) {
    for (int64_t i = 0; i < 2 * w.h * w.c; ++i) out[i] = i < w.h * w.c ? w.gic1[i] / w.tau : w.gic1[i];
    return out;
  }
};

}  // namespace mirage::cpu::MIRAGE_ISA
