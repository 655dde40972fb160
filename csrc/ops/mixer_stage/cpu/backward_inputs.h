// The second backward pass of mixer_stage: from the gradients of the dynamic convolution's output and of v, q and k to
// those of the normalised x, through the convolutions and 1x1 projections on the way.
#pragma once

#include "backward_parts.h"

namespace mirage::cpu::MIRAGE_ISA {

// The small matrices of every sample that the pass needs.
template <class A>
struct Matrices {
  int64_t heads, d, c;
  Buffer<A> gram, gram_t;  // gradients of q k^T [B, heads, d, d], and transposed
  Buffer<A> scales;        // [B, heads, 2d]: of q and k themselves in their own gradients
  Buffer<A> detail;        // [B, c]: gradient of every pixel of the detail rows, through the kernel generator
  Buffer<A> turned;        // [B, c, 49]: the kernels turned by 180 degrees
  Buffer<A> turned_qkv;    // [3c, 9]

  Matrices(const Mixer<A>& w, int64_t batch)
      : heads(w.heads), d(w.d), c(w.c), gram(batch * w.c * w.d), gram_t(batch * w.c * w.d), scales(batch * 2 * w.c),
        detail(batch * w.c), turned(batch * w.c * kTaps), turned_qkv(3 * w.c * 9) {}
};

template <class T>
class InputsPass {
 public:
  using A = Acc<T>;

  InputsPass(const Tensor& x, const Mixer<A>& w, const BackwardWeights<A>& t, const Folded<A>& f, const A* var,
             const Matrices<A>& matrices, const Between<A>& between)
      : x_(x), w_(w), t_(t), f_(f), var_(var), m_(matrices), between_(between), g_(w),
        rows_(w.d < kRowsAtOnce ? w.d * smaller(w.heads, kRowsAtOnce / w.d) : w.d),
        tiling_(choose_dense<A>(x.size[2], x.size[3], kMixerHalo, w.C + w.c + 6 * rows_, 5 * w.c + 2 * rows_)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)) {}

  int64_t units() const { return x_.size[0] * tiling_.count(); }
  int64_t scratch() const { return (w_.C + w_.c + 6 * rows_) * outer_ + (5 * w_.c + 2 * rows_) * inner_; }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t c = w_.c, O = outer_, I = inner_;
    A *normed = scratch, *wide = normed + w_.C * O, *before = wide + c * O, *middle = before + 2 * rows_ * O,
      *att_in = middle + 4 * rows_ * O, *conv_in = att_in + c * I, *grad = conv_in + c * I, *extra = grad + c * I,
      *grad_before = extra + 2 * c * I;
    const Tile tile = tiling_.template tile<A>(unit % tiling_.count()), by_two = with_halo<A>(tile, 2);
    const MixerTile at{by_two, O, I, dense_pixels<A>(tile), unit / tiling_.count()};
    load_normalised<T>(w_, x_, at, normed);
    copy_dense(normed, O, by_two, 2 * c, att_in, I);
    detail(at, tile, conv_in, wide, grad, extra, sums);
    for (int64_t first = 0; first < c; first += rows_) {
      const int64_t n = smaller(rows_, c - first);  // whole heads
      query_key(at, first, n, normed, before, middle);
      convolution_backward(at, first, n, before, middle + 2 * n * O, grad_before, sums);
      share(at, first, n, first == 0, grad_before, att_in, grad, sums);
      convolution_backward(at, c + first, n, before + n * O, middle + 3 * n * O, grad_before, sums);
      share(at, c + first, n, false, grad_before, att_in, grad, sums);
      project_rows(at, 2 * c + first, n, normed, before);
      const A* value = between_.value_of(at.sample) + first * between_.plane();
      load_tile(value, between_.planes(nullptr), with_halo<A>(tile, 1), n, O, middle);
      convolution_backward(at, 2 * c + first, n, before, middle, grad_before, sums);
      share(at, 2 * c + first, n, false, grad_before, att_in, grad, sums);
    }
    store_dense(grad, I, tile, c, between_.normed_of(at.sample, 0));
  }

 private:
  static constexpr int64_t kRowsAtOnce = 24;

  // Backward of the detail rows: their gradient, the part of gic1's gradient, BatchNorm's sums. conv_in becomes
  // BatchNorm's output.
  void detail(const MixerTile& at, const Tile& tile, A* conv_in, A* wide, A* grad, A* grad_normal, A* sums) const {
    const int64_t c = w_.c, I = at.inner, first = 2 * w_.h - c, pixels = tile.rows * tile.columns;
    load_tile(between_.dynamic_of(at.sample), between_.planes(nullptr), tile, c, at.outer, wide);
    for (int64_t j = 0; j < c; ++j) {
      A* const row = grad + j * I;
      const int64_t channel = at.sample * c + j;
      depthwise<kMixerKernelSize>(wide + j * at.outer, tile.stride, m_.turned.get() + channel * kTaps, row, tile.rows,
                                  tile.columns);
      for (int64_t p = 0; p < at.pixels; p += kLanes<A>) store(row + p, load(row + p) + m_.detail[channel]);
    }
    clear_tails(grad, c, I, pixels);
    load_tile(between_.normed_of(at.sample, 1), between_.planes(nullptr), with_halo<A>(tile, 0), c, I, grad_normal);
    mix(t_.gic1_t.get() + first, 2 * w_.h, c, c, grad, I, at.pixels, [&](int64_t m, int64_t p, Vec<A> v) {
      store(grad_normal + m * I + p, load(grad_normal + m * I + p) + v);
    });
    store_dense(grad_normal, I, tile, c, between_.normed_of(at.sample, 1));
    for (int64_t j = 0; j < c; ++j) {
      A* const row = conv_in + j * I;
      const A inverse = A(1 / __builtin_sqrt(double(var_[j]) + double(w_.bn_eps)));
      Vec<A> weight = {}, bias = {};
      for (int64_t p = 0; p < at.pixels; p += kLanes<A>) {
        const Vec<A> g = load(grad_normal + j * I + p), n = load(row + p) - f_.mean[j];
        bias += g;
        weight += g * (n * inverse);
        store(row + p, n * f_.scale[j] + f_.shift[j]);
      }
      sums[g_.bn_weight + j] += sum<A>(weight);
      sums[g_.bn_bias + j] += sum<A>(bias);
    }
    add_outer(grad, I, c, conv_in, I, c, at.pixels, sums + g_.gic1 + first * c, c);
  }

  // Computes rows of q, k or v before their depthwise convolution, with a halo of two.
  void project_rows(const MixerTile& at, int64_t first, int64_t n, const A* normed, A* before) const {
    const Span span = inside_plane<A>(at.tile, at.tile.halo);
    A* const inside = before + span.begin;
    mix(w_.products.qkv.at(first), n, w_.c, normed + span.begin, at.outer, span.end - span.begin,
        [&](int64_t m, int64_t p, Vec<A> v) { store(inside + m * at.outer + p, v); });
    clear_around(span, at.tile.outer_pixels, n, at.outer, before);
  }

  // q and k of the heads in rows [first, first + n), with a halo of one, and their gradients behind them in `middle`.
  void query_key(const MixerTile& at, int64_t first, int64_t n, const A* normed, A* before, A* middle) const {
    const Tile by_one = with_halo<A>(at.tile, 1);
    const int64_t O = at.outer;
    project_rows(at, first, n, normed, before);
    project_rows(at, w_.c + first, n, normed, before + n * O);
    for (int64_t j = 0; j < 2 * n; ++j) {
      const A* weight = w_.qkv_dwconv + (j < n ? first + j : w_.c + first + j - n) * 9;
      depthwise<3>(before + j * O, at.tile.stride, weight, middle + j * O, by_one.rows + 2, by_one.columns + 2);
    }
    clear_outside(middle, 2 * n, O, by_one);
    const A *q = middle, *k = q + n * O;
    A *grad_q = middle + 2 * n * O, *grad_k = grad_q + n * O;
    for (int64_t row = 0; row < n; row += w_.d) {
      const int64_t head = at.sample * w_.heads + (first + row) / w_.d;
      const A *scale = m_.scales.get() + head * 2 * w_.d, *matrix = m_.gram.get() + head * w_.d * w_.d,
              *matrix_t = m_.gram_t.get() + head * w_.d * w_.d;
      mix(matrix, w_.d, w_.d, w_.d, k + row * O, O, by_one.outer_pixels, [&](int64_t m, int64_t p, Vec<A> v) {
        store(grad_q + (row + m) * O + p, v + load(q + (row + m) * O + p) * scale[m]);
      });
      mix(matrix_t, w_.d, w_.d, w_.d, q + row * O, O, by_one.outer_pixels, [&](int64_t m, int64_t p, Vec<A> v) {
        store(grad_k + (row + m) * O + p, v + load(k + (row + m) * O + p) * scale[w_.d + m]);
      });
    }
  }

  // Depthwise 3x3 backward: the gradients of the weights and of the input. grad: with a halo of one.
  void convolution_backward(const MixerTile& at, int64_t first, int64_t n, const A* before, const A* grad, A* grad_before,
                            A* sums) const {
    const int64_t stride = at.tile.stride, inner_stride = at.tile.columns + 2;
    for (int64_t j = 0; j < n; ++j) {
      correlate<3>(before + j * at.outer + stride + 1, stride, grad + j * at.outer + inner_stride + 1, inner_stride,
                   at.tile.rows, at.tile.columns, outside(at.tile, 1), sums + g_.qkv_dwconv + (first + j) * 9);
      depthwise<3>(grad + j * at.outer, inner_stride, m_.turned_qkv.get() + (first + j) * 9, grad_before + j * at.inner,
                   at.tile.rows, at.tile.columns);
    }
    clear_tails(grad_before, n, at.inner, at.tile.rows * at.tile.columns);
  }

  // Adds the contribution of n rows of qkv to its gradient and to that of the normalised x.
  void share(const MixerTile& at, int64_t first, int64_t n, bool is_first, const A* grad_before, const A* att_in,
             A* grad, A* sums) const {
    add_outer(grad_before, at.inner, n, att_in, at.inner, w_.c, at.pixels, sums + g_.qkv + first * w_.c, w_.c);
    mix_share(t_.qkv_t.from(first), w_.c, n, grad_before, at.inner, at.pixels, is_first, grad);
  }

  const Tensor& x_;
  const Mixer<A>& w_;
  const BackwardWeights<A>& t_;
  const Folded<A>& f_;
  const A* var_;
  const Matrices<A>& m_;
  const Between<A>& between_;
  const Gradients<A> g_;
  int64_t rows_;
  Tiling tiling_;
  int64_t outer_, inner_;
};

}  // namespace mirage::cpu::MIRAGE_ISA
