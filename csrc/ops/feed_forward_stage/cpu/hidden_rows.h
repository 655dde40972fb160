// Hidden channels of a tile as backward has them again: computed from x, or read where forward kept them.
#pragma once

#include "common/cpu/dtypes.h"
#include "common/cpu/gemm.h"
#include "common/cpu/gradients.h"
#include "common/cpu/line_sums.h"
#include "common/cpu/product_depthwise.h"
#include "common/cpu/vec_math.h"
#include "common/cpu/vector_or_null.h"
#include "mirage/feed_forward_stage.h"

namespace mirage::cpu::MIRAGE_ISA::feed_forward_parts {

constexpr int64_t kPairs = 24;  // hidden channel pairs at a time

// The weights and x. C channels, M pairs of hidden channels, `group` of them at a time.
template <class T>
struct HiddenRows {
  using A = Acc<T>;
  const Tensor& x;
  const Tensor* hidden;
  const int64_t C, M, group;
  const bool convolves, has_input_bias;
  const InAccumulator<A> norm_weight;
  const VectorOrZeros<A> norm_bias;
  const A eps;
  const NormKind norm;
  const Activation activation, gate;
  const InAccumulator<A> project_in;
  const VectorOrNull<A> dwconv;
  const VectorOrZeros<A> project_in_bias, dwconv_bias;

  HiddenRows(const Tensor& x, const FeedForwardWeights& w, const FeedForwardOptions& options, const Tensor* hidden)
      : x(x), hidden(hidden), C(x.size[1]), M(w.project_out.size[1]), group(smaller(kPairs, M)),
        convolves(exists(w.dwconv)), has_input_bias(exists(w.project_in_bias)), norm_weight(w.norm_weight),
        norm_bias(w.norm_bias, C), eps(A(options.eps)), norm(options.norm), activation(options.activation),
        gate(options.gate), project_in(w.project_in), dwconv(w.dwconv), project_in_bias(w.project_in_bias, 2 * M),
        dwconv_bias(w.dwconv_bias, 2 * M) {}

  // x normalised, [C, outer].
  void normalised(const Tile& tile, int64_t sample, int64_t outer, A* out) const {
    load_tile(x.as<const T>() + sample * x.stride[0], x, tile, C, outer, out);
    normalise_tile(out, C, outer, tile, norm_weight.get(), norm_bias.get(), eps, norm);
  }

  // The gate's value and its slope for vectors of d1, in place.
  template <int N>
  MIRAGE_INLINE void gate_with_slope(Vec<A> (&value)[N], Vec<A> (&slope)[N]) const {
    if (gate == Activation::gelu) return vgelu_with_grad_each(value, slope);
    for (int i = 0; i < N; ++i) slope[i] = splat(A(1));
  }

  // Computes the activation and its derivative (of GELU) for n hidden channels, with the tile's halo, from the input or from
  // what forward kept.
  void activate(const Tile& tile, int64_t sample, const A* normed, int64_t outer, int64_t row, int64_t n, A* act,
                A* slope) const {
    const Span span = inside_plane<A>(tile, tile.halo);
    clear_around(span, tile.outer_pixels, n, outer, act);
    act += span.begin;
    slope += span.begin;
    const auto finish = [&](int64_t m, int64_t p, auto& v) {
      if (activation == Activation::none) return store_each(act + m * outer + p, v);
      constexpr int N = sizeof(v) / sizeof(v[0]);
      Vec<A> derivative[N];
      vgelu_with_grad_each(v, derivative);
      store_each(act + m * outer + p, v);
      store_each(slope + m * outer + p, derivative);
    };
    if (!hidden) {
      mix(project_in + row * C, C, n, C, normed + span.begin, outer, span.end - span.begin,
          by_row([&](int64_t m, int64_t p, auto& v) {
            if (has_input_bias) {
              for (auto& each : v) each += project_in_bias[row + m];
            }
            finish(m, p, v);
          }));
      if (has_input_bias) clear_outside(act - span.begin, n, outer, tile);
      return;
    }
    const T* planes = hidden->as<const T>() + sample * hidden->stride[0] + row * hidden->stride[1];
    load_tile(planes, *hidden, tile, n, outer, act - span.begin);
    if (activation == Activation::none) return;
    constexpr int N = kMixVectors, L = kLanes<A>;
    for (int64_t m = 0; m < n; ++m) {
      const A* const from = act + m * outer;
      int64_t p = 0;
      for (; p + N * L <= span.end - span.begin; p += N * L) {
        Vec<A> v[N];
        for (int i = 0; i < N; ++i) v[i] = load(from + p + i * L);
        finish(m, p, v);
      }
      for (; p < span.end - span.begin; p += L) {
        Vec<A> v[1] = {load(from + p)};
        finish(m, p, v);
      }
    }
  }
};

}  // namespace mirage::cpu::MIRAGE_ISA::feed_forward_parts
