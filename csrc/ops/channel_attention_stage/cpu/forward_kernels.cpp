// channel_attention_stage forward: a pass over tiles that reduces q k^T, |q| and |k| and leaves v where y will be; the small
// matrices of each sample; and a pass that multiplies v by project_out times the softmax and adds x.
#include "kernels.h"

#include "common/cpu/dtypes.h"
#include "common/cpu/outer.h"
#include "ops/channel_attention/cpu_softmax.h"
#include "parts.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

using namespace channel_attention_parts;

constexpr int64_t kChunks = 64;  // of all tiles, with sums of their own

// The first pass. Its sums are q k^T of each head, then |q|^2 and |k|^2.
template <class T>
class ReducePass {
 public:
  using A = Acc<T>;
  using P = Operand<T>;

  ReducePass(const Tensor& x, const Attention<P>& w, const Tensor& y)
      : x_(x), w_(w), y_(y), rows_(w.heads_at_once()), before_(smaller(rows_, kRowsAtOnce)),
        room_(2 * rows_ > before_ ? 2 * rows_ : before_),
        tiling_(choose_dense<A>(x.size[2], x.size[3], 1, w.C + before_, room_)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)) {}

  int64_t tiles() const { return tiling_.count(); }
  int64_t sums() const { return w_.C * w_.d + 2 * w_.C; }
  int64_t scratch() const { return (w_.C + before_) * outer_ + room_ * inner_; }

  void operator()(int64_t unit, A* sums, A* scratch) const {
    const int64_t C = w_.C, d = w_.d, I = inner_;
    A *const normed = scratch, *const before = normed + C * outer_, *const q = before + before_ * outer_,
      *const k = q + rows_ * I, *const norms = sums + C * d;
    const Tile tile = tiling_.template tile<A>(unit % tiles());
    const AttentionTile at{tile, outer_, I, dense_pixels<A>(tile), unit / tiles()};
    const P* const in = load_operand<T, P>(w_, x_, at, normed);
    for (int64_t first = 0; first < C; first += rows_) {
      const int64_t n = smaller(rows_, C - first);  // whole heads
      rows(at, in, first, n, before, q);
      rows(at, in, C + first, n, before, k);
      for (int64_t j = 0; j < n; j += d) {
        add_outer(q + j * I, I, d, k + j * I, I, d, at.pixels, sums + (first + j) * d, d);
      }
      for (int64_t j = 0; j < n; ++j) {
        norms[first + j] += sum_of_squares(q + j * I, at.pixels);
        norms[C + first + j] += sum_of_squares(k + j * I, at.pixels);
      }
    }
    const int64_t plane = tile.height * tile.width;
    T* const to = y_.as<T>() + at.sample * C * plane;
    for (int64_t first = 0; first < C; first += before_) {
      const int64_t n = smaller(before_, C - first);
      rows(at, in, 2 * C + first, n, before, q);
      store_dense(q, I, tile, n, to + first * plane);
    }
  }

 private:
  void rows(const AttentionTile& at, const P* in, int64_t first, int64_t n, A* before, A* out) const {
    for (int64_t j = 0; j < n; j += before_) {
      const int64_t here = smaller(before_, n - j);
      rows_before<P>(w_.qkv, w_, at, in, first + j, here, before);
      rows_behind(w_, at, before, first + j, here, out + j * at.inner);
    }
  }

  const Tensor& x_;
  const Attention<P>& w_;
  const Tensor& y_;
  const int64_t rows_, before_, room_;
  const Tiling tiling_;
  const int64_t outer_, inner_;
};

// The matrices of each head from its sums.
template <class P, class A>
void finish(const Attention<P>& w, int64_t samples, int64_t count, const double* sums, A* attention) {
  const int64_t d = w.d;
  parallel_units<double>(samples * w.heads, 3 * d, [&](int64_t unit, double* scratch) {
    const int64_t first = unit % w.heads * d;
    const double *const of_sample = sums + unit / w.heads * count, *const gram = of_sample + first * d,
                 *const squares = of_sample + w.C * d + first;
    double *const q = scratch, *const k = q + d, *const row = k + d;
    const KeptOf<A> kept(attention, unit, d);
    for (int64_t i = 0; i < d; ++i) {
      q[i] = __builtin_sqrt(squares[i]);
      k[i] = __builtin_sqrt(squares[w.C + i]);
      kept.norms[i] = A(q[i]);
      kept.norms[d + i] = A(k[i]);
    }
    softmax_of_gram(gram, q, k, double(w.temperature[unit % w.heads]), d, row, kept.attn);
    for (int64_t i = 0; i < d * d; ++i) kept.gram[i] = A(gram[i]);
  });
}

template <class T>
void run(const Tensor& x, const ChannelAttentionWeights& weights, NormKind norm, double eps, Acc<T>* attention,
         const Tensor& y) {
  using A = Acc<T>;
  using P = Operand<T>;
  const Attention<P> w(weights, norm, eps);
  const int64_t B = x.size[0], C = w.C;
  {
    const ReducePass<T> pass(x, w, y);
    Buffer<double> sums(B * pass.sums());
    sum_by_sample<A>(B, pass.tiles(), kChunks, pass.sums(), pass.scratch(), sums.get(), pass);
    finish(w, B, pass.sums(), sums.get(), attention);
  }
  Buffer<A> folded(B * C * C);
  fold(w, B, attention, folded.get());
  const VectorOrZeros<A> bias(weights.project_out_bias, C);
  apply_by_sample<T>(x, OperandMatrix<P>(matrix_of(folded.get(), B * C, C)), y, bias, y);
}

}  // namespace

void channel_attention_stage(const Tensor& x, const ChannelAttentionWeights& weights, NormKind norm, double eps,
                             const Tensor& attention, const Tensor& y) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run<T>(x, weights, norm, eps, attention.as<Acc<T>>(), y); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
