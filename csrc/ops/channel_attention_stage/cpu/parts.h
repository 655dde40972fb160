// What the forward and the backward pass of channel_attention_stage share: the weights, how tiles are summed up, and the
// softmax folded into project_out.
#pragma once

#include "common/cpu/by_sample.h"
#include "common/cpu/product_depthwise.h"
#include "common/cpu/vector_or_null.h"
#include "mirage/channel_attention_stage.h"

namespace mirage::cpu::MIRAGE_ISA::channel_attention_parts {

constexpr int64_t kRowsAtOnce = 48;  // of q, k or v: a multiple of every kMixRows

// The weights. P: what products over channels multiply (operands.h). C channels, d of them per head.
template <class P>
struct Attention {
  using A = Acc<P>;
  int64_t C, heads, d;
  InAccumulator<A> norm_weight;
  VectorOrZeros<A> norm_bias;
  OperandMatrix<P> qkv;
  VectorOrNull<A> qkv_bias;
  InAccumulator<A> taps;
  VectorOrNull<A> taps_bias;
  InAccumulator<A> temperature, project_out;
  NormKind kind;
  A eps;

  Attention(const ChannelAttentionWeights& w, NormKind norm, double eps)
      : C(w.norm_weight.size[0]), heads(w.temperature.size[0]), d(C / heads), norm_weight(w.norm_weight),
        norm_bias(w.norm_bias, C), qkv(w.qkv), qkv_bias(w.qkv_bias), taps(w.qkv_dwconv), taps_bias(w.qkv_dwconv_bias),
        temperature(w.temperature), project_out(w.project_out), kind(norm), eps(A(eps)) {}

  // Whole heads that are worked on at once, in channels.
  int64_t heads_at_once() const { return d < kRowsAtOnce ? d * smaller(heads, kRowsAtOnce / d) : d; }
};

// Buffers of a tile: per channel `outer` elements with the halo of one pixel, `inner` without.
struct AttentionTile {
  Tile tile;
  int64_t outer, inner, pixels;  // pixels: of the dense tile, whole vectors
  int64_t sample;
};

// x of a tile, normalised, as the right operand of products: [C, outer].
template <class T, class P, class Weights>
inline const P* load_operand(const Weights& w, const Tensor& x, const AttentionTile& at, Acc<T>* room) {
  load_tile(x.as<const T>() + at.sample * x.stride[0], x, at.tile, w.C, at.outer, room);
  normalise_tile(room, w.C, at.outer, at.tile, w.norm_weight.get(), w.norm_bias.get(), w.eps, w.kind);
  return operand_rows<P>(room, w.C, at.outer, at.tile.outer_pixels, room);
}

// Rows [first, first + n) of (q, k, v) before their depthwise convolution, with the halo.
template <class P, class Weights, class A>
inline void rows_before(const Matrix<P>& qkv, const Weights& w, const AttentionTile& at, const P* in, int64_t first,
                        int64_t n, A* before) {
  product_rows(qkv.at(first), n, w.C, in, at.tile, at.outer, w.qkv_bias.from(first), before);
}

// The same rows behind it, dense with zeros up to a whole vector.
template <class P, class A>
inline void rows_behind(const Attention<P>& w, const AttentionTile& at, const A* before, int64_t first, int64_t n, A* out) {
  depthwise_rows_of(before, n, at.tile, at.outer, w.taps + first * 9, w.taps_bias.from(first), at.inner, out);
  clear_tails(out, n, at.inner, at.tile.rows * at.tile.columns);
}

// The matrices of a head that forward keeps: [2d + 2, d].
template <class A>
struct KeptOf {
  A *attn, *gram, *norms;
  KeptOf(A* attention, int64_t head, int64_t d)
      : attn(attention + head * (2 * d + 2) * d), gram(attn + d * d), norms(gram + d * d) {}
};

// A square matrix of d columns in rows of whole vectors, so that it can be the right operand of products.
template <class A>
inline void widen(const A* matrix, int64_t row, int64_t column, int64_t d, int64_t wide, A* out) {
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) out[i * wide + j] = matrix[i * row + j * column];
    for (int64_t j = d; j < wide; ++j) out[i * wide + j] = A(0);
  }
}

// What v is multiplied by in each sample: project_out times the softmax of every head, [samples, C, C].
template <class P, class A>
inline void fold(const Attention<P>& w, int64_t samples, A* attention, A* folded) {
  const int64_t d = w.d, wide = whole_vectors<A>(d);
  parallel_units<A>(samples * w.heads, (d + w.C) * wide, [&](int64_t unit, A* scratch) {
    const int64_t sample = unit / w.heads, first = unit % w.heads * d;
    A *const right = scratch, *const product = right + d * wide;
    widen(KeptOf<A>(attention, unit, d).attn, d, 1, d, wide, right);
    mix_share(Matrix<A>{w.project_out + first, w.C}, w.C, d, right, wide, wide, true, product);
    A* const out = folded + sample * w.C * w.C + first;
    for (int64_t m = 0; m < w.C; ++m) {
      for (int64_t j = 0; j < d; ++j) out[m * w.C + j] = product[m * wide + j];
    }
  });
}

}  // namespace mirage::cpu::MIRAGE_ISA::channel_attention_parts
