// The feed-forward half of a block, tile by tile: the tile's normalised input with a halo of one pixel, then the hidden
// channels a group at a time (project_in and GELU, depthwise 3x3 and gate, their share of project_out), all in cache.
#include "feed_forward_stage_kernels.h"

#include "dtypes.h"
#include "gemm.h"
#include "parallel.h"
#include "tiles.h"
#include "vec_math.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

constexpr int64_t kGroupPairs = 24;  // hidden channel pairs at a time: a multiple of every kMixRows

constexpr int kSideBySide = MIRAGE_VECTOR_BYTES == 64 ? 4 : 1;  // vectors: with 16 registers more would spill

template <class P>
struct Weights {
  InAccumulator<Acc<P>> norm_weight, norm_bias, dwconv;
  Acc<P> eps;
  OperandMatrix<P> project_in, project_out;
};

// d1 = depthwise(h1), d2 = depthwise(h2), g = gelu(d1) * d2 for N vectors of one channel pair.
template <class P, int N, class A>
MIRAGE_INLINE void gate_vectors(const A* h1, const A* h2, int64_t stride, const Vec<A> (&a)[9], const Vec<A> (&b)[9],
                                A* g) {
  constexpr int L = kLanes<A>;
  Vec<A> d1[N] = {}, d2[N] = {};
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ++ky) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        d1[i] += load(h1 + ky * stride + kx + i * L) * a[ky * 3 + kx];
        d2[i] += load(h2 + ky * stride + kx + i * L) * b[ky * 3 + kx];
      }
    }
  }
  gelu_between<P>(d1);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(g + i * L, d1[i] * d2[i]);
}

// The pixels of a tile without its halo.
template <class P, class A>
MIRAGE_INLINE void gate_pair(const A* h1, const A* h2, const A* w1, const A* w2, const Tile& tile, A* g) {
  constexpr int L = kLanes<A>, N = kSideBySide;
  Vec<A> a[9], b[9];
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) {
    a[k] = splat(w1[k]);
    b[k] = splat(w2[k]);
  }
  int64_t p = 0;
  for (; p + N * L <= tile.inner_pixels; p += N * L) gate_vectors<P, N>(h1 + p, h2 + p, tile.stride, a, b, g + p);
  for (; p < tile.inner_pixels; p += L) gate_vectors<P, 1>(h1 + p, h2 + p, tile.stride, a, b, g + p);
}

template <int N, class A>
MIRAGE_INLINE void gelu_vectors(A* at) {
  Vec<A> v[N];
  for (int i = 0; i < N; ++i) v[i] = load(at + i * kLanes<A>);
  vgelu_each(v);
  store_each(at, v);
}

// h = gelu(W n), and W n itself, without the halo, to `planes`.
template <class T>
void mix_and_keep(const Matrix<Operand<T>>& rows, int64_t channels, int64_t count, const Operand<T>* normed,
                  int64_t outer, const Tile& tile, Span span, Acc<T>* h, T* planes) {
  using A = Acc<T>;
  mix(rows, count, channels, normed + span.begin, outer, span.end - span.begin,
      [&](int64_t m, int64_t p, Vec<A> v) { store(h + m * outer + span.begin + p, v); });
  for (int64_t m = 0; m < count; ++m) {
    A* const row = h + m * outer;
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* const to = planes + (m * tile.height + tile.row + r) * tile.width + tile.column;
      if (m + 1 < count) prefetch_row_to_write(to + tile.height * tile.width, tile.columns);
      store_row(to, row + (r + tile.halo) * tile.stride + tile.halo, tile.columns);
    }
    constexpr int64_t N = kSideBySide, L = kLanes<A>;
    int64_t p = span.begin;
    for (; p + N * L <= span.end; p += N * L) gelu_vectors<N>(row + p);
    for (; p < span.end; p += L) gelu_vectors<1>(row + p);
  }
}

template <class T>
void run(const Tensor& x, const Weights<Operand<T>>& w, int64_t hidden, const Tensor& y, T* kept) {
  using A = Acc<T>;
  using P = Operand<T>;
  const int64_t C = x.size[1], H = x.size[2], W = x.size[3];
  const Tiling tiling = Tiling::choose<A>(H, W, 1, /*channels held=*/2 * C + 3 * kGroupPairs);
  const int64_t outer = tiling.outer_capacity<A>(), inner = tiling.inner_capacity<A>();
  const int64_t group = hidden < kGroupPairs ? hidden : kGroupPairs;

  parallel_units<A>(x.size[0] * tiling.count(), C * outer + 2 * group * outer + group * inner + C * inner,
                    [&](int64_t unit, A* scratch) {
    const int64_t sample = unit / tiling.count();
    const Tile tile = tiling.tile<A>(unit % tiling.count());
    A *normed = scratch, *h1 = normed + C * outer, *h2 = h1 + group * outer, *g = h2 + group * outer,
      *out = g + group * inner;
    const T* px = static_cast<const T*>(x.data) + sample * x.stride[0];
    load_tile(px, x, tile, C, outer, normed);
    normalise_tile(normed, C, outer, tile, w.norm_weight.get(), w.norm_bias.get(), w.eps);
    const P* const in = operand_rows<P>(normed, C, outer, tile.outer_pixels, normed);
    const Span span = inside_plane<A>(tile, tile.halo);
    clear_around(span, tile.outer_pixels, 2 * group, outer, h1);
    for (int64_t first = 0; first < hidden; first += group) {
      const int64_t pairs = hidden - first < group ? hidden - first : group;
      for (int half = 0; half < 2; ++half) {
        A* const h = half ? h2 : h1;
        const Matrix<P> rows = w.project_in.at(first + half * hidden);
        if (kept) {
          T* const planes = kept + (sample * 2 * hidden + first + half * hidden) * H * W;
          mix_and_keep(rows, C, pairs, in, outer, tile, span, h, planes);
        } else {
          mix(rows, pairs, C, in + span.begin, outer, span.end - span.begin,
              by_row([&](int64_t m, int64_t p, auto& v) {
                gelu_between<P>(v);
                store_each(h + m * outer + span.begin + p, v);
              }));
        }
      }
      for (int64_t i = 0; i < pairs; ++i) {
        const A *w1 = w.dwconv + (first + i) * 9, *w2 = w1 + hidden * 9;
        gate_pair<P>(h1 + i * outer, h2 + i * outer, w1, w2, tile, g + i * inner);
      }
      const P* const gated = operand_rows<P>(g, pairs, inner, tile.inner_pixels, g);
      mix_share(w.project_out.at(0, first), C, pairs, gated, inner, tile.inner_pixels, first == 0, out);
    }
    add_tile(px, x, tile, C, inner, out, static_cast<T*>(y.data) + sample * C * H * W, g);
  });
}

}  // namespace

void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out, const Tensor& y,
                        const Tensor* hidden) {
  MIRAGE_FOR_DTYPE(x.dtype, T, {
    using A = Acc<T>;
    const Weights<Operand<T>> w{InAccumulator<A>(norm_weight), InAccumulator<A>(norm_bias), InAccumulator<A>(dwconv),
                                A(eps), OperandMatrix<Operand<T>>(project_in), OperandMatrix<Operand<T>>(project_out)};
    run<T>(x, w, project_out.size[1], y, hidden ? hidden->as<T>() : nullptr);
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
