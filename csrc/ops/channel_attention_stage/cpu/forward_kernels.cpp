// channel_attention_stage forward: a pass over tiles that reduces q k^T, |q| and |k| and leaves v where y will be; the small
// matrices of each sample; and a pass that multiplies v by project_out times the softmax and adds x.
#include "kernels.h"

#include "common/cpu/ahead.h"
#include "common/cpu/carried_lines.h"
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
        tiling_(StripTiling::choose<A>(x.size[2], x.size[3], w.C + before_, room_, StripTiling::kThreadsOfSums)),
        outer_(tiling_.template outer_capacity<A>()), inner_(dense_capacity<A>(tiling_)),
        carried_(CarriedLines<A>::capacity_of(tiling_)) {}

  int64_t tiles() const { return tiling_.count(); }
  int64_t sums() const { return w_.C * w_.d + 2 * w_.C; }
  int64_t scratch() const { return (w_.C + before_) * outer_ + room_ * inner_ + 3 * w_.C * carried_; }

  void operator()(WorkUnit unit, A* sums, A* scratch) const {
    const int64_t C = w_.C, d = w_.d, I = inner_;
    A *const normed = scratch, *const before = normed + C * outer_, *const q = before + before_ * outer_,
      *const k = q + rows_ * I, *const norms = sums + C * d;
    const auto tile_of = [&](int64_t i) { return tiling_.template tile<A>(i); };
    const Tile tile = tile_of(unit % tiles());
    const bool follows = tiling_.follows(unit);
    const Lines lines = Lines::around<A>(tile, follows);
    const AttentionTile at{tile, outer_, I, dense_pixels<A>(tile), unit / tiles()};
    const P* const in = load_operand<T, P>(w_, x_, {lines.tile, outer_, I, at.pixels, at.sample}, normed);
    Ahead ahead{TileLines::after<T>(unit, x_, tiles(), tiling_.halo, tile_of), TileLines::of<T>(y_, at.sample, tile)};
    const Before part{at, lines, in, before, {q + room_ * I, carried_}, follows, ahead};
    for (int64_t first = 0; first < C; first += rows_) {
      const int64_t n = smaller(rows_, C - first);  // whole heads
      rows(part, first, n, q);
      rows(part, C + first, n, k);
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
      rows(part, 2 * C + first, n, q);
      store_dense(q, I, tile, n, to + first * plane);
    }
  }

 private:
  // What rows of (q, k, v) are made of: x of so many lines, normalised, room for what is convolved, and its first two lines.
  struct Before {
    const AttentionTile& at;
    const Lines& lines;
    const P* in;
    A* room;
    CarriedLines<A> carried;
    bool follows;
    Ahead& ahead;
  };

  void rows(const Before& part, int64_t first, int64_t n, A* out) const {
    const Tile& tile = part.at.tile;
    for (int64_t j = 0; j < n; j += before_) {
      const int64_t row = first + j, here = smaller(before_, n - j);
      const A* const bias = w_.qkv_bias.from(row);
      part.carried.from(row).fill(here, tile, outer_, part.follows, part.room, [&](A* to) {
        part.lines.product(w_.qkv.at(row), here, w_.C, part.in, outer_, tile.stride, to, [&](int64_t m, auto& v) {
          if (bias) add_to_each(v, bias[m]);
          part.ahead.template step<A, sizeof(v) / sizeof(v[0])>(3);
        });
      });
      rows_behind(w_, part.at, part.room, row, here, out + j * inner_);
    }
  }

  const Tensor& x_;
  const Attention<P>& w_;
  const Tensor& y_;
  const int64_t rows_, before_, room_;
  const StripTiling tiling_;
  const int64_t outer_, inner_, carried_;
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
