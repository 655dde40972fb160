// Convolutions between all channels, tile by tile: channel mixing (gemm.h) whose depth runs over the taps and the
// channels. A tap of a tile with its halo is an offset, so no patch is ever copied out.
#include "cpu_kernels.h"

#include "common/cpu/ahead.h"
#include "common/cpu/dtypes.h"
#include "common/cpu/gemm.h"
#include "common/cpu/gradients.h"
#include "common/cpu/inner_tile.h"
#include "common/cpu/inside_plane.h"
#include "common/cpu/tiles.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

// A weight [M, C, K * K] as the left operand: rows of taps of channels. Transposed, the rows are input channels and the
// taps are turned: the convolution that takes gradients back.
template <int K, class P>
class TapMatrix : public Matrix<P> {
 public:
  using A = Acc<P>;

  TapMatrix(const Tensor& weight, bool transposed)
      : Matrix<P>{nullptr, kTaps * packed<P>(weight.size[transposed ? 0 : 1])},
        room_(weight.size[transposed ? 1 : 0] * this->stride) {
    const InAccumulator<A> elements(weight);
    const int64_t M = weight.size[0], C = weight.size[1], rows = transposed ? C : M, channels = transposed ? M : C;
    const int64_t padded = this->stride / kTaps * int64_t(sizeof(P) / sizeof(Stored<P>));
    parallel_units<A>(rows, padded * kTaps, [&](int64_t row, A* line) {
      const A* const from = elements + row * (transposed ? 1 : C) * kTaps;
      const int64_t step = (transposed ? C : 1) * kTaps;
      for (int64_t k = 0; k < channels; ++k) {
#pragma GCC unroll 9
        for (int tap = 0; tap < kTaps; ++tap) {
          line[tap * padded + k] = from[k * step + (transposed ? kTaps - 1 - tap : tap)];
        }
      }
      for (int tap = 0; tap < kTaps; ++tap) {
        for (int64_t k = channels; k < padded; ++k) line[tap * padded + k] = A(0);
      }
      store_row(reinterpret_cast<Stored<P>*>(room_.get() + row * this->stride), line, padded * kTaps);
    });
    this->data = room_.get();
  }

 private:
  static constexpr int64_t kTaps = K * K;
  Buffer<P> room_;
};

// y = x convolved with `weights`, of M rows.
template <int K, class T, class P>
void convolve(const Tensor& x, const Matrix<P>& weights, const Tensor& y) {
  using A = Acc<T>;
  const int64_t C = x.size[1], M = y.size[1], H = x.size[2], W = x.size[3];
  const Tiling tiling = K == 1 ? choose_pointwise<A>(H, W, C + M) : Tiling::choose<A>(H, W, K / 2, C + M);
  const int64_t outer = tiling.outer_capacity<A>(), inner = tiling.inner_capacity<A>();
  const int64_t tiles = tiling.count();
  const auto tile_of = [&](int64_t i) { return tiling.tile<A>(i); };
  parallel_units<A>(x.size[0] * tiles, C * outer + M * inner, [&](int64_t unit, A* scratch) {
    const int64_t sample = unit / tiles;
    const Tile tile = tile_of(unit % tiles);
    Ahead ahead{TileLines::after<T>(unit, x, tiles, K / 2, tile_of), TileLines::of<T>(y, sample, tile)};
    A *const in = scratch, *const out = in + C * outer;
    load_tile(x.as<const T>() + sample * x.stride[0], x, tile, C, outer, in);
    const P* const rows = operand_rows<P>(in, C, outer, tile.outer_pixels, in);
    mix(weights, M, TapRows<K, P>{rows, outer, packed<P>(C), tile.stride}, tile.inner_pixels,
        by_row([&](int64_t m, int64_t p, const auto& v) {
          store_each(out + m * inner + p, v);
          ahead.step<A, sizeof(v) / sizeof(v[0])>(1);
        }));
    T* const planes = y.as<T>() + sample * M * H * W;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        T* const to = planes + (m * H + tile.row + r) * W + tile.column;
        if (m + 1 < M) prefetch_row_to_write(to + H * W, tile.columns);
        store_row(to, out + m * inner + r * tile.stride, tile.columns);
      }
    }
  });
}

// total: [taps, M, C] (double) += add(tile, x, grad_y, sums) of every tile, `x` [C, outer] with its halo and `grad_y`
// [M, inner] in lines as long as those of x, with zeros behind the last pixel.
template <int K, class T, class Add>
void sum_over_tiles(const Tensor& grad_y, const Tensor& x, double* total, const Add& add) {
  using A = Acc<T>;
  const int64_t C = x.size[1], M = grad_y.size[1];
  const Tiling tiling = Tiling::choose_by_shape<A>(x.size[2], x.size[3], K / 2, C + M);
  const int64_t outer = tiling.outer_capacity<A>(), inner = tiling.inner_capacity<A>();
  sum_over_units<A>(x.size[0] * tiling.count(), K * K * M * C, C * outer + M * inner, total,
                    [&](int64_t unit, A* sums, A* scratch) {
    const int64_t sample = unit / tiling.count();
    const Tile tile = tiling.tile<A>(unit % tiling.count());
    A *const in = scratch, *const grad = in + C * outer;
    load_tile(x.as<const T>() + sample * x.stride[0], x, tile, C, outer, in);
    Tile lines = tile;
    lines.halo = 0;
    load_tile(grad_y.as<const T>() + sample * grad_y.stride[0], grad_y, lines, M, inner, grad);
    add(tile, in, outer, grad, inner, sums);
  });
}

// total: [taps, M, C] (double), zero, becomes the gradient of the weight.
template <int K, class T>
void weight_gradient(const Tensor& grad_y, const Tensor& x, double* total) {
  using A = Acc<T>;
  const int64_t C = x.size[1], M = grad_y.size[1], count = K * K * M * C;
  sum_over_tiles<K, T>(grad_y, x, total, [&](const Tile& tile, const A* in, int64_t outer, const A* grad, int64_t inner,
                                             A* sums) {
    for (int64_t tap = 0; tap < K * K; ++tap) {
      add_outer(grad, inner, M, in + tap / K * tile.stride + tap % K, outer, C, tile.inner_pixels, sums + tap * M * C, C);
    }
  });
  if (K == 1 || all_finite(total, count)) return;
  // A pixel of x or grad_y that is not finite has met the zeros around the plane or behind the lines of the other.
  Buffer<double> again(count);
  clear_sums(again.get(), count);
  sum_over_tiles<K, T>(grad_y, x, again.get(), [&](const Tile& tile, const A* in, int64_t outer, const A* grad,
                                                   int64_t inner, A* sums) {
    const Outside out = outside(tile, K / 2);
    for (int64_t i = 0; i < count; ++i) {
      if (is_finite(total[i])) continue;
      const int64_t tap = i / (M * C), m = i / C % M, c = i % C;
      sums[i] += A(tap_sum(in + c * outer, tile.stride, grad + m * inner, tile.stride, tile.rows, tile.columns, out, K,
                           tap / K, tap % K));
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    if (!is_finite(total[i])) total[i] = again[i];
  }
}

template <int K, class T>
void run_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                  const Tensor& grad_weight) {
  using A = Acc<T>;
  if (grad_x.ndim == 4) convolve<K, T>(grad_y, TapMatrix<K, A>(weight, /*transposed=*/true), grad_x);
  if (grad_weight.ndim != 3) return;
  const int64_t matrix = weight.size[0] * weight.size[1];
  Buffer<double> total(K * K * matrix);
  clear_sums(total.get(), K * K * matrix);
  weight_gradient<K, T>(grad_y, x, total.get());
  put_transposed_sums<A>(total.get(), matrix_of(grad_weight.as<A>(), matrix, K * K));
}

}  // namespace

void dense_conv2d(const Tensor& x, const Tensor& weight, const Tensor& y) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, {
    using P = Operand<T>;
    if (weight.size[2] == 1) convolve<1, T>(x, OperandMatrix<P>(weight), y);
    else convolve<3, T>(x, TapMatrix<3, P>(weight, /*transposed=*/false), y);
  })
}

void dense_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                           const Tensor& grad_weight) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, {
    if (weight.size[2] == 1) run_backward<1, T>(grad_y, x, weight, grad_x, grad_weight);
    else run_backward<3, T>(grad_y, x, weight, grad_x, grad_weight);
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
