// The three passes of channel_attention_stage's backward over tiles. The first reduces the gradient of the folded matrix and
// goes back to v, the second goes from the gradient of q k^T to q and k, the third through the convolutions and the norm to x.
#pragma once

#include "common/cpu/layer_norm_tile.h"
#include "parts.h"

namespace mirage::cpu::MIRAGE_ISA::channel_attention_parts {

// Gradients of (q, k, v) [B, 3C, H, W] of the accumulator type, which two passes leave to the third.
template <class A>
struct Between {
  int64_t C, plane;
  Tensor planes;  // their strides
  Buffer<A> data;

  Between(const Tensor& x)
      : C(x.size[1]), plane(x.size[2] * x.size[3]),
        planes{nullptr, kDTypeOf<A>, 4, {}, {3 * C * plane, plane, x.size[3], 1}}, data(x.size[0] * 3 * C * plane) {}

  A* at(int64_t sample, int64_t row) const { return data.get() + (sample * 3 * C + row) * plane; }
};

// Gradients through a bounded number of rows of q, k or v: the depthwise convolution's sums, and the rows themselves.
template <class A>
inline void leave_gradient(const Attention<A>& w, const AttentionTile& at, const A* before, const A* grad, int64_t first,
                           int64_t n, const Between<A>& between, A* taps, A* biases) {
  add_depthwise_sums(before, n, at.tile, at.outer, grad, at.inner, taps + first * 9);
  if (w.taps_bias.from(0)) add_row_sums(grad, n, at.inner, at.pixels, biases + first);
  store_dense(grad, at.inner, at.tile, n, between.at(at.sample, first));
}

// v: the gradient of the folded matrix, dY v^T, and that of v. Sums, of each sample: [C, C], then project_out's bias [C], the
// depthwise convolution's taps [3C, 9] and biases [3C], of q, k and v, of which the other passes have their own shares.
struct SampleSums {
  int64_t folded, out_bias, taps, taps_bias, count;
  explicit SampleSums(int64_t C)
      : folded(0), out_bias(C * C), taps(out_bias + C), taps_bias(taps + 27 * C), count(taps_bias + 3 * C) {}
};

template <class T>
class ValuesPass {
 public:
  using A = Acc<T>;
  using P = Operand<T>;

  ValuesPass(const Tensor& grad_y, const Tensor& x, const Attention<A>& w, const Matrix<P>& qkv, const A* folded_t,
             const Between<A>& between)
      : grad_y_(grad_y), x_(x), w_(w), qkv_(qkv), folded_t_(folded_t), between_(between), s_(w.C),
        rows_(smaller(w.C, kRowsAtOnce)),
        tiling_(choose_dense<A>(x.size[2], x.size[3], 1, w.C + rows_, w.C + 2 * rows_)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)) {}

  int64_t tiles() const { return tiling_.count(); }
  int64_t scratch() const { return (w_.C + rows_) * outer_ + (w_.C + 2 * rows_) * inner_; }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t C = w_.C, I = inner_;
    A *const normed = scratch, *const before = normed + C * outer_, *const grad_y = before + rows_ * outer_,
      *const v = grad_y + C * I, *const grad = v + rows_ * I;
    const Tile tile = tiling_.template tile<A>(unit % tiles());
    const AttentionTile at{tile, outer_, I, dense_pixels<A>(tile), unit / tiles()};
    const P* const in = load_operand<T, P>(w_, x_, at, normed);
    load_tile(grad_y_.as<const T>() + at.sample * grad_y_.stride[0], grad_y_, with_halo<A>(tile, 0), C, I, grad_y);
    add_row_sums(grad_y, C, I, at.pixels, sums + s_.out_bias);
    for (int64_t first = 0; first < C; first += rows_) {
      const int64_t n = smaller(rows_, C - first);
      rows_before<P>(qkv_, w_, at, in, 2 * C + first, n, before);
      rows_behind(w_, at, before, 2 * C + first, n, v);
      add_outer(grad_y, I, C, v, I, n, at.pixels, sums + s_.folded + first, C);
      mix_share(Matrix<A>{folded_t_ + (at.sample * C + first) * C, C}, n, C, grad_y, I, at.pixels, true, grad);
      leave_gradient(w_, at, before, grad, 2 * C + first, n, between_, sums + s_.taps, sums + s_.taps_bias);
    }
  }

 private:
  const Tensor &grad_y_, &x_;
  const Attention<A>& w_;
  const Matrix<P> qkv_;
  const A* const folded_t_;
  const Between<A>& between_;
  const SampleSums s_;
  const int64_t rows_;
  const Tiling tiling_;
  const int64_t outer_, inner_;
};

// The small matrices that the gradients of q and k follow from:
// grad_q_i = sum_j gram_ij k_j + scale_i q_i, grad_k_j = sum_i gram_ij q_i + scale_(d + j) k_j.
template <class A>
struct GramGradients {
  int64_t d;
  Buffer<A> gram, gram_t;  // [B, heads, d, d]
  Buffer<A> scales;        // [B, heads, 2d]
  GramGradients(const Attention<A>& w, int64_t samples)
      : d(w.d), gram(samples * w.C * d), gram_t(samples * w.C * d), scales(samples * 2 * w.C) {}
};

// grad = matrix * other + scale * own, for the d rows of a head.
template <class A>
inline void gradient_of_rows(const A* matrix, const A* scale, int64_t d, const A* other, const A* own, int64_t stride,
                             int64_t pixels, A* grad) {
  mix_share(Matrix<A>{matrix, d}, d, d, other, stride, pixels, true, grad);
  for (int64_t m = 0; m < d; ++m) {
    A* const row = grad + m * stride;
    const A* const from = own + m * stride;
    for (int64_t p = 0; p < pixels; p += kLanes<A>) store(row + p, load(row + p) + load(from + p) * scale[m]);
  }
}

// q and k. Sums: the depthwise convolution's taps [3C, 9] and biases [3C].
template <class T>
class ScoresPass {
 public:
  using A = Acc<T>;
  using P = Operand<T>;

  ScoresPass(const Tensor& x, const Attention<A>& w, const Matrix<P>& qkv, const GramGradients<A>& g,
             const Between<A>& between)
      : x_(x), w_(w), qkv_(qkv), g_(g), between_(between), rows_(w.heads_at_once()),
        tiling_(choose_dense<A>(x.size[2], x.size[3], 1, w.C + 2 * rows_, 3 * rows_)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)) {}

  int64_t units() const { return x_.size[0] * tiling_.count(); }
  int64_t sums() const { return 30 * w_.C; }
  int64_t scratch() const { return (w_.C + 2 * rows_) * outer_ + 3 * rows_ * inner_; }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t C = w_.C, I = inner_;
    A *const normed = scratch, *const before_q = normed + C * outer_, *const before_k = before_q + rows_ * outer_,
      *const q = before_k + rows_ * outer_, *const k = q + rows_ * I, *const grad = k + rows_ * I;
    const Tile tile = tiling_.template tile<A>(unit % tiling_.count());
    const AttentionTile at{tile, outer_, I, dense_pixels<A>(tile), unit / tiling_.count()};
    const P* const in = load_operand<T, P>(w_, x_, at, normed);
    for (int64_t first = 0; first < C; first += rows_) {
      const int64_t n = smaller(rows_, C - first);  // whole heads
      rows_before<P>(qkv_, w_, at, in, first, n, before_q);
      rows_before<P>(qkv_, w_, at, in, C + first, n, before_k);
      rows_behind(w_, at, before_q, first, n, q);
      rows_behind(w_, at, before_k, C + first, n, k);
      gradient(at, g_.gram.get(), 0, first, n, k, q, grad);
      leave_gradient(w_, at, before_q, grad, first, n, between_, sums, sums + 27 * C);
      gradient(at, g_.gram_t.get(), g_.d, first, n, q, k, grad);
      leave_gradient(w_, at, before_k, grad, C + first, n, between_, sums, sums + 27 * C);
    }
  }

 private:
  // The gradient of rows [first, first + n) of q or k, whose heads' matrices and scales are given, from the other's rows.
  void gradient(const AttentionTile& at, const A* matrices, int64_t scales, int64_t first, int64_t n, const A* other,
                const A* own, A* grad) const {
    const int64_t d = w_.d, I = at.inner;
    for (int64_t row = 0; row < n; row += d) {
      const int64_t head = at.sample * w_.heads + (first + row) / d;
      gradient_of_rows(matrices + head * d * d, g_.scales.get() + head * 2 * d + scales, d, other + row * I, own + row * I,
                       I, at.pixels, grad + row * I);
    }
  }

  const Tensor& x_;
  const Attention<A>& w_;
  const Matrix<P> qkv_;
  const GramGradients<A>& g_;
  const Between<A>& between_;
  const int64_t rows_;
  const Tiling tiling_;
  const int64_t outer_, inner_;
};

// From the gradients of q, k and v to that of x. Sums: the norm's weight and bias [C each]; of the gradient of qkv's result
// with the standardised x, from which those of qkv follow, [3C, C]; and by itself [3C].
template <class T>
class InputsPass {
 public:
  using A = Acc<T>;

  InputsPass(const Tensor& grad_y, const Tensor& x, const Attention<A>& w, const A* qkv_t, const Between<A>& between,
             const Tensor& grad_x)
      : grad_y_(grad_y), x_(x), w_(w), qkv_t_(qkv_t), between_(between), grad_x_(grad_x),
        rows_(smaller(3 * w.C, kRowsAtOnce)), turned_(27 * w.C),
        tiling_(choose_dense<A>(x.size[2], x.size[3], 1, rows_, 4 * w.C + rows_)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)) {
    for (int64_t j = 0; j < 3 * w.C; ++j) {
      for (int64_t i = 0; i < 9; ++i) turned_[j * 9 + i] = w.taps[j * 9 + 8 - i];
    }
  }

  int64_t units() const { return x_.size[0] * tiling_.count(); }
  int64_t qkv_sums() const { return 2 * w_.C; }
  int64_t bias_sums() const { return qkv_sums() + 3 * w_.C * w_.C; }
  int64_t sums() const { return bias_sums() + 3 * w_.C; }
  int64_t scratch() const { return rows_ * outer_ + (3 * w_.C + rows_ + 1) * inner_ + OuterOperand<A>::size(w_.C, inner_); }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t C = w_.C, O = outer_, I = inner_, sample = unit / tiling_.count();
    A *const wide = scratch, *const standard = wide + rows_ * O, *const grad_normed = standard + C * I,
      *const out = grad_normed + C * I, *const grad = out + C * I, *const rstd = grad + rows_ * I;
    const OuterOperand<A> in{rstd + I, C, I};
    const Tile tile = tiling_.template tile<A>(unit % tiling_.count()), dense = with_halo<A>(tile, 0);
    const int64_t pixels = dense_pixels<A>(tile), valid = tile.rows * tile.columns;
    load_tile(x_.as<const T>() + sample * x_.stride[0], x_, dense, C, I, standard);
    const NormTile<A> norm{C, I, pixels, valid, w_.norm_weight, w_.eps, w_.kind};
    norm.standardise(standard, rstd);
    in.put(standard, I, 0, pixels);
    for (int64_t first = 0; first < 3 * C; first += rows_) {
      const int64_t n = smaller(rows_, 3 * C - first);
      load_tile(static_cast<const A*>(between_.at(sample, first)), between_.planes, tile, n, O, wide);
      for (int64_t j = 0; j < n; ++j) {
        depthwise<3>(wide + j * O, tile.stride, turned_.get() + (first + j) * 9, grad + j * I, tile.rows, tile.columns);
      }
      clear_tails(grad, n, I, valid);
      add_outer(grad, I, n, in, pixels, sums + qkv_sums() + first * C, C);
      add_row_sums(grad, n, I, pixels, sums + bias_sums() + first);
      mix_share(Matrix<A>{qkv_t_ + first, 3 * C}, C, n, grad, I, pixels, first == 0, grad_normed);
    }
    norm.add_sums(standard, grad_normed, sums);
    load_tile(grad_y_.as<const T>() + sample * grad_y_.stride[0], grad_y_, dense, C, I, out);
    norm.add_input_gradient(standard, rstd, grad_normed, out);
    store_dense(out, I, dense, C, grad_x_.as<T>() + sample * C * between_.plane);
  }

 private:
  const Tensor &grad_y_, &x_;
  const Attention<A>& w_;
  const A* const qkv_t_;
  const Between<A>& between_;
  const Tensor& grad_x_;
  const int64_t rows_;
  const Buffer<A> turned_;
  const Tiling tiling_;
  const int64_t outer_, inner_;
};

}  // namespace mirage::cpu::MIRAGE_ISA::channel_attention_parts
