// The weights of a gated half of a block, and its gate on rows of a tile.
#pragma once

#include "common/cpu/dtypes.h"
#include "common/cpu/gemm.h"
#include "common/cpu/inner_tile.h"
#include "common/cpu/layer_norm_tile.h"
#include "common/cpu/vec_math.h"
#include "common/cpu/vector_or_null.h"
#include "mirage/feed_forward_stage.h"

namespace mirage::cpu::MIRAGE_ISA::feed_forward_forward {

constexpr int kSideBySide = 4;  // vectors at a time, whose chains of steps take turns

template <class P>
struct Weights {
  using A = Acc<P>;

  Weights(const FeedForwardWeights& w, const FeedForwardOptions& options)
      : channels(w.project_out.size[0]), hidden(w.project_out.size[1]), eps(A(options.eps)), norm(options.norm),
        activation(options.activation), gate(options.gate), convolves(exists(w.dwconv)), excites(exists(w.excite)),
        with_input_bias(exists(w.project_in_bias)), with_output_bias(exists(w.project_out_bias)),
        norm_weight(w.norm_weight), dwconv(w.dwconv), norm_bias(w.norm_bias, w.norm_weight.size[0]),
        project_in_bias(w.project_in_bias, 2 * hidden), dwconv_bias(w.dwconv_bias, 2 * hidden),
        project_out_bias(w.project_out_bias, w.norm_weight.size[0]), project_in(w.project_in),
        project_out(w.project_out) {}

  const int64_t channels, hidden;  // of x; pairs of hidden ones
  const A eps;
  const NormKind norm;
  const Activation activation, gate;
  const bool convolves, excites, with_input_bias, with_output_bias;  // dwconv; excite; biases of project_in and of project_out
  const InAccumulator<A> norm_weight;
  const VectorOrNull<A> dwconv;
  const VectorOrZeros<A> norm_bias, project_in_bias, dwconv_bias, project_out_bias;
  const OperandMatrix<P> project_in, project_out;
};

// The taps of a pair's two depthwise kernels and their biases.
template <class A>
struct PairTaps {
  Vec<A> a[9], b[9];
  Vec<A> a_bias, b_bias;
};

// d1 = gate(d1) * d2 for N vectors.
template <class P, int N, class A>
MIRAGE_INLINE void gate_each(Vec<A> (&d1)[N], const Vec<A> (&d2)[N], Activation gate) {
  if (gate == Activation::gelu) gelu_between<P>(d1);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) d1[i] = d1[i] * d2[i];
}

// g = gate(depthwise(h1)) * depthwise(h2) for V vectors in each of R lines, which share the lines that they read; `left` pixels
// of a vector where there are no more.
template <class P, int R, int V, class A>
MIRAGE_INLINE void gate_block(const A* h1, const A* h2, int64_t stride, const PairTaps<A>& taps, Activation gate, A* g,
                              int64_t columns, int left = kLanes<A>) {
  constexpr int L = kLanes<A>;
  Vec<A> d1[R * V], d2[R * V];
#pragma GCC unroll 8
  for (int i = 0; i < R * V; ++i) {
    d1[i] = taps.a_bias;
    d2[i] = taps.b_bias;
  }
#pragma GCC unroll 8
  for (int line = 0; line < R + 2; ++line) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const Vec<A> a = load_once(h1 + line * stride + kx + i * L), b = load_once(h2 + line * stride + kx + i * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int ky = line - r;
          if (ky < 0 || ky > 2) continue;
          d1[r * V + i] += a * taps.a[ky * 3 + kx];
          d2[r * V + i] += b * taps.b[ky * 3 + kx];
        }
      }
    }
  }
  gate_each<P, R * V, A>(d1, d2, gate);
#pragma GCC unroll 8
  for (int i = 0; i < R * V; ++i) {
    A* const to = g + i / V * columns + i % V * L;
    if (left < L) store_n(to, d1[i], left);
    else store(to, d1[i]);
  }
}

template <class P, int R, int V, class A>
MIRAGE_INLINE void gate_lines(const A* h1, const A* h2, int64_t stride, const PairTaps<A>& taps, Activation gate, A* g,
                              int64_t columns) {
  constexpr int64_t L = kLanes<A>;
  if (columns < L) return gate_block<P, R, 1>(h1, h2, stride, taps, gate, g, columns, int(columns));
  int64_t p = 0;
  for (; p + V * L <= columns; p += V * L) gate_block<P, R, V>(h1 + p, h2 + p, stride, taps, gate, g + p, columns);
  for (; p < columns; p += L) {
    const int64_t at = smaller(p, columns - L);  // overlaps what is there rather than storing a part
    gate_block<P, R, 1>(h1 + at, h2 + at, stride, taps, gate, g + at, columns);
  }
}

// Convolves and gates a pair: `rows` dense lines of `columns` pixels from lines of `stride` pixels, the first of which lies
// above the first result.
template <class P, class A>
MIRAGE_INLINE void gate_convolved(const A* h1, const A* h2, const Weights<P>& w, int64_t pair, const Tile& tile, A* g) {
  constexpr int N = kSideBySide;
  const A *const w1 = w.dwconv.from(pair * 9), *const w2 = w1 + w.hidden * 9, *const bias = w.dwconv_bias + pair;
  PairTaps<A> taps{{}, {}, splat(bias[0]), splat(bias[w.hidden])};
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) {
    taps.a[k] = splat(w1[k]);
    taps.b[k] = splat(w2[k]);
  }
  int64_t r = 0;
  const auto lines = [&](auto at_once) {
    constexpr int R = decltype(at_once)::value;
    for (; r + R <= tile.rows; r += R) {
      gate_lines<P, R, N / R>(h1 + r * tile.stride, h2 + r * tile.stride, tile.stride, taps, w.gate, g + r * tile.columns,
                              tile.columns);
    }
  };
  lines(std::integral_constant<int, N>{});
  lines(std::integral_constant<int, N / 2>{});
  lines(std::integral_constant<int, 1>{});
}

// Gates a pair that is not convolved; g may be h1.
template <class P, class A>
MIRAGE_INLINE void gate_rows(const A* h1, const A* h2, Activation gate, int64_t pixels, A* g) {
  constexpr int L = kLanes<A>, N = kSideBySide;
  const auto vectors = [&](int64_t p, auto& d1) {
    constexpr int count = int(sizeof(d1) / sizeof(d1[0]));
    Vec<A> d2[count];
    for (int i = 0; i < count; ++i) {
      d1[i] = load(h1 + p + i * L);
      d2[i] = load(h2 + p + i * L);
    }
    gate_each<P, count, A>(d1, d2, gate);
    store_each(g + p, d1);
  };
  int64_t p = 0;
  for (Vec<A> v[N]; p + N * L <= pixels; p += N * L) vectors(p, v);
  for (Vec<A> v[1]; p < pixels; p += L) vectors(p, v);
}

template <int N, class A>
MIRAGE_INLINE void gelu_vectors(A* at) {
  Vec<A> v[N];
  for (int i = 0; i < N; ++i) v[i] = load(at + i * kLanes<A>);
  vgelu_each(v);
  store_each(at, v);
}

// GELU in place of whole vectors.
template <class A>
MIRAGE_INLINE void gelu_row(A* row, int64_t pixels) {
  constexpr int64_t N = kSideBySide, L = kLanes<A>;
  int64_t p = 0;
  for (; p + N * L <= pixels; p += N * L) gelu_vectors<N>(row + p);
  for (; p < pixels; p += L) gelu_vectors<1>(row + p);
}

}  // namespace mirage::cpu::MIRAGE_ISA::feed_forward_forward
