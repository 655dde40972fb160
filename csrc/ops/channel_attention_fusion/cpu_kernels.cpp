// Kernels of channel_attention_fusion: the pass over v of channel attention, with the fusion of the branches applied
// to each tile while it is in cache. The passes over q and k are those of channel_attention.
#include "cpu_kernels.h"

#include "ops/tri_branch_fusion/cpu_rows.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

template <class TIn, class TOut>
void forward(const Tensor& v, const Tensor& matrices, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
             const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out) {
  using A = Acc<TIn>;
  constexpr int L = kLanes<A>;
  const HeadWork w = head_work<A>(v, matrices.size[1]);
  const Source<TIn> sv(v);
  const FusionForward<TIn, TOut> fusion(conv, mlp, Weights<A>(l_att, l_conv, l_mlp), out, w.tile);
  const int64_t d = w.d;
  parallel_units<A>(w.all_units(), 2 * d * w.tile + fusion.scratch(), [&](int64_t unit, A* v_tile) {
    A *a_tile = v_tile + d * w.tile, *rest = a_tile + d * w.tile;
    const UnitRange r(w, unit);
    const OrientedMatrix<A> m{Kept<A>(matrices, r.sample * w.heads + r.head).attn, d, 1};
    for (int64_t p = r.begin; p < r.end; p += w.tile) {
      const int64_t n = r.end - p < w.tile ? r.end - p : w.tile;
      mix(m, sv.rows(r.sample, r.channel, d, p, n, w.tile, v_tile), d, round_up(n, L), a_tile, w.tile);
      for (int64_t i = 0; i < d; ++i) fusion.row(r.sample, r.channel + i, p, n, a_tile + i * w.tile, rest);
    }
  });
}

template <class TIn, class TOut>
void backward(const Tensor& grad_out, const Tensor& v, const Tensor& matrices, const Tensor& conv, const Tensor& mlp,
              const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp, const Tensor& grad_v,
              const Tensor& grad_conv, const Tensor& grad_mlp, const Tensor& grad_l_att, const Tensor& grad_l_conv,
              const Tensor& grad_l_mlp, double* grad_attn) {
  using A = Acc<TIn>;
  constexpr int L = kLanes<A>;
  const HeadWork w = head_work<A>(v, matrices.size[1]);
  const Source<TIn> sv(v);
  const Sink<TIn> to(grad_v);
  const FusionBackward<TIn, TOut> fusion(grad_out, conv, mlp, Weights<A>(l_att, l_conv, l_mlp), grad_conv, grad_mlp,
                                         w.tile);
  const int64_t d = w.d, square = d * d, tile = d * w.tile;
  Buffer<A> partial(w.all_units() * square);
  Buffer<double> partial_l(w.all_units() * 3);
  parallel_units<A>(w.all_units(), square * L + 3 * tile + fusion.scratch(), [&](int64_t unit, A* sums) {
    A *v_tile = sums + square * L, *a_tile = v_tile + tile, *buffer = a_tile + tile, *rest = buffer + tile;
    ScalarSums<A> sums_l;
    const UnitRange r(w, unit);
    const A* m = Kept<A>(matrices, r.sample * w.heads + r.head).attn;
    clear(sums, square * L);
    for (int64_t p = r.begin; p < r.end; p += w.tile) {
      const int64_t n = r.end - p < w.tile ? r.end - p : w.tile, whole = round_up(n, L);
      const Rows<A> x = sv.rows(r.sample, r.channel, d, p, n, w.tile, v_tile);
      mix({m, d, 1}, x, d, whole, a_tile, w.tile);
      for (int64_t i = 0; i < d; ++i) {  // a row of a becomes the row of its gradient
        A* a = a_tile + i * w.tile;
        fusion.row(r.sample, r.channel + i, p, n, a, a, sums_l, rest);
        for (int64_t j = n; j < whole; ++j) a[j] = A(0);
      }
      const Rows<A> g{a_tile, w.tile};
      gram(g, x, d, whole, sums);
      if (Sink<TIn>::direct(n)) {
        mix({m, 1, d}, g, d, whole, reinterpret_cast<A*>(to.at(r.sample, r.channel, p)), w.pixels);
      } else {
        mix({m, 1, d}, g, d, whole, buffer, w.tile);
        to.put(r.sample, r.channel, d, p, n, buffer, w.tile);
      }
    }
    reduce_lanes(sums, square, partial.get() + unit * square);
    sums_l.total(partial_l.get() + unit * 3);
  });
  for (int64_t index = 0; index < w.all_heads(); ++index) {
    add_partials(partial.get() + index * w.units * square, w.units, square, grad_attn + index * square);
  }
  add_scalar_gradients(partial_l.get(), w.all_units(), grad_l_att, grad_l_conv, grad_l_mlp);
}

}  // namespace

void channel_attention_fusion_forward(const Tensor& v, const Tensor& matrices, const Tensor& conv, const Tensor& mlp,
                                      const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                      const Tensor& out) {
  MIRAGE_FOR_FUSION(v, out, forward, v, matrices, conv, mlp, l_att, l_conv, l_mlp, out)
}

void channel_attention_fusion_backward(const Tensor& grad_out, const Tensor& v, const Tensor& matrices,
                                       const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                                       const Tensor& l_conv, const Tensor& l_mlp, const Tensor& grad_v,
                                       const Tensor& grad_conv, const Tensor& grad_mlp, const Tensor& grad_l_att,
                                       const Tensor& grad_l_conv, const Tensor& grad_l_mlp, double* grad_attn) {
  MIRAGE_FOR_FUSION(v, grad_out, backward, grad_out, v, matrices, conv, mlp, l_att, l_conv, l_mlp, grad_v, grad_conv,
                    grad_mlp, grad_l_att, grad_l_conv, grad_l_mlp, grad_attn)
}

}  // namespace mirage::cpu::MIRAGE_ISA
