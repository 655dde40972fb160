// Kernels of channel_attention. Forward: one pass over q and k for their inner products and norms, the softmax of a
// small matrix, one pass over v. Backward: one pass over v and the gradient, the small matrices, one pass over q and k.
#include "cpu_kernels.h"

#include "cpu_core.h"
#include "cpu_softmax.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

template <class T>
void weights(const Tensor& q, const Tensor& k, const Tensor& temperature, const Tensor& matrices) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const HeadWork w = head_work<A>(q, matrices.size[1]);
  const Source<T> sq(q), sk(k);
  const int64_t d = w.d, count = d * d + 2 * d;  // the inner products, |q|^2, |k|^2
  Buffer<A> partial(w.all_units() * count);

  parallel_units<A>(w.all_units(), count * L + 2 * d * w.tile, [&](int64_t unit, A* sums) {
    A *q_tile = sums + count * L, *k_tile = q_tile + d * w.tile;
    const UnitRange r(w, unit);
    clear(sums, count * L);
    for (int64_t p = r.begin; p < r.end; p += w.tile) {
      const int64_t n = r.end - p < w.tile ? r.end - p : w.tile, whole = round_up(n, L);
      const Rows<A> x = sq.rows(r.sample, r.channel, d, p, n, w.tile, q_tile);
      const Rows<A> y = sk.rows(r.sample, r.channel, d, p, n, w.tile, k_tile);
      gram(x, y, d, whole, sums);
      squares(x, d, whole, sums + d * d * L);
      squares(y, d, whole, sums + (d * d + d) * L);
    }
    reduce_lanes(sums, count, partial.get() + unit * count);
  });

  Buffer<double> t(w.heads);
  load_all(temperature, t.get());
  parallel_units<double>(w.all_heads(), count + d, [&](int64_t index, double* total) {
    add_partials(partial.get() + index * w.units * count, w.units, count, total);
    double* norm = total + d * d;
    for (int64_t i = 0; i < 2 * d; ++i) norm[i] = __builtin_sqrt(norm[i]);
    const Kept<A> kept(matrices, index);
    softmax_of_gram(total, norm, norm + d, t[index % w.heads], d, total + count, kept.attn);
    for (int64_t i = 0; i < d * d; ++i) kept.gram[i] = A(total[i]);
    for (int64_t i = 0; i < 2 * d; ++i) kept.norms[i] = A(norm[i]);
  });
}

template <class T>
void weights_backward(const double* grad_attn, const Tensor& q, const Tensor& k, const Tensor& temperature,
                      const Tensor& matrices, const Tensor& grad_q, const Tensor& grad_k,
                      const Tensor& grad_temperature) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const HeadWork w = head_work<A>(q, matrices.size[1]);
  const Source<T> sq(q), sk(k);
  const Sink<T> to_q(grad_q), to_k(grad_k);
  const int64_t d = w.d, count = d * d + 2 * d;  // the gradient of gram, and the scales of q and k
  Buffer<A> small(w.all_heads() * count);
  Buffer<double> t(w.heads), grad_t(w.heads), grad_t_each(w.all_heads());
  load_all(temperature, t.get());

  parallel_units<double>(w.all_heads(), 2 * d, [&](int64_t index, double* sums) {
    A* out = small.get() + index * count;
    const Kept<A> kept(matrices, index);
    grad_t_each[index] = softmax_of_gram_backward(grad_attn + index * d * d, kept.gram, kept.norms, kept.attn,
                                                  t[index % w.heads], d, sums, out, out + d * d);
  });
  for (int64_t h = 0; h < w.heads; ++h) {
    grad_t[h] = 0;
    for (int64_t b = 0; b < w.batch; ++b) grad_t[h] += grad_t_each[b * w.heads + h];
  }
  store_all(grad_t.get(), grad_temperature);

  parallel_units<A>(w.all_units(), 4 * d * w.tile, [&](int64_t unit, A* q_tile) {
    A *k_tile = q_tile + d * w.tile, *gq = k_tile + d * w.tile, *gk = gq + d * w.tile;
    const UnitRange r(w, unit);
    const A *m = small.get() + (r.sample * w.heads + r.head) * count, *scales = m + d * d;
    for (int64_t p = r.begin; p < r.end; p += w.tile) {
      const int64_t n = r.end - p < w.tile ? r.end - p : w.tile, whole = round_up(n, L);
      const Rows<A> x = sq.rows(r.sample, r.channel, d, p, n, w.tile, q_tile);
      const Rows<A> y = sk.rows(r.sample, r.channel, d, p, n, w.tile, k_tile);
      const bool direct = Sink<T>::direct(n);
      A* out_q = direct ? reinterpret_cast<A*>(to_q.at(r.sample, r.channel, p)) : gq;
      A* out_k = direct ? reinterpret_cast<A*>(to_k.at(r.sample, r.channel, p)) : gk;
      const int64_t ld = direct ? w.pixels : w.tile;
      mix({m, d, 1}, y, d, whole, out_q, ld, scales, x);
      mix({m, 1, d}, x, d, whole, out_k, ld, scales + d, y);
      if (!direct) {
        to_q.put(r.sample, r.channel, d, p, n, gq, w.tile);
        to_k.put(r.sample, r.channel, d, p, n, gk, w.tile);
      }
    }
  });
}

template <class T>
void apply(const Tensor& v, const Tensor& matrices, const Tensor& out) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const HeadWork w = head_work<A>(v, matrices.size[1]);
  const Source<T> sv(v);
  const Sink<T> to(out);
  const int64_t d = w.d;
  parallel_units<A>(w.all_units(), 2 * d * w.tile, [&](int64_t unit, A* v_tile) {
    A* buffer = v_tile + d * w.tile;
    const UnitRange r(w, unit);
    const OrientedMatrix<A> m{Kept<A>(matrices, r.sample * w.heads + r.head).attn, d, 1};
    for (int64_t p = r.begin; p < r.end; p += w.tile) {
      const int64_t n = r.end - p < w.tile ? r.end - p : w.tile, whole = round_up(n, L);
      const Rows<A> x = sv.rows(r.sample, r.channel, d, p, n, w.tile, v_tile);
      if (Sink<T>::direct(n)) {
        mix(m, x, d, whole, reinterpret_cast<A*>(to.at(r.sample, r.channel, p)), w.pixels);
      } else {
        mix(m, x, d, whole, buffer, w.tile);
        to.put(r.sample, r.channel, d, p, n, buffer, w.tile);
      }
    }
  });
}

// Computes grad_v, and the gradient of attn into grad_attn.
template <class T>
void apply_backward(const Tensor& grad_out, const Tensor& v, const Tensor& matrices, const Tensor& grad_v,
                    double* grad_attn) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const HeadWork w = head_work<A>(v, matrices.size[1]);
  const Source<T> sv(v), sg(grad_out);
  const Sink<T> to(grad_v);
  const int64_t d = w.d;
  Buffer<A> partial(w.all_units() * d * d);
  parallel_units<A>(w.all_units(), d * d * L + 3 * d * w.tile, [&](int64_t unit, A* sums) {
    A *v_tile = sums + d * d * L, *g_tile = v_tile + d * w.tile, *buffer = g_tile + d * w.tile;
    const UnitRange r(w, unit);
    const OrientedMatrix<A> transposed{Kept<A>(matrices, r.sample * w.heads + r.head).attn, 1, d};
    clear(sums, d * d * L);
    for (int64_t p = r.begin; p < r.end; p += w.tile) {
      const int64_t n = r.end - p < w.tile ? r.end - p : w.tile, whole = round_up(n, L);
      const Rows<A> g = sg.rows(r.sample, r.channel, d, p, n, w.tile, g_tile);
      const Rows<A> x = sv.rows(r.sample, r.channel, d, p, n, w.tile, v_tile);
      gram(g, x, d, whole, sums);
      if (Sink<T>::direct(n)) {
        mix(transposed, g, d, whole, reinterpret_cast<A*>(to.at(r.sample, r.channel, p)), w.pixels);
      } else {
        mix(transposed, g, d, whole, buffer, w.tile);
        to.put(r.sample, r.channel, d, p, n, buffer, w.tile);
      }
    }
    reduce_lanes(sums, d * d, partial.get() + unit * d * d);
  });
  for (int64_t index = 0; index < w.all_heads(); ++index) {
    add_partials(partial.get() + index * w.units * d * d, w.units, d * d, grad_attn + index * d * d);
  }
}

}  // namespace

void attention_weights(const Tensor& q, const Tensor& k, const Tensor& temperature, const Tensor& matrices) {
  MIRAGE_FOR_DTYPE(q.dtype, T, { weights<T>(q, k, temperature, matrices); })
}

void attention_weights_backward(const double* grad_attn, const Tensor& q, const Tensor& k, const Tensor& temperature,
                                const Tensor& matrices, const Tensor& grad_q, const Tensor& grad_k,
                                const Tensor& grad_temperature) {
  MIRAGE_FOR_DTYPE(q.dtype, T, {
    weights_backward<T>(grad_attn, q, k, temperature, matrices, grad_q, grad_k, grad_temperature);
  })
}

void channel_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                               const Tensor& out, const Tensor& matrices) {
  attention_weights(q, k, temperature, matrices);
  MIRAGE_FOR_DTYPE(v.dtype, T, { apply<T>(v, matrices, out); })
}

void channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& temperature, const Tensor& matrices, const Tensor& grad_q,
                                const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_temperature) {
  const int64_t d = matrices.size[3];
  Buffer<double> grad_attn(matrices.size[0] * matrices.size[1] * d * d);
  MIRAGE_FOR_DTYPE(v.dtype, T, { apply_backward<T>(grad_out, v, matrices, grad_v, grad_attn.get()); })
  attention_weights_backward(grad_attn.get(), q, k, temperature, matrices, grad_q, grad_k, grad_temperature);
}

}  // namespace mirage::cpu::MIRAGE_ISA
