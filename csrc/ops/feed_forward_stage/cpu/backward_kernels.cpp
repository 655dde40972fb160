// feed_forward_stage backward in one pass over tiles. The normalised input with a halo of two pixels gives the hidden
// channels, a group of pairs at a time, whose gradients reach back one pixel twice: through the depthwise convolution
// of forward and through its transpose. With `excite` a pass before it reduces each sample's share of project_out's
// gradient, from which that of the means follows: the same number for all pixels of a gated channel.
#include "common/cpu/by_sample.h"
#include "excitation.h"
#include "hidden_rows.h"
#include "kernels.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

using namespace feed_forward_parts;

constexpr int64_t kChunks = 16;  // of all tiles, with sums of their own

// Offsets of each weight's gradient in the sums of a chunk.
struct Sums {
  int64_t norm, project_in, dwconv, project_out, project_in_bias, dwconv_bias, project_out_bias, count;
  Sums(int64_t C, int64_t M)
      : norm(0), project_in(2 * C), dwconv(project_in + 2 * M * C), project_out(dwconv + 2 * M * 9),
        project_in_bias(project_out + C * M), dwconv_bias(project_in_bias + 2 * M),
        project_out_bias(dwconv_bias + 2 * M), count(project_out_bias + C) {}
};

// What backward multiplies grad_y by to have the gradient of the gated channels: project_out transposed, with `excite` scaled
// for each sample, and what the means add to each channel, [samples, M], or null.
template <class A>
struct BackThrough {
  const A* matrix;
  int64_t sample_stride;
  const A* added;
};

// Sums of each sample with `excite`: of the gated channels [M], and of their products with grad_y [M, C].
template <class T>
class GatedSums {
 public:
  using A = Acc<T>;

  GatedSums(const Tensor& grad_y, const HiddenRows<T>& w)
      : grad_y_(grad_y), w_(w),
        tiling_(choose_dense<A>(w.x.size[2], w.x.size[3], w.convolves, w.C + 4 * w.group, 2 * w.C + 2 * w.group)),
        outer_(tiling_.template outer_capacity<A>()), inner_(w.convolves ? dense_capacity<A>(tiling_) : outer_) {}

  int64_t tiles() const { return tiling_.count(); }
  int64_t sums() const { return (w_.C + 1) * w_.M; }
  int64_t scratch() const {
    return (w_.C + 4 * w_.group) * outer_ + (w_.C + 2 * w_.group) * inner_ + OuterOperand<A>::size(w_.C, inner_);
  }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t C = w_.C, M = w_.M, O = outer_, I = inner_, sample = unit / tiles();
    A *const normed = scratch, *const act = normed + C * O, *const slope = act + 2 * w_.group * O,
      *const grad_y = slope + 2 * w_.group * O, *const dense = grad_y + C * I;
    const OuterOperand<A> grad{dense + 2 * w_.group * I, C, I};
    const Tile tile = tiling_.template tile<A>(unit % tiles());
    const int64_t pixels = dense_pixels<A>(tile);
    w_.normalised(tile, sample, O, normed);
    load_tile(grad_y_.as<const T>() + sample * grad_y_.stride[0], grad_y_, with_halo<A>(tile, 0), C, I, grad_y);
    grad.put(grad_y, I, 0, pixels);
    for (int64_t first = 0; first < M; first += w_.group) {
      const int64_t n = smaller(w_.group, M - first);
      A* const d = w_.convolves ? dense : act;
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first + half * M, at = half * n;
        w_.activate(tile, sample, normed, O, row, n, act + at * O, slope + at * O);
        if (!w_.convolves) continue;
        depthwise_rows_of(act + at * O, n, tile, O, w_.dwconv.from(row * 9), w_.dwconv_bias + row, I, d + at * I);
      }
      A* const gated = d;
      for (int64_t j = 0; j < n; ++j) {
        A *const d1 = d + j * I, *const d2 = d1 + n * I;
        for (int64_t p = 0; p < pixels; p += kLanes<A>) {
          Vec<A> value[1] = {load(d1 + p)}, unused[1];
          w_.gate_with_slope(value, unused);
          store(gated + j * I + p, value[0] * load(d2 + p));
        }
      }
      clear_tails(gated, n, I, tile.rows * tile.columns);
      add_row_sums(gated, n, I, pixels, sums + first);
      add_outer(gated, I, n, grad, pixels, sums + M + first * C, C);
    }
  }

 private:
  const Tensor& grad_y_;
  const HiddenRows<T>& w_;
  const Tiling tiling_;
  const int64_t outer_, inner_;
};

template <class T>
class BackwardPass {
 public:
  using A = Acc<T>;

  BackwardPass(const Tensor& grad_y, const HiddenRows<T>& hidden, const FeedForwardWeights& w,
               const BackThrough<A>& through, const Tensor& grad_x)
      : grad_y_(grad_y), x_(hidden.x), grad_x_(grad_x), w_(w), hidden_(hidden), through_(through), C_(hidden.C),
        M_(hidden.M), group_(hidden.group),
        project_in_t_(hidden.project_in, 2 * M_, C_, [&](int64_t row) { return place(row); }),
        turned_(hidden.convolves ? 2 * M_ * 9 : 0), sums_(C_, M_), tiling_(tiling_of(hidden)),
        outer_(tiling_.template outer_capacity<A>()), inner_(hidden.convolves ? dense_capacity<A>(tiling_) : outer_) {
    for (int64_t j = 0; hidden.convolves && j < 2 * M_; ++j) {
      for (int64_t i = 0; i < 9; ++i) turned_[j * 9 + i] = hidden.dwconv.from(j * 9)[8 - i];
    }
  }

  const Sums& sums() const { return sums_; }
  int64_t units() const { return x_.size[0] * tiling_.count(); }
  int64_t scratch() const {
    const int64_t panels = 2 * OuterOperand<A>::size(C_, inner_);
    return panels + (hidden_.convolves ? (2 * C_ + 7 * group_) * outer_ + (C_ + 3 * group_ + 1) * inner_
                                       : (3 * C_ + 5 * group_ + 1) * outer_);
  }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t sample = unit / tiling_.count(), I = inner_, O = outer_;
    const bool convolves = hidden_.convolves;
    Work k;
    k.sample = sample;
    k.tile = tiling_.template tile<A>(unit % tiling_.count());
    k.by_one = with_halo<A>(k.tile, convolves);
    k.pixels = dense_pixels<A>(k.tile);
    // Without a convolution tiles have no halo: what is dense is what has it, and gradients take the place of values.
    k.normed = scratch;
    k.grad_y = k.normed + C_ * O;
    k.act = k.grad_y + C_ * O;
    k.slope = k.act + 2 * group_ * O;
    k.gated = k.slope + 2 * group_ * O;
    k.grad_gated = convolves ? k.gated + group_ * O : k.act;
    k.grad_in = convolves ? k.grad_gated + 2 * group_ * O : k.gated + group_ * O;
    k.grad_hidden = convolves ? k.grad_in + C_ * I : k.act;
    k.gated_inner = convolves ? k.grad_hidden + 2 * group_ * I : k.gated;
    k.rstd = convolves ? k.gated_inner + group_ * I : k.grad_in + C_ * I;
    k.in = {k.rstd + I, C_, I};
    k.grad_out = {k.in.data + OuterOperand<A>::size(C_, I), C_, I};

    const T *px = x_.as<const T>() + sample * x_.stride[0], *pg = grad_y_.as<const T>() + sample * grad_y_.stride[0];
    hidden_.normalised(k.tile, sample, O, k.normed);
    load_tile(pg, grad_y_, k.by_one, C_, O, k.grad_y);
    put_dense(k.normed, O, k.tile, k.in);
    put_dense(k.grad_y, O, k.by_one, k.grad_out);
    if (exists(w_.project_out_bias)) {
      add_line_sums(k.grad_y + k.by_one.halo * (k.by_one.stride + 1), C_, O, k.tile.rows, k.tile.columns, k.by_one.stride,
                    sums + sums_.project_out_bias);
    }
    for (int64_t first = 0; first < M_; first += group_) group(k, first, smaller(group_, M_ - first), sums);

    // grad_in is complete: back through the norm, and the residual's share.
    const Tile dense = with_halo<A>(k.tile, 0);
    A *const standard = k.normed, *const out = k.grad_out.data;
    load_tile(px, x_, dense, C_, I, standard);
    copy_dense(k.grad_y, O, k.by_one, C_, out, I);
    const NormTile<A> norm{C_, I, k.pixels, dense.rows * dense.columns, hidden_.norm_weight, hidden_.eps, hidden_.norm};
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
    A *normed, *grad_y, *act, *slope, *gated, *grad_gated;  // outer
    A *grad_in, *grad_hidden, *gated_inner, *rstd;          // inner
    OuterOperand<A> in, grad_out;                           // normed and grad_y without the halo
  };

  static Tiling tiling_of(const HiddenRows<T>& w) {
    const int64_t height = w.x.size[2], width = w.x.size[3];
    if (!w.convolves) return choose_pointwise<A>(height, width, 5 * w.C + 5 * w.group, 1024);
    return choose_dense<A>(height, width, 2, 2 * w.C + 7 * w.group, 3 * w.C + 3 * w.group);
  }

  // Where a row of project_in is among the columns of its transpose: the two of a group's pairs side by side, as group() has
  // their gradients.
  int64_t place(int64_t row) const {
    const int64_t half = row / M_, first = row % M_ / group_ * group_;
    return row % M_ + first + half * smaller(group_, M_ - first);
  }

  // Runs backward for n pairs of hidden channels from `first` on.
  void group(const Work& k, int64_t first, int64_t n, A* sums) const {
    const int64_t O = outer_, I = inner_, two = k.tile.stride;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * M_, at = half * n;
      hidden_.activate(k.tile, k.sample, k.normed, O, row, n, k.act + at * O, k.slope + at * O);
      for (int64_t j = 0; hidden_.convolves && j < n; ++j) {
        depthwise<3>(k.act + (at + j) * O, two, hidden_.dwconv.from((row + j) * 9), k.grad_gated + (at + j) * O,
                     k.tile.rows + 2, k.tile.columns + 2);
      }
    }
    gate(k, first, n);
    if (!exists(w_.excite)) {
      if (hidden_.convolves) copy_dense(k.gated, O, k.by_one, n, k.gated_inner, I);
      add_outer(k.gated_inner, I, n, k.grad_out, k.pixels, sums + sums_.project_out + first * C_, C_);
    }
    if (hidden_.convolves) deconvolve(k, first, n, sums);
    if (hidden_.activation == Activation::gelu) {
      const A* slope = k.slope;
      if (hidden_.convolves) {
        copy_dense(slope, O, k.tile, 2 * n, k.act, I);  // the values there are no longer needed
        slope = k.act;
      }
      for (int64_t j = 0; j < 2 * n; ++j) {
        A* const row = k.grad_hidden + j * I;
        for (int64_t p = 0; p < k.pixels; p += kLanes<A>) store(row + p, load(row + p) * load(slope + j * I + p));
      }
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * M_;
      const A* grad = k.grad_hidden + half * n * I;
      if (hidden_.has_input_bias) {
        add_line_sums(grad, n, I, 1, k.tile.rows * k.tile.columns, 0, sums + sums_.project_in_bias + row);
      }
      add_outer(grad, I, n, k.in, k.pixels, sums + sums_.project_in + row * C_, C_);
    }
    mix_share(project_in_t_.from(2 * first), C_, 2 * n, k.grad_hidden, I, k.pixels, first == 0, k.grad_in);
  }

  // From grad_y to the gradients of d1 and d2, where these were; and their gated product.
  void gate(const Work& k, int64_t first, int64_t n) const {
    const int64_t O = outer_;
    const Span span = inside_plane<A>(k.by_one, k.by_one.halo);
    clear_around(span, k.by_one.outer_pixels, 2 * n, O, k.grad_gated);
    const A *const bias1 = hidden_.dwconv_bias + first, *const bias2 = bias1 + M_;
    const A *const matrix = through_.matrix + k.sample * through_.sample_stride + first * C_,
            *const added = through_.added ? through_.added + k.sample * M_ + first : nullptr;
    A *const d1 = k.grad_gated + span.begin, *const d2 = d1 + n * O, *const inside = k.gated + span.begin;
    mix(matrix, C_, n, C_, k.grad_y + span.begin, O, span.end - span.begin,
        by_row([&](int64_t m, int64_t p, auto& v) {
          constexpr int N = sizeof(v) / sizeof(v[0]), L = kLanes<A>;
          A *const at1 = d1 + m * O + p, *const at2 = d2 + m * O + p, *const gated = inside + m * O + p;
          Vec<A> value[N], slope[N];
          for (int i = 0; i < N; ++i) value[i] = load(at1 + i * L) + bias1[m];
          hidden_.gate_with_slope(value, slope);
          for (int i = 0; i < N; ++i) {
            const Vec<A> other = load(at2 + i * L) + bias2[m], grad = added ? v[i] + added[m] : v[i];
            store(gated + i * L, value[i] * other);
            store(at1 + i * L, grad * other * slope[i]);
            store(at2 + i * L, grad * value[i]);
          }
        }));
    if (added) clear_outside(k.grad_gated, 2 * n, O, k.by_one);
  }

  // From the gradients of d1 and d2 to those of what was convolved, and of the convolution's weights.
  void deconvolve(const Work& k, int64_t first, int64_t n, A* sums) const {
    const int64_t O = outer_, I = inner_, one = k.by_one.stride, two = k.tile.stride;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * M_, at = half * n;
      if (exists(w_.dwconv_bias)) {
        add_line_sums(k.grad_gated + at * O + one + 1, n, O, k.tile.rows, k.tile.columns, one,
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
  }

  const Tensor &grad_y_, &x_, &grad_x_;
  const FeedForwardWeights& w_;
  const HiddenRows<T>& hidden_;
  const BackThrough<A> through_;
  const int64_t C_, M_, group_;
  const Transposed<A> project_in_t_;
  const Buffer<A> turned_;
  const Sums sums_;
  const Tiling tiling_;
  const int64_t outer_, inner_;
};

// With `excite`: the sums of each sample, the gradients that follow from them, and what the main pass multiplies by.
template <class T>
class ThroughMeans {
 public:
  using A = Acc<T>;

  // project_out_t: [M, C].
  ThroughMeans(const Tensor& grad_y, const HiddenRows<T>& hidden, const FeedForwardWeights& w, const A* project_out_t,
               const FeedForwardGradients& out)
      : samples_(hidden.x.size[0]), C_(hidden.C), M_(hidden.M), matrix_(samples_ * M_ * C_), added_(samples_ * M_) {
    const GatedSums<T> pass(grad_y, hidden);
    const int64_t count = pass.sums(), plane = hidden.x.size[2] * hidden.x.size[3];
    Buffer<double> sums(samples_ * count), of_scales(samples_ * M_);
    sum_by_sample<A>(samples_, pass.tiles(), kChunks, count, pass.scratch(), sums.get(), pass);
    Buffer<A> means(samples_ * M_), scales(samples_ * M_);
    const Excitation<A> excitation(w);
    excitation.means(samples_, sums.get(), count, plane, means.get());
    excitation.scales(samples_, means.get(), scales.get());
    parallel_units<A>(samples_ * M_, 0, [&](int64_t unit, A*) {
      const A* const from = project_out_t + unit % M_ * C_;
      const double* const products = sums.get() + unit / M_ * count + M_ + unit % M_ * C_;
      double of_scale = 0;
      for (int64_t c = 0; c < C_; ++c) {
        matrix_[unit * C_ + c] = from[c] * scales[unit];
        of_scale += double(from[c]) * products[c];
      }
      of_scales[unit] = of_scale;
    });
    excitation.means_gradient(samples_, of_scales.get(), plane, added_.get());
    put_excite(means.get(), of_scales.get(), out);
    parallel_units<A>(C_, 0, [&](int64_t c, A*) {
      for (int64_t j = 0; j < M_; ++j) {
        double total = 0;
        for (int64_t b = 0; b < samples_; ++b) {
          total += sums[b * count + M_ + j * C_ + c] * double(scales[b * M_ + j]);
        }
        out.project_out.as<A>()[c * M_ + j] = A(total);
      }
    });
  }

  BackThrough<A> get() const { return {matrix_.get(), M_ * C_, added_.get()}; }

 private:
  void put_excite(const A* means, const double* of_scales, const FeedForwardGradients& out) const {
    parallel_units<A>(M_, 0, [&](int64_t j, A*) {
      for (int64_t i = 0; i < M_; ++i) {
        double total = 0;
        for (int64_t b = 0; b < samples_; ++b) total += of_scales[b * M_ + j] * double(means[b * M_ + i]);
        out.excite.as<A>()[j * M_ + i] = A(total);
      }
      if (!exists(out.excite_bias)) return;
      double total = 0;
      for (int64_t b = 0; b < samples_; ++b) total += of_scales[b * M_ + j];
      out.excite_bias.as<A>()[j] = A(total);
    });
  }

  const int64_t samples_, C_, M_;
  const Buffer<A> matrix_, added_;
};

template <class T>
void run(const Tensor& grad_y, const HiddenRows<T>& hidden, const FeedForwardWeights& w, const BackThrough<Acc<T>>& through,
         const Tensor& grad_x, const FeedForwardGradients& out) {
  using A = Acc<T>;
  const BackwardPass<T> pass(grad_y, hidden, w, through, grad_x);
  const Sums& s = pass.sums();
  Buffer<double> total(s.count);
  clear_sums(total.get(), s.count);
  sum_over_units<A>(pass.units(), s.count, pass.scratch(), total.get(), pass);
  put_sums<A>(total.get() + s.norm, out.norm_weight);
  put_sums<A>(total.get() + s.norm + hidden.C, out.norm_bias);
  put_sums<A>(total.get() + s.project_in, out.project_in);
  put_sums<A>(total.get() + s.dwconv, out.dwconv);
  if (!exists(w.excite)) put_transposed_sums<A>(total.get() + s.project_out, out.project_out);
  put_sums<A>(total.get() + s.project_in_bias, out.project_in_bias);
  put_sums<A>(total.get() + s.dwconv_bias, out.dwconv_bias);
  put_sums<A>(total.get() + s.project_out_bias, out.project_out_bias);
}

}  // namespace

void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const FeedForwardWeights& weights,
                                 const FeedForwardOptions& options, const Tensor* hidden, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, {
    using A = Acc<T>;
    const HiddenRows<T> rows(x, weights, options, hidden);
    const Transposed<A> project_out_t(InAccumulator<A>(weights.project_out), rows.C, rows.M);
    if (exists(weights.excite)) {
      const ThroughMeans<T> means(grad_y, rows, weights, project_out_t.get(), gradients);
      run<T>(grad_y, rows, weights, means.get(), grad_x, gradients);
    } else {
      run<T>(grad_y, rows, weights, {project_out_t.get(), 0, nullptr}, grad_x, gradients);
    }
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
