// channel_attention_stage backward: the passes of backward_passes.h and the small matrices between them.
#include "backward_passes.h"
#include "common/cpu/dtypes.h"
#include "kernels.h"
#include "ops/channel_attention/cpu_softmax.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

using namespace channel_attention_parts;

constexpr int64_t kChunks = 16;  // of all tiles, with sums of their own

// folded [B, C, C] with the rows and columns of each sample exchanged.
template <class A>
void transpose_each(const A* folded, int64_t samples, int64_t C, A* out) {
  parallel_units<A>(samples * C, 0, [&](int64_t unit, A*) {
    const A* const from = folded + unit / C * C * C + unit % C;
    for (int64_t m = 0; m < C; ++m) out[unit * C + m] = from[m * C];
  });
}

// The gradients of one head's softmax and of its columns of project_out, from that of the sample's folded matrix, their
// product. right, both: [C or d, wide]; product: [C, wide], which becomes the latter.
template <class A>
struct HeadGradients {
  int64_t d, wide, C;
  A *right, *product;

  static int64_t scratch(int64_t C, int64_t d) { return 2 * C * whole_vectors<A>(d); }
  HeadGradients(int64_t C, int64_t d, A* scratch)
      : d(d), wide(whole_vectors<A>(d)), C(C), right(scratch), product(right + C * wide) {}

  // out [d, d] (double) = project_out^T times the gradient of the folded matrix.
  void of_softmax(const A* project_out_t, const double* folded, double* out) const {
    for (int64_t m = 0; m < C; ++m) {
      for (int64_t j = 0; j < wide; ++j) right[m * wide + j] = j < d ? A(folded[m * C + j]) : A(0);
    }
    mix_share(Matrix<A>{project_out_t, C}, d, C, right, wide, wide, true, product);
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) out[i * d + j] = product[i * wide + j];
    }
  }

  // product [C, wide] = the gradient of the folded matrix (in `left`, [C, d]) times the softmax, transposed.
  void of_project_out(const A* left, const A* softmax) const {
    widen(softmax, 1, d, d, wide, right);
    mix_share(Matrix<A>{left, d}, C, d, right, wide, wide, true, product);
  }
};

// Of one pixel a normalised q or k is its sign, which has no gradient: the two parts of it cancel, exactly only here. rows
// [d, d]: the gradients of q k^T, or transposed; norms and scales: of the same rows.
template <class A>
void drop_gradients_of_signs(int64_t d, const A* norms, A* rows, A* scales) {
  for (int64_t i = 0; i < d; ++i) {
    if (!(norms[i] >= A(kNormEps))) continue;
    scales[i] = A(0);
    for (int64_t j = 0; j < d; ++j) rows[i * d + j] = A(0);
  }
}

// From the gradients of each sample's folded matrix to those of q k^T, of the temperature and of project_out.
template <class A>
void small_matrices(const Attention<A>& w, int64_t samples, int64_t pixels, const double* sums, int64_t count,
                    A* attention, const GramGradients<A>& g, const ChannelAttentionGradients& out) {
  const int64_t C = w.C, d = w.d, wide = whole_vectors<A>(d);
  const Transposed<A> project_out_t(w.project_out, C, C);
  Buffer<double> grad_attn(samples * C * d), temperature(samples * w.heads);
  parallel_units<A>(samples * w.heads, HeadGradients<A>::scratch(C, d), [&](int64_t unit, A* scratch) {
    const int64_t head = unit % w.heads;
    double* const grad = grad_attn.get() + unit * d * d;
    HeadGradients<A>(C, d, scratch).of_softmax(project_out_t.get() + head * d * C, sums + unit / w.heads * count + head * d,
                                               grad);
    const KeptOf<A> kept(attention, unit, d);
    A *const gram = g.gram.get() + unit * d * d, *const gram_t = g.gram_t.get() + unit * d * d,
      *const scales = g.scales.get() + unit * 2 * d;
    Buffer<double> room(2 * d);
    temperature[unit] = softmax_of_gram_backward(grad, kept.gram, kept.norms, kept.attn, double(w.temperature[head]), d,
                                                 room.get(), gram, scales);
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) gram_t[j * d + i] = gram[i * d + j];
    }
    if (pixels == 1) {
      drop_gradients_of_signs(d, kept.norms, gram, scales);
      drop_gradients_of_signs(d, kept.norms + d, gram_t, scales + d);
    }
  });
  parallel_units<A>(w.heads, HeadGradients<A>::scratch(C, d) + C * d, [&](int64_t head, A* scratch) {
    const HeadGradients<A> of_head(C, d, scratch);
    A* const left = scratch + HeadGradients<A>::scratch(C, d);
    Buffer<double> total(C * d);
    for (int64_t i = 0; i < C * d; ++i) total[i] = 0;
    double of_temperature = 0;
    for (int64_t b = 0; b < samples; ++b) {
      const double* const folded = sums + b * count + head * d;
      for (int64_t m = 0; m < C; ++m) {
        for (int64_t j = 0; j < d; ++j) left[m * d + j] = A(folded[m * C + j]);
      }
      of_head.of_project_out(left, KeptOf<A>(attention, b * w.heads + head, d).attn);
      for (int64_t m = 0; m < C; ++m) {
        for (int64_t j = 0; j < d; ++j) total[m * d + j] += of_head.product[m * wide + j];
      }
      of_temperature += temperature[b * w.heads + head];
    }
    for (int64_t m = 0; m < C; ++m) {
      for (int64_t j = 0; j < d; ++j) out.project_out.as<A>()[m * C + head * d + j] = A(total[m * d + j]);
    }
    out.temperature.as<A>()[head] = A(of_temperature);
  });
}

// qkv multiplies standard * weight + bias, of which the sums have the standard part.
template <class A>
void put_qkv(const Attention<A>& w, const double* sums, const double* biases, const Tensor& out) {
  const int64_t C = w.C;
  parallel_runs(3 * C * C, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / C, k = i % C;
      out.as<A>()[i] = A(sums[i] * double(w.norm_weight[k]) + biases[m] * double(w.norm_bias.get()[k]));
    }
  });
}

template <class T>
void run(const Tensor& grad_y, const Tensor& x, const ChannelAttentionWeights& weights, NormKind norm, double eps,
         Acc<T>* attention, const Tensor& grad_x, const ChannelAttentionGradients& out) {
  using A = Acc<T>;
  const Attention<A> w(weights, norm, eps);
  // q, k and v are computed again as forward did: of operands with other roundings their sums would not be those that it kept,
  // and gradients that are differences of large parts would be lost.
  const OperandMatrix<Operand<T>> qkv(weights.qkv);
  const int64_t B = x.size[0], C = w.C;
  const Between<A> between(x);
  const SampleSums s(C);
  const GramGradients<A> g(w, B);
  Buffer<double> depthwise(30 * C);  // of taps, then of biases
  {
    Buffer<A> folded(B * C * C), folded_t(B * C * C);
    fold(w, B, attention, folded.get());
    transpose_each(folded.get(), B, C, folded_t.get());
    const ValuesPass<T> values(grad_y, x, w, qkv, folded_t.get(), between);
    Buffer<double> sums(B * s.count), bias(C);
    sum_by_sample<A>(B, values.tiles(), kChunks, s.count, values.scratch(), sums.get(), values);
    small_matrices(w, B, between.plane, sums.get(), s.count, attention, g, out);
    const auto over_samples = [&](int64_t from, int64_t n, double* to) {
      for (int64_t i = 0; i < n; ++i) to[i] = 0;
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t i = 0; i < n; ++i) to[i] += sums[b * s.count + from + i];
      }
    };
    over_samples(s.out_bias, C, bias.get());
    put_sums<A>(bias.get(), out.project_out_bias);
    over_samples(s.taps, 30 * C, depthwise.get());
  }
  const ScoresPass<T> scores(x, w, qkv, g, between);
  sum_over_units<A>(scores.units(), scores.sums(), scores.scratch(), depthwise.get(), scores);
  put_sums<A>(depthwise.get(), out.qkv_dwconv);
  put_sums<A>(depthwise.get() + 27 * C, out.qkv_dwconv_bias);

  const Transposed<A> qkv_t(w.qkv.data, 3 * C, C);
  const InputsPass<T> inputs(grad_y, x, w, qkv_t.get(), between, grad_x);
  Buffer<double> sums(inputs.sums());
  clear_sums(sums.get(), inputs.sums());
  sum_over_units<A>(inputs.units(), inputs.sums(), inputs.scratch(), sums.get(), inputs);
  put_sums<A>(sums.get(), out.norm_weight);
  put_sums<A>(sums.get() + C, out.norm_bias);
  put_sums<A>(sums.get() + inputs.bias_sums(), out.qkv_bias);
  put_qkv(w, sums.get() + inputs.qkv_sums(), sums.get() + inputs.bias_sums(), out.qkv);
}

}  // namespace

void channel_attention_stage_backward(const Tensor& grad_y, const Tensor& x, const ChannelAttentionWeights& weights,
                                      NormKind norm, double eps, const Tensor& attention, const Tensor& grad_x,
                                      const ChannelAttentionGradients& gradients) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, {
    run<T>(grad_y, x, weights, norm, eps, attention.as<Acc<T>>(), grad_x, gradients);
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
