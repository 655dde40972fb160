// mixer_stage backward: three passes over tiles. The first goes from grad_y to the dynamic convolution's output and v,
// the second to the normalised x, the third through LayerNorm (BatchNorm's gradient needs the sums of the second).
#include "backward_branches.h"
#include "backward_inputs.h"
#include "common/cpu/dtypes.h"
#include "common/cpu/layer_norm_tile.h"
#include "kernels.h"
#include "ops/channel_attention/cpu_softmax.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

// The kernel generator, sample by sample: from the gradient of the kernels to those of its weights and of the mean of
// the detail rows, which every pixel shares.
template <class A>
void generator_backward(const Mixer<A>& w, const Folded<A>& f, const A* branch_mean, const double* grad_kernels,
                        int64_t batch, double pixels, A* detail, A* grad_in, A* grad_out) {
  const int64_t c = w.c, first = 2 * w.h - c, taps = kTaps * c;
  Buffer<double> mean(batch * c), hidden(batch * c), slope(batch * c), grad_hidden(batch * c);
  parallel_units<A>(batch, 1, [&](int64_t b, A*) {
    double *m = mean.get() + b * c, *g = grad_hidden.get() + b * c;
    for (int64_t j = 0; j < c; ++j) {
      m[j] = f.bias[first + j];
      for (int64_t k = 0; k < c; ++k) {
        m[j] += double(f.rows[(first + j) * c + k]) * (double(branch_mean[b * c + k]) - f.mean[k]);
      }
    }
    for (int64_t j = 0; j < c; ++j) {
      double u = 0;
      for (int64_t k = 0; k < c; ++k) u += double(w.generator_in[j * c + k]) * m[k];
      const double cdf = 0.5 * __builtin_erfc(-u * 0.70710678118654752440);
      hidden[b * c + j] = u * cdf;
      slope[b * c + j] = cdf + u * __builtin_exp(-0.5 * u * u) * 0.39894228040143267794;
      g[j] = 0;
    }
    for (int64_t i = 0; i < taps; ++i) {
      const double grad = grad_kernels[b * taps + i];
      for (int64_t k = 0; k < c; ++k) g[k] += grad * w.generator_out[i * c + k];
    }
    for (int64_t j = 0; j < c; ++j) g[j] *= slope[b * c + j];
    for (int64_t k = 0; k < c; ++k) {
      double total = 0;
      for (int64_t j = 0; j < c; ++j) total += g[j] * w.generator_in[j * c + k];
      detail[b * c + k] = A(total / pixels);
    }
  });
  parallel_units<double>(c, c, [&](int64_t j, double* row) {
    for (int64_t i = j * kTaps; i < (j + 1) * kTaps; ++i) {
      for (int64_t k = 0; k < c; ++k) row[k] = 0;
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t k = 0; k < c; ++k) row[k] += grad_kernels[b * taps + i] * hidden[b * c + k];
      }
      for (int64_t k = 0; k < c; ++k) grad_out[i * c + k] = A(row[k]);
    }
    for (int64_t k = 0; k < c; ++k) {
      double total = 0;
      for (int64_t b = 0; b < batch; ++b) total += grad_hidden[b * c + j] * mean[b * c + k];
      grad_in[j * c + k] = A(total);
    }
  });
}

// From the gradients of each sample's attention and kernels to what the second pass multiplies by.
template <class A>
void small_matrices(const Mixer<A>& w, const MixerStatistics& statistics, const double* grad_attention, int64_t batch,
                    Matrices<A>& m, A* grad_temperature) {
  const int64_t d = w.d, square = d * d;
  Buffer<double> temperature(batch * w.heads);
  parallel_units<double>(batch, 2 * d, [&](int64_t b, double* scratch) {
    for (int64_t head = 0; head < w.heads; ++head) {
      const int64_t index = b * w.heads + head;
      const A *attn = statistics.attention.as<A>() + index * (2 * d + 2) * d, *gram = attn + square;
      A* const grad = m.gram.get() + index * square;
      temperature[index] = softmax_of_gram_backward(grad_attention + index * square, gram, gram + square, attn,
                                                    double(w.temperature[head]), d, scratch, grad,
                                                    m.scales.get() + index * 2 * d);
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < d; ++j) m.gram_t[index * square + j * d + i] = grad[i * d + j];
      }
    }
    for (int64_t j = 0; j < w.c; ++j) {
      const A* kernel = statistics.kernels.as<A>() + (b * w.c + j) * kTaps;
      for (int64_t i = 0; i < kTaps; ++i) m.turned[(b * w.c + j) * kTaps + i] = kernel[kTaps - 1 - i];
    }
  });
  for (int64_t j = 0; j < 3 * w.c; ++j) {
    for (int64_t i = 0; i < 9; ++i) m.turned_qkv[j * 9 + i] = w.qkv_dwconv[j * 9 + 8 - i];
  }
  for (int64_t head = 0; head < w.heads; ++head) {
    double total = 0;
    for (int64_t b = 0; b < batch; ++b) total += temperature[b * w.heads + head];
    grad_temperature[head] = A(total);
  }
}

// The third pass: BatchNorm's and LayerNorm's gradients.
template <class T>
class NormsPass {
 public:
  using A = Acc<T>;

  NormsPass(const Tensor& grad_y, const Tensor& x, const Mixer<A>& w, const Folded<A>& f, const MixerStatistics& s,
            bool training, const double* sums, const Between<A>& between, const Tensor& grad_x)
      : grad_y_(grad_y), x_(x), w_(w), f_(f), mean_(s.batch_mean.as<A>()), var_(s.batch_var.as<A>()), between_(between),
        grad_x_(grad_x), tiling_(choose_dense<A>(x.size[2], x.size[3], 0, 0, 4 * w.C)),
        inner_(tiling_.template outer_capacity<A>()), center_(w.c), slope_(w.c) {
    const Gradients<A> g(w);
    const double count = double(x.size[0]) * double(between.plane());
    for (int64_t j = 0; j < w.c; ++j) {  // of the batch's statistics, per pixel
      center_[j] = training ? A(sums[g.bn_bias + j] / count) : A(0);
      slope_[j] = training ? A(sums[g.bn_weight + j] / count) : A(0);
    }
  }

  int64_t units() const { return x_.size[0] * tiling_.count(); }
  int64_t scratch() const { return (3 * w_.C + w_.c + 1) * inner_; }

  // sums: norm_weight [C], norm_bias [C].
  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t C = w_.C, c = w_.c, I = inner_, sample = unit / tiling_.count();
    const Tile tile = tiling_.template tile<A>(unit % tiling_.count());
    const int64_t pixels = tile.outer_pixels;
    A *normal = scratch, *grad = normal + C * I, *out = grad + C * I, *residual = out + C * I, *rstd = residual + c * I;
    load_tile(x_.as<const T>() + sample * x_.stride[0], x_, tile, C, I, normal);
    load_tile(grad_y_.as<const T>() + sample * grad_y_.stride[0], grad_y_, tile, C, I, out);
    load_tile(between_.normed_of(sample, 0), between_.planes(nullptr), tile, C, I, grad);
    load_tile(between_.residual_of(sample), between_.planes(nullptr), tile, c, I, residual);
    const NormTile<A> norm{C, I, pixels, tile.rows * tile.columns, w_.norm_weight, w_.norm_eps};
    norm.standardise(normal, rstd);
    for (int64_t j = 0; j < c; ++j) through_batch_norm(j, pixels, normal, residual + j * I, grad + (c + j) * I);
    norm.add_sums(normal, grad, sums);
    norm.add_input_gradient(normal, rstd, grad, out);
    store_dense(out, I, tile, C, grad_x_.as<T>() + sample * C * between_.plane());
  }

 private:
  // grad: of BatchNorm's output, which becomes that of its input, the residual's share included.
  MIRAGE_INLINE void through_batch_norm(int64_t j, int64_t pixels, const A* normal, const A* residual, A* grad) const {
    const int64_t k = w_.c + j;
    const A inverse = A(1 / __builtin_sqrt(double(var_[j]) + double(w_.bn_eps))), scale = f_.scale[j];
    for (int64_t p = 0; p < pixels; p += kLanes<A>) {
      const Vec<A> in = load(normal + k * inner_ + p) * w_.norm_weight[k] + w_.norm_bias[k];
      const Vec<A> standard = (in - mean_[j]) * inverse;
      store(grad + p, load(residual + p) + scale * (load(grad + p) - center_[j] - standard * slope_[j]));
    }
  }

  const Tensor &grad_y_, &x_;
  const Mixer<A>& w_;
  const Folded<A>& f_;
  const A *mean_, *var_;
  const Between<A>& between_;
  const Tensor& grad_x_;
  Tiling tiling_;
  int64_t inner_;
  Buffer<A> center_, slope_;
};

template <class A>
void put_all(const Mixer<A>& w, const Gradients<A>& g, const double* sums, const MixerGradients& out) {
  put_sums<A>(sums + g.norm_weight, out.norm_weight);
  put_sums<A>(sums + g.norm_bias, out.norm_bias);
  put_sums<A>(sums + g.qkv, out.qkv);
  put_sums<A>(sums + g.qkv_dwconv, out.qkv_dwconv);
  put_sums<A>(sums + g.bn_weight, out.bn_weight);
  put_sums<A>(sums + g.bn_bias, out.bn_bias);
  put_sums<A>(sums + g.gic1, out.gic1);
  // The gate is gelu(u), u = W n / tau, of which the sums are d / d (W / tau): sum of u du = sum of (W / tau) d(W / tau).
  double scaled = 0;
  for (int64_t i = 0; i < w.h * w.c; ++i) {
    out.gic1.as<A>()[i] = A(sums[g.gic1 + i] / w.tau);
    scaled += sums[g.gic1 + i] * double(w.gic1[i]);
  }
  put_sums<A>(&scaled, out.gate_temperature, -1 / (double(w.tau) * double(w.tau)));
  put_sums<A>(sums + g.gic2, out.gic2);
  put_sums<A>(sums + g.proj_out, out.proj_out);
  put_sums<A>(sums + g.mlp_in, out.mlp_in);
  put_sums<A>(sums + g.mlp_out, out.mlp_out);
  put_sums<A>(sums + g.alphas, out.alpha_att);
  put_sums<A>(sums + g.alphas + 1, out.alpha_conv);
  put_sums<A>(sums + g.alphas + 2, out.alpha_mlp);
  put_sums<A>(sums + g.project_out, out.project_out);
}

template <class T>
void run(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
         const MixerOptions& options, const MixerStatistics& statistics, const Tensor& grad_x,
         const MixerGradients& gradients) {
  using A = Acc<T>;
  const Mixer<A> w(weights, options);
  const A *mean = statistics.batch_mean.as<A>(), *var = statistics.batch_var.as<A>();
  const Folded<A> folded(w, mean, var);
  const BackwardWeights<A> turned(w);
  const Between<A> between(w, x);
  const Gradients<A> g(w);
  const SampleSums<A> s(w);
  const int64_t B = x.size[0];
  Buffer<double> total(g.count), attention(B * w.c * w.d), kernels(B * w.c * kTaps);
  clear_sums(total.get(), g.count);
  {
    const BranchesPass<T> pass(grad_y, x, w, turned, folded, branch_scale.as<A>(), statistics.attention.as<A>(),
                               statistics.kernels.as<A>(), between);
    Buffer<A> per_tile(pass.units() * s.count);
    sum_over_units<A>(pass.units(), g.count, pass.scratch(), total.get(), [&](int64_t unit, A* sums, A* scratch) {
      A* const own = per_tile.get() + unit * s.count;
      for (int64_t i = 0; i < s.count; ++i) own[i] = A(0);
      pass(unit, sums, own, scratch);
    });
    const int64_t tiles = pass.tiling().count();
    for (int64_t b = 0; b < B; ++b) {
      double *a = attention.get() + b * w.c * w.d, *k = kernels.get() + b * w.c * kTaps;
      for (int64_t i = 0; i < w.c * w.d; ++i) a[i] = 0;
      for (int64_t i = 0; i < w.c * kTaps; ++i) k[i] = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const A* own = per_tile.get() + (b * tiles + t) * s.count;
        for (int64_t i = 0; i < w.c * w.d; ++i) a[i] += own[s.attention + i];
        for (int64_t i = 0; i < w.c * kTaps; ++i) k[i] += own[s.kernels + i];
      }
    }
  }
  Matrices<A> matrices(w, B);
  small_matrices(w, statistics, attention.get(), B, matrices, gradients.temperature.as<A>());
  generator_backward(w, folded, statistics.branch_mean.as<A>(), kernels.get(), B, double(between.plane()),
                     matrices.detail.get(), gradients.generator_in.as<A>(), gradients.generator_out.as<A>());
  const InputsPass<T> inputs(x, w, turned, folded, var, matrices, between);
  sum_over_units<A>(inputs.units(), g.count, inputs.scratch(), total.get(), inputs);
  const NormsPass<T> norms(grad_y, x, w, folded, statistics, options.training, total.get(), between, grad_x);
  sum_over_units<A>(norms.units(), 2 * w.C, norms.scratch(), total.get(), norms);
  put_all(w, g, total.get(), gradients);
}

}  // namespace

void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& options, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run<T>(grad_y, x, weights, branch_scale, options, statistics, grad_x, gradients); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
