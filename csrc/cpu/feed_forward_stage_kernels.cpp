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

template <class A>
struct Weights {
  const A *norm_weight, *norm_bias, *project_in, *dwconv, *project_out;
  A eps;
};

// d1 = depthwise(h1), d2 = depthwise(h2), g = gelu(d1) * d2 for one channel pair; pixels of the tile without its halo.
template <class A>
MIRAGE_INLINE void gate_pair(const A* h1, const A* h2, const A* w1, const A* w2, const Tile& tile, A* g) {
  constexpr int L = kLanes<A>;
  Vec<A> a[9], b[9];
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) {
    a[k] = splat(w1[k]);
    b[k] = splat(w2[k]);
  }
  const int64_t stride = tile.stride;
  for (int64_t p = 0; p < tile.inner_pixels; p += L) {
    Vec<A> d1 = {}, d2 = {};
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        d1 += load(h1 + p + ky * stride + kx) * a[ky * 3 + kx];
        d2 += load(h2 + p + ky * stride + kx) * b[ky * 3 + kx];
      }
    }
    store(g + p, vgelu<A>(d1) * d2);
  }
}

// h = gelu(W n), and W n itself, without the halo, to `planes`.
template <class T>
void mix_and_keep(const Acc<T>* rows, int64_t channels, int64_t count, const Acc<T>* normed, int64_t outer,
                  const Tile& tile, Acc<T>* h, T* planes) {
  using A = Acc<T>;
  mix(rows, channels, count, channels, normed, outer, tile.outer_pixels,
      [&](int64_t m, int64_t p, Vec<A> v) { store(h + m * outer + p, v); });
  for (int64_t m = 0; m < count; ++m) {
    A* const row = h + m * outer;
    for (int64_t r = 0; r < tile.rows; ++r) {
      store_row(planes + (m * tile.height + tile.row + r) * tile.width + tile.column,
                row + (r + tile.halo) * tile.stride + tile.halo, tile.columns);
    }
    for (int64_t p = 0; p < tile.outer_pixels; p += kLanes<A>) store(row + p, vgelu<A>(load(row + p)));
  }
}

template <class T>
void run(const Tensor& x, const Weights<Acc<T>>& w, int64_t hidden, const Tensor& y, T* kept) {
  using A = Acc<T>;
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
    normalise_tile(normed, C, outer, tile, w.norm_weight, w.norm_bias, w.eps);
    for (int64_t first = 0; first < hidden; first += group) {
      const int64_t pairs = hidden - first < group ? hidden - first : group;
      for (int half = 0; half < 2; ++half) {
        A* const h = half ? h2 : h1;
        const A* const rows = w.project_in + (first + half * hidden) * C;
        if (kept) {
          T* const planes = kept + (sample * 2 * hidden + first + half * hidden) * H * W;
          mix_and_keep(rows, C, pairs, normed, outer, tile, h, planes);
        } else {
          mix(rows, C, pairs, C, normed, outer, tile.outer_pixels,
              [&](int64_t m, int64_t p, Vec<A> v) { store(h + m * outer + p, vgelu<A>(v)); });
        }
      }
      for (int64_t i = 0; i < pairs; ++i) {
        const A *w1 = w.dwconv + (first + i) * 9, *w2 = w1 + hidden * 9;
        gate_pair(h1 + i * outer, h2 + i * outer, w1, w2, tile, g + i * inner);
      }
      if (first == 0) {
        mix(w.project_out, hidden, C, pairs, g, inner, tile.inner_pixels,
            [&](int64_t m, int64_t p, Vec<A> v) { store(out + m * inner + p, v); });
      } else {
        mix(w.project_out + first, hidden, C, pairs, g, inner, tile.inner_pixels, [&](int64_t m, int64_t p, Vec<A> v) {
          store(out + m * inner + p, load(out + m * inner + p) + v);
        });
      }
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
    const Weights<A> w{static_cast<const A*>(norm_weight.data), static_cast<const A*>(norm_bias.data),
                       static_cast<const A*>(project_in.data), static_cast<const A*>(dwconv.data),
                       static_cast<const A*>(project_out.data), A(eps)};
    run<T>(x, w, project_out.size[1], y, hidden ? hidden->as<T>() : nullptr);
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
