// The first backward pass of mixer_stage: from grad_y through project_out, the fusion, the MLP, the gated CNN down to the
// dynamic convolution's output, and the attention down to v. Everything forward computed is recomputed on the tile.
#pragma once

#include "backward_parts.h"

namespace mirage::cpu::MIRAGE_ISA {

// The sums of one sample: the gradients of the attention [heads, d, d] and of the generated kernels [c, 49]; one set
// per tile.
template <class A>
struct SampleSums {
  int64_t attention, kernels, count;
  explicit SampleSums(const Mixer<A>& w) : attention(0), kernels(w.c * w.d), count(kernels + w.c * kTaps) {}
};

// Backward of the fusion, in place: the gradients of the fused rows [att; conv; mlp] become those of the branches.
// fused: the rows themselves.
template <class A>
inline void fuse_backward(const Mixer<A>& w, const MixerTile& at, const A* rows, A* fused, A* grad, A* alphas) {
  const int64_t branch = w.c * at.inner;
  constexpr int64_t kRun = 32;  // vectors that a lane adds up before the sum goes on in double: few roundings a term
  double totals[3] = {};
  for (int64_t j = 0; j < w.c; ++j) {
    const A *a = rows + j * at.inner, *g = a + branch, *m = g + branch;
    A *da = grad + j * at.inner, *dg = da + branch, *dm = dg + branch;
    A *fa = fused + j * at.inner, *fg = fa + branch, *fm = fg + branch;
    for (int64_t start = 0; start < at.pixels; start += kRun * kLanes<A>) {
      const int64_t end = start + kRun * kLanes<A> < at.pixels ? start + kRun * kLanes<A> : at.pixels;
      Vec<A> sums[3] = {};
      for (int64_t p = start; p < end; p += kLanes<A>) {
        const Vec<A> va = load(a + p), vg = load(g + p), vm = load(m + p);
        const Vec<A> ga = load(da + p), gg = load(dg + p), gm = load(dm + p);
        Vec<A> gate[3] = {vg + vm, va + vm, va + vg};
        vsigmoid_each<A>(gate);
        const Vec<A> sa = gate[0], sg = gate[1], sm = gate[2];
        store(fa + p, va + w.alpha_att * sa);
        store(fg + p, vg + w.alpha_conv * sg);
        store(fm + p, vm + w.alpha_mlp * sm);
        sums[0] += ga * sa;
        sums[1] += gg * sg;
        sums[2] += gm * sm;
        const Vec<A> ta = ga * w.alpha_att * sa * (A(1) - sa), tg = gg * w.alpha_conv * sg * (A(1) - sg),
                     tm = gm * w.alpha_mlp * sm * (A(1) - sm);
        store(da + p, ga + tg + tm);
        store(dg + p, gg + ta + tm);
        store(dm + p, gm + ta + tg);
      }
      for (int i = 0; i < 3; ++i) totals[i] += double(sum<A>(sums[i]));
    }
  }
  for (int i = 0; i < 3; ++i) alphas[i] += A(totals[i]);
}

// Backward of the MLP: from the gradient of its output to that of its input. pre, act: [kGroup, inner] scratch.
template <class A>
inline void mlp_backward(const Mixer<A>& w, const BackwardWeights<A>& t, const Gradients<A>& g, const MixerTile& at,
                         const A* in, const A* grad, A* pre, A* act, A* grad_in, A* sums) {
  const int64_t I = at.inner, twice = 2 * w.c;
  for (int64_t first = 0; first < twice; first += kGroup) {
    const int64_t n = smaller(kGroup, twice - first);
    mix(w.products.mlp_in.at(first), n, w.c, in, I, at.pixels, by_row([&](int64_t m, int64_t p, auto& v) {
      Vec<A> slope[sizeof(v) / sizeof(v[0])];
      vgelu_with_grad_each(v, slope);
      store_each(act + m * I + p, v);
      store_each(pre + m * I + p, slope);
    }));
    add_outer(grad, I, w.c, act, I, n, at.pixels, sums + g.mlp_out + first, twice);
    mix(t.mlp_out_t.get() + first * w.c, w.c, n, w.c, grad, I, at.pixels,
        [&](int64_t m, int64_t p, Vec<A> v) { store(pre + m * I + p, load(pre + m * I + p) * v); });
    add_outer(pre, I, n, in, I, w.c, at.pixels, sums + g.mlp_in + first * w.c, w.c);
    mix_share(t.mlp_in_t.from(first), w.c, n, pre, I, at.pixels, first == 0, grad_in);
  }
}

// Backward of gic2 and the gate: from the gradient of gic2's output to those of BatchNorm's output (through gate and
// identity) and of the dynamic convolution's output, which replaces `dynamic`. normal: BatchNorm's output; group:
// scratch of 4 kGroup rows.
template <class A>
inline void gate_backward(const Mixer<A>& w, const BackwardWeights<A>& t, const Gradients<A>& g, const MixerTile& at,
                          const A* normal, A* dynamic, const A* grad, A* group, A* grad_normal, A* sums) {
  const int64_t I = at.inner, identities = w.h - w.c, rows = smaller(kGroup, w.h);
  A *const gate = group, *const slope = gate + rows * I, *const other = slope + rows * I, *const both = other + rows * I;
  for (int64_t first = 0; first < w.h; first += kGroup) {
    const int64_t n = smaller(kGroup, w.h - first), plain = smaller(n, identities > first ? identities - first : 0);
    const A *gate_rows = t.gic1.get() + first * w.c, *other_rows = gate_rows + w.h * w.c;
    mix(gate_rows, w.c, n, w.c, normal, I, at.pixels, by_row([&](int64_t m, int64_t p, auto& v) {
      Vec<A> derivative[sizeof(v) / sizeof(v[0])];
      vgelu_with_grad_each(v, derivative);
      store_each(gate + m * I + p, v);
      store_each(slope + m * I + p, derivative);
    }));
    mix(other_rows, w.c, plain, w.c, normal, I, at.pixels, [&](int64_t m, int64_t p, Vec<A> v) {
      store(other + m * I + p, v);
      store(both + m * I + p, load(gate + m * I + p) * v);
    });
    for (int64_t m = plain; m < n; ++m) {
      const A* const from = dynamic + (first + m - identities) * I;
      for (int64_t p = 0; p < at.pixels; p += kLanes<A>) {
        store(other + m * I + p, load(from + p));
        store(both + m * I + p, load(gate + m * I + p) * load(from + p));
      }
    }
    add_outer(grad, I, w.c, both, I, n, at.pixels, sums + g.gic2 + first, w.h);
    mix(t.gic2_t.get() + first * w.c, w.c, n, w.c, grad, I, at.pixels, [&](int64_t m, int64_t p, Vec<A> v) {
      A *const activated = gate + m * I + p, *const factor = other + m * I + p;
      const Vec<A> value = load(activated);
      store(activated, v * load(factor) * load(slope + m * I + p));
      store(factor, v * value);
    });
    add_outer(gate, I, n, normal, I, w.c, at.pixels, sums + g.gic1 + first * w.c, w.c);
    add_outer(other, I, plain, normal, I, w.c, at.pixels, sums + g.gic1 + (w.h + first) * w.c, w.c);
    mix_share(t.gic1_t.from(first), w.c, n, gate, I, at.pixels, first == 0, grad_normal);
    mix_share(t.gic1_t.from(w.h + first), w.c, plain, other, I, at.pixels, false, grad_normal);
    for (int64_t m = plain; m < n; ++m) {
      A* to = dynamic + (first + m - identities) * I;
      for (int64_t p = 0; p < at.pixels; p += kLanes<A>) store(to + p, load(other + m * I + p));
    }
  }
}

// Backward of attention times v. attention: that of this sample. grad: the gradient of the attention's output, replaced
// by that of v.
template <class A>
inline void attend_backward(const Mixer<A>& w, const MixerTile& at, const A* attention, const A* v, const A* grad,
                            A* grad_v, A* matrix, A* sums) {
  for (int64_t head = 0; head < w.heads; ++head) {
    const int64_t first = head * w.d;
    const A* const p = attention + head * (2 * w.d + 2) * w.d;
    for (int64_t i = 0; i < w.d; ++i) {
      for (int64_t j = 0; j < w.d; ++j) matrix[j * w.d + i] = p[i * w.d + j];
    }
    add_outer(grad + first * at.inner, at.inner, w.d, v + first * at.inner, at.inner, w.d, at.pixels,
              sums + first * w.d, w.d);
    mix(matrix, w.d, w.d, w.d, grad + first * at.inner, at.inner, at.pixels,
        [&](int64_t m, int64_t q, Vec<A> value) { store(grad_v + (first + m) * at.inner + q, value); });
  }
}

template <class T>
class BranchesPass {
 public:
  using A = Acc<T>;

  BranchesPass(const Tensor& grad_y, const Tensor& x, const Mixer<A>& w, const BackwardWeights<A>& t,
               const Folded<A>& f, const A* branch_scale, const A* attention, const A* kernels,
               const Between<A>& between)
      : grad_y_(grad_y), x_(x), w_(w), t_(t), f_(f), g_(w), s_(w), branch_scale_(branch_scale), attention_(attention),
        kernels_(kernels), between_(between), group_(smaller(kGroup, w.h > 2 * w.c ? w.h : 2 * w.c)),
        tiling_(choose_dense<A>(x.size[2], x.size[3], kMixerHalo, w.C + w.c, 14 * w.c + 4 * group_)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)) {}

  const Tiling& tiling() const { return tiling_; }
  int64_t units() const { return x_.size[0] * tiling_.count(); }
  int64_t scratch() const { return (w_.C + w_.c) * outer_ + (14 * w_.c + 4 * group_) * inner_ + w_.d * w_.d; }

  // sums: of the chunk; sample_sums: of this tile.
  void operator()(int64_t unit, A* sums, A* sample_sums, A* scratch) const {
    const int64_t C = w_.C, c = w_.c, I = inner_;
    A *normed = scratch, *detail = normed + C * outer_, *conv_in = detail + c * outer_, *mlp_in = conv_in + c * I,
      *v = mlp_in + c * I, *dynamic = v + c * I, *mixed = dynamic + c * I, *branches = mixed + c * I,
      *grad = branches + 3 * c * I, *work = grad + 3 * c * I, *grad_y = work, *group = work + 3 * c * I,
      *matrix = group + 4 * group_ * I;
    const Tile tile = tiling_.template tile<A>(unit % tiling_.count());
    const MixerTile at{tile, outer_, I, dense_pixels<A>(tile), unit / tiling_.count()};
    const A* const attention = attention_ + at.sample * w_.heads * (2 * w_.d + 2) * w_.d;
    recompute(at, attention, normed, detail, conv_in, mlp_in, v, dynamic, mixed, branches, group);

    const Tile dense = with_halo<A>(tile, 0);
    load_tile(grad_y_.as<const T>() + at.sample * grad_y_.stride[0], grad_y_, dense, C, I, grad_y);
    project(t_.project_out_t.from(0), C, at, grad_y, grad);
    A* const fused = normed;  // no longer needed, and large enough
    fuse_backward(w_, at, branches, fused, grad, sums + g_.alphas);
    add_outer(grad_y, I, C, fused, I, C, at.pixels, sums + g_.project_out, C);
    A *grad_att = grad, *grad_conv = grad + c * I, *grad_mlp = grad_conv + c * I;

    A* const result = work;  // grad_y is done with
    mlp_backward(w_, t_, g_, at, mlp_in, grad_mlp, group, group + group_ * I, result, sums);
    store_dense(result, I, tile, c, between_.normed_of(at.sample, 2));
    attend_backward(w_, at, attention, v, grad_att, result, matrix, sample_sums + s_.attention);
    store_dense(result, I, tile, c, between_.value_of(at.sample));
    conv_backward(at, conv_in, dynamic, mixed, grad_conv, result, group, sums);
    for (int64_t j = 0; j < c; ++j) {
      correlate<kMixerKernelSize>(detail + j * outer_, tile.stride, dynamic + j * I, tile.columns, tile.rows,
                                  tile.columns, outside(tile, kMixerKernelSize / 2),
                                  sample_sums + s_.kernels + j * kTaps);
    }
  }

 private:
  // Recomputes forward: the branches before their fusion, and the intermediate results that their gradients need.
  void recompute(const MixerTile& at, const A* attention, A* normed, A* detail, A* conv_in, A* mlp_in, A* v, A* dynamic,
                 A* mixed, A* branches, A* group) const {
    const int64_t c = w_.c, I = at.inner, pixels = at.tile.rows * at.tile.columns;
    load_normalised<T>(w_, x_, at, normed);
    copy_dense(normed + c * at.outer, at.outer, at.tile, 2 * c, conv_in, I);
    center(w_, f_, I, at.pixels, conv_in);
    attention_inputs(w_, at, normed, 2 * c, c, detail, v);
    clear_tails(v, c, I, pixels);
    attend(w_, at, attention, v, branches);
    detail_rows(w_, f_, at, normed, detail);
    dynamic_rows(w_, at, kernels_ + at.sample * c * kTaps, detail, dynamic);
    clear_tails(dynamic, c, I, pixels);
    gated_branch(w_, f_, at, conv_in, dynamic, branch_scale_[at.sample], group, mixed, branches + c * I, mixed);
    project(w_.products.proj_out, c, at, mixed, branches + c * I);
    pixel_mlp(w_, at, mlp_in, group, branches + 2 * c * I);
  }

  // result: [3c, inner] scratch. conv_in becomes BatchNorm's output, dynamic its own gradient.
  void conv_backward(const MixerTile& at, A* conv_in, A* dynamic, const A* mixed, A* grad, A* result, A* group,
                     A* sums) const {
    const int64_t c = w_.c, I = at.inner;
    A *grad_mixed = result, *grad_normal = result + c * I;
    add_outer(grad, I, c, mixed, I, c, at.pixels, sums + g_.proj_out, c);
    project(t_.proj_out_t.from(0), c, at, grad, grad_mixed);
    store_dense(grad_mixed, I, at.tile, c, between_.residual_of(at.sample));
    for (int64_t j = 0; j < c; ++j) {
      for (int64_t p = 0; p < at.pixels; p += kLanes<A>) {
        store(grad_mixed + j * I + p, load(grad_mixed + j * I + p) * branch_scale_[at.sample]);
        store(conv_in + j * I + p, load(conv_in + j * I + p) * f_.scale[j] + f_.shift[j]);
      }
    }
    gate_backward(w_, t_, g_, at, conv_in, dynamic, grad_mixed, group, grad_normal, sums);
    store_dense(grad_normal, I, at.tile, c, between_.normed_of(at.sample, 1));
    store_dense(dynamic, I, at.tile, c, between_.dynamic_of(at.sample));
  }

  const Tensor &grad_y_, &x_;
  const Mixer<A>& w_;
  const BackwardWeights<A>& t_;
  const Folded<A>& f_;
  const Gradients<A> g_;
  const SampleSums<A> s_;
  const A *branch_scale_, *attention_, *kernels_;
  const Between<A>& between_;
  int64_t group_;
  Tiling tiling_;
  int64_t outer_, inner_;
};

}  // namespace mirage::cpu::MIRAGE_ISA
