// A gated half of a block, tile by tile: the tile's normalised input with a halo of one pixel, then the hidden channels a
// group at a time (project_in and GELU, depthwise 3x3 and gate, their share of project_out), all in cache. With `excite` the
// gated channels are left in memory instead, and a second pass multiplies them by each sample's own project_out.
#include "kernels.h"

#include "common/cpu/by_sample.h"
#include "common/cpu/dtypes.h"
#include "common/cpu/in_place.h"
#include "common/cpu/line_sums.h"
#include "common/cpu/vec_math.h"
#include "common/cpu/vector_or_null.h"
#include "excitation.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

constexpr int64_t kGroupPairs = 24;  // hidden channel pairs at a time: a multiple of every kMixRows
constexpr int64_t kChunks = 64;      // of all tiles, with sums of their own

constexpr int kSideBySide = MIRAGE_VECTOR_BYTES == 64 ? 4 : 1;  // vectors at a time: with 16 registers more would spill

template <class P>
struct Weights {
  using A = Acc<P>;

  Weights(const FeedForwardWeights& w, const FeedForwardOptions& options)
      : channels(w.project_out.size[0]), hidden(w.project_out.size[1]), eps(A(options.eps)), norm(options.norm), activation(options.activation),
        gate(options.gate), convolves(exists(w.dwconv)), excites(exists(w.excite)), with_input_bias(exists(w.project_in_bias)), with_output_bias(exists(w.project_out_bias)),
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
  const A *a_bias, *b_bias;
};

// g = gate(d1) * d2 for N vectors.
template <class P, int N, class A>
MIRAGE_INLINE void gate_each(Vec<A> (&d1)[N], const Vec<A> (&d2)[N], Activation gate, A* g) {
  if (gate == Activation::gelu) gelu_between<P>(d1);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(g + i * kLanes<A>, d1[i] * d2[i]);
}

// d1 = depthwise(h1), d2 = depthwise(h2), g = gate(d1) * d2 for N vectors of one channel pair.
template <class P, int N, class A>
MIRAGE_INLINE void gate_vectors(const A* h1, const A* h2, int64_t stride, const PairTaps<A>& taps, Activation gate, A* g) {
  constexpr int L = kLanes<A>;
  Vec<A> d1[N], d2[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    d1[i] = splat(*taps.a_bias);
    d2[i] = splat(*taps.b_bias);
  }
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ++ky) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        d1[i] += load(h1 + ky * stride + kx + i * L) * taps.a[ky * 3 + kx];
        d2[i] += load(h2 + ky * stride + kx + i * L) * taps.b[ky * 3 + kx];
      }
    }
  }
  gate_each<P>(d1, d2, gate, g);
}

// The same without the convolution; g may be h1.
template <class P, int N, class A>
MIRAGE_INLINE void gate_vectors(const A* h1, const A* h2, Activation gate, A* g) {
  Vec<A> d1[N], d2[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    d1[i] = load(h1 + i * kLanes<A>);
    d2[i] = load(h2 + i * kLanes<A>);
  }
  gate_each<P>(d1, d2, gate, g);
}

// Convolves and gates the pixels of a tile without its halo.
template <class P, class A>
MIRAGE_INLINE void gate_pair(const A* h1, const A* h2, const Weights<P>& w, int64_t pair, const Tile& tile, A* g) {
  constexpr int L = kLanes<A>, N = kSideBySide;
  int64_t p = 0;
  if (!w.convolves) {
    for (; p + N * L <= tile.inner_pixels; p += N * L) gate_vectors<P, N>(h1 + p, h2 + p, w.gate, g + p);
    for (; p < tile.inner_pixels; p += L) gate_vectors<P, 1>(h1 + p, h2 + p, w.gate, g + p);
    return;
  }
  const A *w1 = w.dwconv.from(pair * 9), *w2 = w1 + w.hidden * 9, *bias = w.dwconv_bias + pair;
  PairTaps<A> taps{{}, {}, bias, bias + w.hidden};
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) {
    taps.a[k] = splat(w1[k]);
    taps.b[k] = splat(w2[k]);
  }
  for (; p + N * L <= tile.inner_pixels; p += N * L) gate_vectors<P, N>(h1 + p, h2 + p, tile.stride, taps, w.gate, g + p);
  for (; p < tile.inner_pixels; p += L) gate_vectors<P, 1>(h1 + p, h2 + p, tile.stride, taps, w.gate, g + p);
}

template <class V, int N, class A>
MIRAGE_INLINE void add_to_each(V (&v)[N], A value) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) v[i] += value;
}

template <int N, class A>
MIRAGE_INLINE void gelu_vectors(A* at) {
  Vec<A> v[N];
  for (int i = 0; i < N; ++i) v[i] = load(at + i * kLanes<A>);
  vgelu_each(v);
  store_each(at, v);
}

// h = activation(W n + bias), bias null for none. Also stores W n + bias, without the halo, to `planes`.
template <class T>
void mix_and_keep(const Matrix<Operand<T>>& rows, const Acc<T>* bias, Activation activation, int64_t channels,
                  int64_t count, const Operand<T>* normed, int64_t outer, const Tile& tile, Span span, Acc<T>* h,
                  T* planes) {
  using A = Acc<T>;
  mix(rows, count, channels, normed + span.begin, outer, span.end - span.begin,
      [&](int64_t m, int64_t p, Vec<A> v) { store(h + m * outer + span.begin + p, bias ? v + bias[m] : v); });
  for (int64_t m = 0; m < count; ++m) {
    A* const row = h + m * outer;
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* const to = planes + (m * tile.height + tile.row + r) * tile.width + tile.column;
      if (m + 1 < count) prefetch_row_to_write(to + tile.height * tile.width, tile.columns);
      store_row(to, row + (r + tile.halo) * tile.stride + tile.halo, tile.columns);
    }
    if (activation == Activation::none) continue;
    constexpr int64_t N = kSideBySide, L = kLanes<A>;
    int64_t p = span.begin;
    for (; p + N * L <= span.end; p += N * L) gelu_vectors<N>(row + p);
    for (; p < span.end; p += L) gelu_vectors<1>(row + p);
  }
}

template <class T>
class Stage {
 public:
  using A = Acc<T>;
  using P = Operand<T>;

  // x and y are whole maps; of y the pixels of the region are written.
  Stage(const Tensor& x, const Weights<P>& w, const Region& region, const Tensor& y, T* kept)
      : x_(x), w_(w), region_(region), y_(y), kept_(kept), C_(x.size[1]), hidden_(w.hidden),
        group_(hidden_ < kGroupPairs ? hidden_ : kGroupPairs),
        tiling_(tiling_of(w, region)),
        outer_(tiling_.outer_capacity<A>()), inner_(w.convolves ? tiling_.inner_capacity<A>() : outer_) {}

  int64_t tiles() const { return tiling_.count(); }
  int64_t scratch() const { return (C_ + 2 * group_) * outer_ + (group_ + C_) * inner_; }

  void run() const {
    const auto one = [&](int64_t sample, const Tile& tile, const Around<T>& around, A* room) {
      of_tile(sample, tile, around, room);
    };
    if (x_.data == y_.data && w_.convolves) return parallel_tiles_in_place<T>(x_, tiling_, scratch(), one);
    parallel_units<A>(x_.size[0] * tiles(), scratch(), [&](int64_t unit, A* room) {
      one(unit / tiles(), placed(tiling_.tile<A>(unit % tiles())), {}, room);
    });
  }

  // Leaves the gated channels of a tile in `gated` [B, M, H, W], and adds them up in sums [M].
  void leave_gated(int64_t unit, const Tensor& gated, A* sums, A* scratch) const {
    const int64_t sample = unit / tiles();
    const Tile tile = tiling_.tile<A>(unit % tiles());
    T* const planes = gated.as<T>() + sample * gated.stride[0];
    gated_groups(sample, tile, {}, scratch, [&](int64_t first, int64_t pairs, A* g) {
      add_line_sums(g, pairs, inner_, tile.rows, tile.columns, tile.stride, sums + first);
      for (int64_t i = 0; i < pairs; ++i) {
        T* const to = planes + (first + i) * gated.stride[1] + tile.row * tile.width + tile.column;
        for (int64_t r = 0; r < tile.rows; ++r) {
          store_row(to + r * tile.width, g + i * inner_ + r * tile.stride, tile.columns);
        }
      }
    });
  }

 private:
  static Tiling tiling_of(const Weights<P>& w, const Region& region) {
    const int64_t C = w.channels;
    // No share of project_out has to stay in cache beside the hidden channels: tiles may be larger, with less of a halo.
    if (w.excites) return choose_dense<A>(region.rows, region.columns, w.convolves, C + 2 * kGroupPairs, kGroupPairs);
    const int64_t held = 2 * C + 3 * kGroupPairs;
    if (!w.convolves) return Tiling::choose_by_shape<A>(region.rows, region.columns, 0, held);  // no halo to save
    return Tiling::choose<A>(region.rows, region.columns, 1, held);
  }

  // A tile of the region, in the map.
  Tile placed(Tile tile) const {
    tile.row += region_.row;
    tile.column += region_.column;
    tile.height = x_.size[2];
    tile.width = x_.size[3];
    return tile;
  }

  void of_tile(int64_t sample, const Tile& tile, const Around<T>& around, A* scratch) const {
    A* const out = scratch + (C_ + 2 * group_) * outer_ + group_ * inner_;
    A* const line = gated_groups(sample, tile, around, scratch, [&](int64_t first, int64_t pairs, A* g) {
      const P* const gated = operand_rows<P>(g, pairs, inner_, tile.inner_pixels, g);
      project_out(first, pairs, gated, tile.inner_pixels, out);
    });
    add_tile(x_.as<const T>() + sample * x_.stride[0], x_, tile, C_, inner_, out,
             y_.as<T>() + sample * y_.stride[0], y_, line);
  }

  // take(first, pairs, gated) for each group of the gated channels of a tile, [pairs, inner]. Returns their place.
  template <class F>
  MIRAGE_INLINE A* gated_groups(int64_t sample, const Tile& tile, const Around<T>& around, A* scratch, F take) const {
    A *normed = scratch, *h1 = normed + C_ * outer_, *h2 = h1 + group_ * outer_, *g = h2 + group_ * outer_;
    load_tile(x_.as<const T>() + sample * x_.stride[0], x_, tile, C_, outer_, normed, around);
    normalise_tile(normed, C_, outer_, tile, w_.norm_weight.get(), w_.norm_bias.get(), w_.eps, w_.norm);
    const P* const in = operand_rows<P>(normed, C_, outer_, tile.outer_pixels, normed);
    const Span span = inside_plane<A>(tile, tile.halo);
    clear_around(span, tile.outer_pixels, 2 * group_, outer_, h1);
    for (int64_t first = 0; first < hidden_; first += group_) {
      const int64_t pairs = hidden_ - first < group_ ? hidden_ - first : group_;
      for (int half = 0; half < 2; ++half) project_in(sample, tile, span, in, first, half, pairs, half ? h2 : h1);
      for (int64_t i = 0; i < pairs; ++i) {
        gate_pair<P>(h1 + i * outer_, h2 + i * outer_, w_, first + i, tile, g + i * inner_);
      }
      take(first, pairs, g);
    }
    return g;
  }

  // h = activation(project_in(in)) for `pairs` channels of one half, from channel `first` of it on.
  MIRAGE_INLINE void project_in(int64_t sample, const Tile& tile, Span span, const P* in, int64_t first, int half,
                                int64_t pairs, A* h) const {
    const int64_t row = first + half * hidden_;
    const Matrix<P> rows = w_.project_in.at(row);
    const A* const bias = w_.with_input_bias ? w_.project_in_bias + row : nullptr;
    if (kept_) {
      T* const planes = kept_ + (sample * 2 * hidden_ + row) * tile.height * tile.width;
      mix_and_keep(rows, bias, w_.activation, C_, pairs, in, outer_, tile, span, h, planes);
    } else {
      mix(rows, pairs, C_, in + span.begin, outer_, span.end - span.begin,
          by_row([&](int64_t m, int64_t p, auto& v) {
            if (bias) add_to_each(v, bias[m]);
            if (w_.activation == Activation::gelu) gelu_between<P>(v);
            store_each(h + m * outer_ + span.begin + p, v);
          }));
    }
    if (bias) clear_outside(h, pairs, outer_, tile);
  }

  // out (+)= project_out(gated), for the pairs from `first` on.
  MIRAGE_INLINE void project_out(int64_t first, int64_t pairs, const P* gated, int64_t pixels, A* out) const {
    const Matrix<P> columns = w_.project_out.at(0, first);
    if (first > 0 || !w_.with_output_bias) return mix_share(columns, C_, pairs, gated, inner_, pixels, first == 0, out);
    mix(columns, C_, pairs, gated, inner_, pixels, [&](int64_t m, int64_t p, Vec<A> v) {
      store(out + m * inner_ + p, v + w_.project_out_bias[m]);
    });
  }

  const Tensor& x_;
  const Weights<P>& w_;
  const Region region_;
  const Tensor& y_;
  T* const kept_;
  const int64_t C_, hidden_, group_;
  const Tiling tiling_;
  const int64_t outer_, inner_;
};

template <class T>
void run(const Tensor& x, const FeedForwardWeights& weights, const FeedForwardOptions& options, const Region& region,
         const Tensor& y, T* hidden) {
  using A = Acc<T>;
  using P = Operand<T>;
  const Weights<P> w(weights, options);
  const Stage<T> stage(x, w, region, y, hidden);
  if (!exists(weights.excite)) return stage.run();
  const int64_t B = x.size[0], C = x.size[1], M = w.hidden, plane = x.size[2] * x.size[3];
  Buffer<T> room(M == C ? 0 : B * M * plane);  // else y holds them, until it has its own values
  const Tensor gated{M == C ? y.data : room.get(), x.dtype, 4, {B, M, x.size[2], x.size[3]}, {M * plane, plane, x.size[3], 1}};
  Buffer<double> sums(B * M);
  sum_by_sample<A>(B, stage.tiles(), kChunks, M, stage.scratch(), sums.get(),
                   [&](int64_t unit, A* of_tiles, A* scratch) { stage.leave_gated(unit, gated, of_tiles, scratch); });
  const Excitation<A> excitation(weights);
  Buffer<A> means(B * M), scales(B * M), folded(B * C * M);
  excitation.means(B, sums.get(), M, plane, means.get());
  excitation.scales(B, means.get(), scales.get());
  excitation.fold(B, scales.get(), folded.get());
  apply_by_sample<T>(x, OperandMatrix<P>(matrix_of(folded.get(), B * C, M)), gated, w.project_out_bias.get(), y);
}

}  // namespace

void feed_forward_stage(const Tensor& x, const FeedForwardWeights& weights, const FeedForwardOptions& options,
                        const Region& region, const Tensor& y, const Tensor* hidden) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run<T>(x, weights, options, region, y, hidden ? hidden->as<T>() : nullptr); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
