// What the forward and the backward pass of mixer_stage share: the weights, BatchNorm folded into gic1, and the parts of
// the mixer on one tile.
#pragma once

#include "common/cpu/gemm.h"
#include "common/cpu/inner_tile.h"
#include "common/cpu/product_depthwise.h"
#include "common/cpu/vec_math.h"
#include "mirage/mixer_stage.h"

namespace mirage::cpu::MIRAGE_ISA {

constexpr int64_t kTaps = kMixerKernelSize * kMixerKernelSize;
constexpr int64_t kMixerHalo = kMixerKernelSize / 2;
constexpr int64_t kGroup = 48;  // hidden channels at a time

// Matrices of the forward pass as operands of products; gic1 is in Folded.
template <class P>
struct MixerProducts {
  OperandMatrix<P> qkv, gic2, proj_out, mlp_in, mlp_out, project_out;

  explicit MixerProducts(const MixerWeights& w)
      : qkv(w.qkv), gic2(w.gic2), proj_out(w.proj_out), mlp_in(w.mlp_in), mlp_out(w.mlp_out),
        project_out(w.project_out) {}
};

// C channels in three branches of c; h hidden channels of the gated CNN; d channels per head. P: what products over
// channels multiply (operands.h).
template <class P>
struct Mixer {
  using A = Acc<P>;
  int64_t C, c, h, heads, d;
  InAccumulator<A> norm_weight, norm_bias, qkv_dwconv, temperature, bn_weight, bn_bias, gic1, generator_in,
      generator_out;
  A tau, alpha_att, alpha_conv, alpha_mlp, norm_eps, bn_eps;
  MixerProducts<P> products;

  Mixer(const MixerWeights& w, const MixerOptions& o)
      : C(w.norm_weight.size[0]), c(C / 3), h(w.gic2.size[1]), heads(w.temperature.size[0]), d(c / heads),
        norm_weight(w.norm_weight), norm_bias(w.norm_bias), qkv_dwconv(w.qkv_dwconv), temperature(w.temperature),
        bn_weight(w.bn_weight), bn_bias(w.bn_bias), gic1(w.gic1), generator_in(w.generator_in),
        generator_out(w.generator_out), tau(InAccumulator<A>(w.gate_temperature)[0]),
        alpha_att(InAccumulator<A>(w.alpha_att)[0]), alpha_conv(InAccumulator<A>(w.alpha_conv)[0]),
        alpha_mlp(InAccumulator<A>(w.alpha_mlp)[0]), norm_eps(A(o.norm_eps)), bn_eps(A(o.bn_eps)), products(w) {}
};

// BatchNorm as (x - mean) * scale + shift, and gic1 with scale and shift folded in: gate rows (divided by the gate's
// temperature), identity rows, detail rows, and a bias for each. The mean is subtracted before, as a fold would multiply
// its rounding by mean / deviation.
template <class P>
struct Folded {
  using A = Acc<P>;
  Buffer<A> mean, scale, shift, bias, rows;  // rows: gic1 in the accumulator type
  OperandMatrix<P> gic1;

  Folded(const Mixer<P>& w, const A* mean_, const A* var)
      : mean(w.c), scale(w.c), shift(w.c), bias(2 * w.h), rows(2 * w.h * w.c), gic1(fold(w, mean_, var)) {}

 private:
  Tensor fold(const Mixer<P>& w, const A* mean_, const A* var) const {
    for (int64_t k = 0; k < w.c; ++k) {
      mean[k] = mean_[k];
      scale[k] = A(w.bn_weight[k] / __builtin_sqrt(double(var[k]) + double(w.bn_eps)));
      shift[k] = w.bn_bias[k];
    }
    for (int64_t m = 0; m < 2 * w.h; ++m) {
      const A factor = m < w.h ? A(1) / w.tau : A(1), *from = w.gic1 + m * w.c;
      A* const row = rows.get() + m * w.c;
      for (int64_t k = 0; k < w.c; ++k) row[k] = from[k] * factor * scale[k];
      bias[m] = dot(from, static_cast<const A*>(shift.get()), w.c) * factor;
    }
    return matrix_of(rows.get(), 2 * w.h, w.c);
  }
};

// A tile of one sample and the sizes of its buffers: per channel `outer` elements with the halo, `inner` without.
struct MixerTile {
  Tile tile;
  int64_t outer, inner, pixels;  // pixels: of the dense tile, whole vectors
  int64_t sample;

  // The index of a channel's first pixel for a smaller halo of `halo` pixels.
  int64_t inset(int64_t halo) const { return (tile.halo - halo) * (tile.stride + 1); }
};

// Loads x of a tile and normalises it over its channels: [C, outer].
template <class T, class P>
inline void load_normalised(const Mixer<P>& w, const Tensor& x, const MixerTile& at, Acc<T>* normed) {
  const T* px = x.as<const T>() + at.sample * x.stride[0];
  load_tile(px, x, at.tile, w.C, at.outer, normed);
  normalise_tile(normed, w.C, at.outer, at.tile, w.norm_weight.get(), w.norm_bias.get(), w.norm_eps);
}

// `rows` of q, k and v from row `first` on: 1x1 and 3x3 depthwise of the normalised tile, whose rows may be packed on the
// way. before: [rows, outer].
template <class P, class A>
inline void attention_inputs(const Mixer<P>& w, const MixerTile& at, A* normed, int64_t first, int64_t rows, A* before,
                             A* out) {
  const int64_t skip = (at.tile.halo - 1) * at.tile.stride;  // whole lines
  const int64_t pixels = whole_vectors<A>((at.tile.rows + 2) * at.tile.stride);
  const P* const in = operand_rows<P>(normed + skip, w.c, at.outer, pixels, normed + skip);
  const A* const without_bias = nullptr;
  product_rows(w.products.qkv.at(first), rows, w.c, in, at.tile, at.outer, without_bias, before);
  depthwise_rows_of(before, rows, at.tile, at.outer, w.qkv_dwconv + first * 9, without_bias, at.inner, out);
}

// Attention times v, head by head. attention: that of this sample, [heads, 2d + 2, d].
template <class P, class A>
inline void attend(const Mixer<P>& w, const MixerTile& at, const A* attention, const A* v, A* out) {
  for (int64_t head = 0; head < w.heads; ++head) {
    const int64_t first = head * w.d;
    mix(attention + head * (2 * w.d + 2) * w.d, w.d, w.d, w.d, v + first * at.inner, at.inner, at.pixels,
        [&](int64_t m, int64_t p, Vec<A> value) { store(out + (first + m) * at.inner + p, value); });
  }
}

// Subtracts BatchNorm's mean from the rows of the gated CNN's input.
template <class P, class A>
inline void center(const Mixer<P>& w, const Folded<P>& f, int64_t stride, int64_t pixels, A* rows) {
  for (int64_t j = 0; j < w.c; ++j) {
    for (int64_t p = 0; p < pixels; p += kLanes<A>) store(rows + j * stride + p, load(rows + j * stride + p) - f.mean[j]);
  }
}

// The detail rows of gic1 with the halo of the 7x7 kernels [c, outer], zero outside the plane. The gated CNN's rows of
// the normalised tile are centered on the way, and may be packed.
template <class P, class A>
inline void detail_rows(const Mixer<P>& w, const Folded<P>& f, const MixerTile& at, A* normed, A* detail) {
  A* const branch = normed + w.c * at.outer;
  center(w, f, at.outer, at.tile.outer_pixels, branch);
  const int64_t first = 2 * w.h - w.c;
  const A* const bias = f.bias.get() + first;
  const P* const in = operand_rows<P>(branch, w.c, at.outer, at.tile.outer_pixels, branch);
  const Span span = inside_plane<A>(at.tile, at.tile.halo);
  A* const inside = detail + span.begin;
  mix(f.gic1.at(first), w.c, w.c, in + span.begin, at.outer, span.end - span.begin,
      [&](int64_t m, int64_t p, Vec<A> v) { store(inside + m * at.outer + p, v + bias[m]); });
  clear_outside(detail, w.c, at.outer, at.tile);
}

// Convolves the detail rows with the sample's own 7x7 kernels.
template <class P, class A>
inline void dynamic_rows(const Mixer<P>& w, const MixerTile& at, const A* kernels, const A* detail, A* out) {
  for (int64_t j = 0; j < w.c; ++j) {
    depthwise<kMixerKernelSize>(detail + j * at.outer, at.tile.stride, kernels + j * kTaps, out + j * at.inner,
                                at.tile.rows, at.tile.columns);
  }
}

// gic2(gelu(gate) * concat(identity, dynamic)) * scale + the branch's input, of which `branch` is the centered form;
// written to `mixed`, which may be `branch` itself. `sum` [c, inner] and `group` are scratch.
template <class P, class A>
inline void gated_branch(const Mixer<P>& w, const Folded<P>& f, const MixerTile& at, const A* branch, const A* dynamic,
                         A scale, A* group, A* room, A* sum, A* mixed) {
  const int64_t I = at.inner, identities = w.h - w.c;
  const P* const in = operand_rows<P>(branch, w.c, I, at.pixels, room);
  for (int64_t first = 0; first < w.h; first += kGroup) {
    const int64_t n = smaller(kGroup, w.h - first), plain = smaller(n, identities > first ? identities - first : 0);
    const A *gate_bias = f.bias.get() + first, *bias = gate_bias + w.h;
    mix(f.gic1.at(first), n, w.c, in, I, at.pixels,
        by_row([&](int64_t m, int64_t p, auto& v) {
          for (auto& each : v) each += gate_bias[m];
          gelu_between<P>(v);
          store_each(group + m * I + p, v);
        }));
    mix(f.gic1.at(w.h + first), plain, w.c, in, I, at.pixels,
        [&](int64_t m, int64_t p, Vec<A> v) { store(group + m * I + p, load(group + m * I + p) * (v + bias[m])); });
    for (int64_t m = plain; m < n; ++m) {
      const A* other = dynamic + (first + m - identities) * I;
      for (int64_t p = 0; p < at.pixels; p += kLanes<A>) {
        store(group + m * I + p, load(group + m * I + p) * load(other + p));
      }
    }
    mix_share(w.products.gic2.at(0, first), w.c, n, operand_rows<P>(group, n, I, at.pixels, group), I, at.pixels,
              first == 0, sum);
  }
  for (int64_t j = 0; j < w.c; ++j) {
    for (int64_t p = 0; p < at.pixels; p += kLanes<A>) {
      store(mixed + j * I + p, load(sum + j * I + p) * scale + (load(branch + j * I + p) + f.mean[j]));
    }
  }
}

// out = W v for a square matrix over dense rows, which may be packed on the way.
template <class P, class A>
inline void project(const Matrix<P>& matrix, int64_t channels, const MixerTile& at, A* in, A* out) {
  mix(matrix, channels, channels, operand_rows<P>(in, channels, at.inner, at.pixels, in), at.inner, at.pixels,
      [&](int64_t m, int64_t p, Vec<A> v) { store(out + m * at.inner + p, v); });
}

// The MLP branch, a group of hidden channels at a time. `in` may be packed on the way.
template <class P, class A>
inline void pixel_mlp(const Mixer<P>& w, const MixerTile& at, A* in, A* group, A* out) {
  const P* const rows = operand_rows<P>(in, w.c, at.inner, at.pixels, in);
  for (int64_t first = 0; first < 2 * w.c; first += kGroup) {
    const int64_t n = smaller(kGroup, 2 * w.c - first);
    mix(w.products.mlp_in.at(first), n, w.c, rows, at.inner, at.pixels,
        by_row([&](int64_t m, int64_t p, auto& v) {
          gelu_between<P>(v);
          store_each(group + m * at.inner + p, v);
        }));
    mix_share(w.products.mlp_out.at(0, first), w.c, n, operand_rows<P>(group, n, at.inner, at.pixels, group), at.inner,
              at.pixels, first == 0, out);
  }
}

// Fuses the branches in place: each is modulated by the other two. [att; conv; mlp], c rows each.
template <class P, class A>
inline void fuse(const Mixer<P>& w, const MixerTile& at, A* rows) {
  const int64_t branch = w.c * at.inner;
  for (int64_t j = 0; j < w.c; ++j) {
    A *a = rows + j * at.inner, *g = a + branch, *m = g + branch;
    for (int64_t p = 0; p < at.pixels; p += kLanes<A>) {
      const Vec<A> va = load(a + p), vg = load(g + p), vm = load(m + p);
      Vec<A> gate[3] = {vg + vm, va + vm, va + vg};
      sigmoid_between<P>(gate);
      store(a + p, va + w.alpha_att * gate[0]);
      store(g + p, vg + w.alpha_conv * gate[1]);
      store(m + p, vm + w.alpha_mlp * gate[2]);
    }
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
