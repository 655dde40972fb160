// feed_forward_stage backward in one pass over tiles. The normalised input with a halo of two pixels gives the hidden
// channels, a group of pairs at a time, whose gradients reach back one pixel twice: through the depthwise convolution
// of forward and through its transpose.
#include "common/cpu/dtypes.h"
#include "common/cpu/gemm.h"
#include "common/cpu/gradients.h"
#include "common/cpu/inner_tile.h"
#include "common/cpu/layer_norm_tile.h"
#include "common/cpu/vec_math.h"
#include "kernels.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

constexpr int64_t kPairs = 24;  // hidden channel pairs at a time

// Offsets of each weight's gradient in the sums of a chunk.
struct Sums {
  int64_t norm, project_in, dwconv, project_out, project_in_bias, dwconv_bias, project_out_bias, count;
  Sums(int64_t C, int64_t M)
      : norm(0), project_in(2 * C), dwconv(project_in + 2 * M * C), project_out(dwconv + 2 * M * 9),
        project_in_bias(project_out + C * M), dwconv_bias(project_in_bias + 2 * M),
        project_out_bias(dwconv_bias + 2 * M), count(project_out_bias + C) {}
};

// sums[c] += the sum of each channel over `rows` lines of `columns` pixels, `stride` apart.
template <class A>
void add_channel_sums(const A* lines, int64_t channels, int64_t capacity, int64_t rows, int64_t columns, int64_t stride,
                      A* sums) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < channels; ++c) {
    Vec<A> total = {};
    for (int64_t r = 0; r < rows; ++r) {
      const A* const line = lines + c * capacity + r * stride;
      int64_t p = 0;
      for (; p + L <= columns; p += L) total += load(line + p);
      if (p < columns) total += load_n(line + p, int(columns - p));
    }
    sums[c] += sum<A>(total);
  }
}

template <class T>
class BackwardPass {
 public:
  using A = Acc<T>;

  BackwardPass(const Tensor& grad_y, const Tensor& x, const FeedForwardWeights& w, const FeedForwardOptions& options,
               const Tensor* hidden, const Tensor& grad_x)
      : grad_y_(grad_y), x_(x), hidden_(hidden), grad_x_(grad_x), w_(w), C_(x.size[1]), M_(w.project_out.size[1]),
        group_(smaller(kPairs, M_)), norm_weight_(w.norm_weight), norm_bias_(w.norm_bias, C_), eps_(A(options.eps)),
        norm_(options.norm), activation_(options.activation), project_in_(w.project_in), dwconv_(w.dwconv),
        project_in_bias_(w.project_in_bias, 2 * M_), dwconv_bias_(w.dwconv_bias, 2 * M_),
        project_in_t_(project_in_, 2 * M_, C_), project_out_t_(InAccumulator<A>(w.project_out), C_, M_),
        turned_(2 * M_ * 9), sums_(C_, M_),
        tiling_(choose_dense<A>(x.size[2], x.size[3], 2, 2 * C_ + 7 * group_, 3 * C_ + 3 * group_)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)) {
    for (int64_t j = 0; j < 2 * M_; ++j) {
      for (int64_t i = 0; i < 9; ++i) turned_[j * 9 + i] = dwconv_[j * 9 + 8 - i];
    }
  }

  const Sums& sums() const { return sums_; }
  int64_t units() const { return x_.size[0] * tiling_.count(); }
  int64_t scratch() const { return (2 * C_ + 7 * group_) * outer_ + (3 * C_ + 3 * group_ + 1) * inner_; }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t sample = unit / tiling_.count(), I = inner_, O = outer_;
    Work k;
    k.sample = sample;
    k.tile = tiling_.template tile<A>(unit % tiling_.count());
    k.by_one = with_halo<A>(k.tile, 1);
    k.pixels = dense_pixels<A>(k.tile);
    k.normed = scratch;
    k.grad_y = k.normed + C_ * O;
    k.act = k.grad_y + C_ * O;
    k.slope = k.act + 2 * group_ * O;
    k.gated = k.slope + 2 * group_ * O;
    k.grad_gated = k.gated + group_ * O;
    k.in = k.grad_gated + 2 * group_ * O;
    k.grad_out = k.in + C_ * I;
    k.grad_in = k.grad_out + C_ * I;
    k.grad_hidden = k.grad_in + C_ * I;
    k.gated_inner = k.grad_hidden + 2 * group_ * I;
    k.rstd = k.gated_inner + group_ * I;

    const T *px = x_.as<const T>() + sample * x_.stride[0], *pg = grad_y_.as<const T>() + sample * grad_y_.stride[0];
    load_tile(px, x_, k.tile, C_, O, k.normed);
    normalise_tile(k.normed, C_, O, k.tile, norm_weight_.get(), norm_bias_.get(), eps_, norm_);
    copy_dense(k.normed, O, k.tile, C_, k.in, I);
    load_tile(pg, grad_y_, k.by_one, C_, O, k.grad_y);
    copy_dense(k.grad_y, O, k.by_one, C_, k.grad_out, I);
    if (exists(w_.project_out_bias)) {
      add_channel_sums(k.grad_out, C_, I, 1, k.tile.rows * k.tile.columns, 0, sums + sums_.project_out_bias);
    }
    for (int64_t first = 0; first < M_; first += group_) group(k, first, smaller(group_, M_ - first), sums);

    // grad_in is complete: back through the norm, and the residual's share.
    const Tile dense = with_halo<A>(k.tile, 0);
    A *const standard = k.normed, *const out = k.grad_out;
    load_tile(px, x_, dense, C_, I, standard);
    const NormTile<A> norm{C_, I, k.pixels, dense.rows * dense.columns, norm_weight_, eps_, norm_};
    norm.standardise(standard, k.rstd);
    norm.add_sums(standard, k.grad_in, sums + sums_.norm);
    norm.add_input_gradient(standard, k.rstd, k.grad_in, out);
    store_dense(out, I, dense, C_, grad_x_.as<T>() + sample * C_ * dense.height * dense.width);
  }

 private:
  // Buffers of a tile: [channels, outer] with a halo of two or one, [channels, inner] without.
  struct Work {
    Tile tile, by_one;
    int64_t sample, pixels;
    A *normed, *grad_y, *act, *slope, *gated, *grad_gated;                   // outer
    A *in, *grad_out, *grad_in, *grad_hidden, *gated_inner, *rstd;  // inner
  };

  // Runs backward for n pairs of hidden channels from `first` on.
  void group(const Work& k, int64_t first, int64_t n, A* sums) const {
    const int64_t O = outer_, I = inner_, one = k.by_one.stride, two = k.tile.stride;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * M_, at = half * n;
      activate(k, row, n, k.act + at * O, k.slope + at * O);
      for (int64_t j = 0; j < n; ++j) {
        depthwise<3>(k.act + (at + j) * O, two, dwconv_ + (row + j) * 9, k.grad_gated + (at + j) * O, k.tile.rows + 2,
                     k.tile.columns + 2);
      }
    }
    const Span span = inside_plane<A>(k.by_one, 1);
    clear_around(span, k.by_one.outer_pixels, 2 * n, O, k.grad_gated);
    const A *const bias1 = dwconv_bias_ + first, *const bias2 = bias1 + M_;
    A *const d1 = k.grad_gated + span.begin, *const d2 = d1 + n * O, *const inside = k.gated + span.begin;
    mix(project_out_t_.get() + first * C_, C_, n, C_, k.grad_y + span.begin, O, span.end - span.begin,
        by_row([&](int64_t m, int64_t p, auto& v) {
          constexpr int N = sizeof(v) / sizeof(v[0]), L = kLanes<A>;
          A *const at1 = d1 + m * O + p, *const at2 = d2 + m * O + p, *const gated = inside + m * O + p;
          Vec<A> value[N], slope[N];
          for (int i = 0; i < N; ++i) value[i] = load(at1 + i * L) + bias1[m];
          vgelu_with_grad_each(value, slope);
          for (int i = 0; i < N; ++i) {
            const Vec<A> other = load(at2 + i * L) + bias2[m];
            store(gated + i * L, value[i] * other);
            store(at1 + i * L, v[i] * other * slope[i]);
            store(at2 + i * L, v[i] * value[i]);
          }
        }));
    copy_dense(k.gated, O, k.by_one, n, k.gated_inner, I);
    add_outer(k.grad_out, I, C_, k.gated_inner, I, n, k.pixels, sums + sums_.project_out + first, M_);
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * M_, at = half * n;
      if (exists(w_.dwconv_bias)) {
        add_channel_sums(k.grad_gated + at * O + one + 1, n, O, k.tile.rows, k.tile.columns, one,
                         sums + sums_.dwconv_bias + row);
      }
      for (int64_t j = 0; j < n; ++j) {
        const A* grad = k.grad_gated + (at + j) * O;
        correlate<3>(k.act + (at + j) * O + two + 1, two, grad + one + 1, one, k.tile.rows, k.tile.columns,
                     outside(k.tile, 1), sums + sums_.dwconv + (row + j) * 9);
        depthwise<3>(grad, one, turned_.get() + (row + j) * 9, k.grad_hidden + (at + j) * I, k.tile.rows,
                     k.tile.columns);
      }
    }
    clear_tails(k.grad_hidden, 2 * n, I, k.tile.rows * k.tile.columns);
    if (activation_ == Activation::gelu) {
      A* const slope = k.act;  // no longer needed
      copy_dense(k.slope, O, k.tile, 2 * n, slope, I);
      for (int64_t j = 0; j < 2 * n; ++j) {
        A* const row = k.grad_hidden + j * I;
        for (int64_t p = 0; p < k.pixels; p += kLanes<A>) store(row + p, load(row + p) * load(slope + j * I + p));
      }
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * M_;
      const A* grad = k.grad_hidden + half * n * I;
      if (exists(w_.project_in_bias)) {
        add_channel_sums(grad, n, I, 1, k.tile.rows * k.tile.columns, 0, sums + sums_.project_in_bias + row);
      }
      add_outer(grad, I, n, k.in, I, C_, k.pixels, sums + sums_.project_in + row * C_, C_);
      mix_share(project_in_t_.from(row), C_, n, grad, I, k.pixels, first + half == 0, k.grad_in);
    }
  }

  // Computes the activation and its derivative (of GELU) for n hidden channels, with the halo of two, from the input or
  // from what forward kept.
  void activate(const Work& k, int64_t row, int64_t n, A* act, A* slope) const {
    const Span span = inside_plane<A>(k.tile, k.tile.halo);
    clear_around(span, k.tile.outer_pixels, n, outer_, act);
    act += span.begin;
    slope += span.begin;
    const bool has_bias = exists(w_.project_in_bias);
    const auto finish = [&](int64_t m, int64_t p, auto& v) {
      if (activation_ == Activation::none) return store_each(act + m * outer_ + p, v);
      constexpr int N = sizeof(v) / sizeof(v[0]);
      Vec<A> derivative[N];
      vgelu_with_grad_each(v, derivative);
      store_each(act + m * outer_ + p, v);
      store_each(slope + m * outer_ + p, derivative);
    };
    if (!hidden_) {
      mix(project_in_ + row * C_, C_, n, C_, k.normed + span.begin, outer_, span.end - span.begin,
          by_row([&](int64_t m, int64_t p, auto& v) {
            if (has_bias) {
              for (auto& each : v) each += project_in_bias_[row + m];
            }
            finish(m, p, v);
          }));
      if (has_bias) clear_outside(act - span.begin, n, outer_, k.tile);
      return;
    }
    const T* planes = hidden_->as<const T>() + k.sample * hidden_->stride[0] + row * hidden_->stride[1];
    load_tile(planes, *hidden_, k.tile, n, outer_, act - span.begin);
    if (activation_ == Activation::none) return;
    constexpr int N = kMixVectors, L = kLanes<A>;
    for (int64_t m = 0; m < n; ++m) {
      const A* const from = act + m * outer_;
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

  const Tensor &grad_y_, &x_;
  const Tensor* hidden_;
  const Tensor& grad_x_;
  const FeedForwardWeights& w_;
  int64_t C_, M_, group_;
  InAccumulator<A> norm_weight_;
  VectorOrZeros<A> norm_bias_;
  A eps_;
  NormKind norm_;
  Activation activation_;
  InAccumulator<A> project_in_, dwconv_;
  VectorOrZeros<A> project_in_bias_, dwconv_bias_;
  Transposed<A> project_in_t_, project_out_t_;
  Buffer<A> turned_;
  Sums sums_;
  Tiling tiling_;
  int64_t outer_, inner_;
};

template <class A>
void put(const double* sums, const Tensor& out) {
  if (!exists(out)) return;
  A* const to = out.as<A>();
  for (int64_t i = 0, n = out.numel(); i < n; ++i) to[i] = A(sums[i]);
}

}  // namespace

void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const FeedForwardWeights& weights,
                                 const FeedForwardOptions& options, const Tensor* hidden, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, {
    using A = Acc<T>;
    const BackwardPass<T> pass(grad_y, x, weights, options, hidden, grad_x);
    const Sums& s = pass.sums();
    Buffer<double> total(s.count);
    for (int64_t i = 0; i < s.count; ++i) total[i] = 0;
    sum_over_units<A>(pass.units(), s.count, pass.scratch(), total.get(), pass);
    put<A>(total.get() + s.norm, gradients.norm_weight);
    put<A>(total.get() + s.norm + x.size[1], gradients.norm_bias);
    put<A>(total.get() + s.project_in, gradients.project_in);
    put<A>(total.get() + s.dwconv, gradients.dwconv);
    put<A>(total.get() + s.project_out, gradients.project_out);
    put<A>(total.get() + s.project_in_bias, gradients.project_in_bias);
    put<A>(total.get() + s.dwconv_bias, gradients.dwconv_bias);
    put<A>(total.get() + s.project_out_bias, gradients.project_out_bias);
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
