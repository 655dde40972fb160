// mixer_stage forward: a pass that reduces (q k^T, norms, moments of the gated CNN's input), the small matrices of each
// sample, and a pass that recomputes what it needs tile by tile and writes y.
#include "kernels.h"

#include "common/cpu/dtypes.h"
#include "common/cpu/outer.h"
#include "ops/channel_attention/cpu_softmax.h"
#include "parts.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

// The sums of one tile: q k^T per head, |q|^2 and |k|^2, then mean and sum of squared deviations of the branch.
struct Sums {
  int64_t gram, norms, mean, deviation, count;
  template <class P>
  explicit Sums(const Mixer<P>& w)
      : gram(0), norms(w.c * w.d), mean(norms + 2 * w.c), deviation(mean + w.c), count(deviation + w.c) {}
};

template <class A>
inline A sum_of_squares(const A* row, int64_t pixels) {
  Vec<A> total = {};
  for (int64_t p = 0; p < pixels; p += kLanes<A>) total += load(row + p) * load(row + p);
  return sum<A>(total);
}

// Mean and sum of squared deviations of `pixels` values (at least one), in whole vectors with zeros behind them. Sums
// are of differences from the first value: a constant row has exactly its mean and no deviation.
template <class A>
inline void moments(const A* row, int64_t pixels, A& mean, A& deviation) {
  constexpr int L = kLanes<A>;
  const A origin = row[0];
  Vec<A> total = {};
  int64_t p = 0;
  for (; p + L <= pixels; p += L) total += load(row + p) - origin;
  A offset = sum<A>(total);
  for (int64_t q = p; q < pixels; ++q) offset += row[q] - origin;
  mean = origin + offset / A(pixels);
  total = Vec<A>{};
  for (p = 0; p + L <= pixels; p += L) {
    const Vec<A> e = load(row + p) - mean;
    total += e * e;
  }
  deviation = sum<A>(total);
  for (; p < pixels; ++p) deviation += (row[p] - mean) * (row[p] - mean);
}

// The first pass. partial: [samples * tiles, count].
template <class T>
void reduce(const Tensor& x, const Mixer<Operand<T>>& w, const Tiling& tiling, const Sums& s, Acc<T>* partial) {
  using A = Acc<T>;
  const int64_t O = tiling.outer_capacity<A>(), I = dense_capacity<A>(tiling), c = w.c;
  parallel_units<A>(x.size[0] * tiling.count(), (w.C + 2 * c) * O + 2 * c * I, [&](int64_t unit, A* scratch) {
    A *normed = scratch, *before = normed + w.C * O, *q = before + 2 * c * O, *k = q + c * I;
    const Tile tile = tiling.tile<A>(unit % tiling.count());
    const MixerTile at{tile, O, I, dense_pixels<A>(tile), unit / tiling.count()};
    load_normalised<T>(w, x, at, normed);
    attention_inputs(w, at, normed, 0, 2 * c, before, q);
    clear_tails(q, 2 * c, I, tile.rows * tile.columns);
    A* const out = partial + unit * s.count;
    for (int64_t i = 0; i < s.mean; ++i) out[i] = A(0);
    for (int64_t head = 0; head < w.heads; ++head) {
      const int64_t row = head * w.d;
      add_outer(q + row * I, I, w.d, k + row * I, I, w.d, at.pixels, out + s.gram + row * w.d, w.d);
    }
    for (int64_t j = 0; j < 2 * c; ++j) out[s.norms + j] = sum_of_squares(q + j * I, at.pixels);
    A* const branch = before;  // q and k are done with it
    copy_dense(normed + c * O, O, tile, c, branch, I);
    for (int64_t j = 0; j < c; ++j) {
      moments(branch + j * I, tile.rows * tile.columns, out[s.mean + j], out[s.deviation + j]);
    }
  });
}

// The matrices of one sample from its tiles, and the mean of its branch.
template <class P, class A>
void attention_of(const Mixer<P>& w, const Sums& s, const Tiling& tiling, const A* partial, A* attention,
                  A* branch_mean) {
  const int64_t d = w.d, tiles = tiling.count();
  Buffer<double> total(s.count + d);
  for (int64_t i = 0; i < s.count; ++i) total[i] = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const A* p = partial + t * s.count;
    const Tile tile = tiling.tile<A>(t);
    for (int64_t i = 0; i < s.mean; ++i) total[i] += p[i];
    for (int64_t j = 0; j < w.c; ++j) total[s.mean + j] += double(p[s.mean + j]) * double(tile.rows * tile.columns);
  }
  for (int64_t j = 0; j < w.c; ++j) branch_mean[j] = A(total[s.mean + j] / double(tiling.height * tiling.width));
  double* const norms = total.get() + s.norms;
  for (int64_t j = 0; j < 2 * w.c; ++j) norms[j] = __builtin_sqrt(norms[j]);
  for (int64_t head = 0; head < w.heads; ++head) {
    A* const kept = attention + head * (2 * d + 2) * d;
    const double *gram = total.get() + s.gram + head * d * d, *q = norms + head * d, *k = q + w.c;
    softmax_of_gram(gram, q, k, double(w.temperature[head]), d, total.get() + s.count, kept);
    for (int64_t i = 0; i < d * d; ++i) kept[d * d + i] = A(gram[i]);
    for (int64_t i = 0; i < d; ++i) {
      kept[2 * d * d + i] = A(q[i]);
      kept[2 * d * d + d + i] = A(k[i]);
    }
  }
}

// Mean and biased variance of the branch over the whole batch, tiles merged in order.
template <class P, class A>
void batch_moments(const Mixer<P>& w, const Sums& s, const Tiling& tiling, int64_t batch, const A* partial, A* mean,
                   A* var) {
  const double pixels = double(tiling.height * tiling.width) * double(batch);
  for (int64_t j = 0; j < w.c; ++j) {
    double average = 0, squares = 0;
    for (int64_t u = 0; u < batch * tiling.count(); ++u) {
      const Tile tile = tiling.tile<A>(u % tiling.count());
      average += double(partial[u * s.count + s.mean + j]) * double(tile.rows * tile.columns);
    }
    average /= pixels;
    for (int64_t u = 0; u < batch * tiling.count(); ++u) {
      const Tile tile = tiling.tile<A>(u % tiling.count());
      const double off = double(partial[u * s.count + s.mean + j]) - average;
      squares += double(partial[u * s.count + s.deviation + j]) + off * off * double(tile.rows * tile.columns);
    }
    mean[j] = A(average);
    var[j] = A(squares / pixels);
  }
}

// What the generator multiplies by its last matrix: the GELU of its first product of the mean of the detail rows.
template <class P, class A>
void generator_hidden(const Mixer<P>& w, const Folded<P>& f, const A* branch_mean, A* hidden) {
  Buffer<A> room(2 * w.c);
  A *const mean = room.get(), *const centered = mean + w.c;
  const int64_t detail = 2 * w.h - w.c;
  for (int64_t k = 0; k < w.c; ++k) centered[k] = branch_mean[k] - f.mean[k];
  for (int64_t j = 0; j < w.c; ++j) mean[j] = f.bias[detail + j] + dot<A>(f.rows.get() + (detail + j) * w.c, centered, w.c);
  for (int64_t j = 0; j < w.c; ++j) {
    const double v = dot<A>(w.generator_in + j * w.c, mean, w.c);
    hidden[j] = A(0.5 * v * __builtin_erfc(-v * 0.70710678118654752440));
  }
}

// The 7x7 kernels of all samples. The last matrix is as large as the rest of a mixer's weights together: a unit is a
// share of its rows.
template <class P, class A>
void generate_kernels(const Mixer<P>& w, const Folded<P>& f, int64_t batch, const A* branch_mean, A* kernels) {
  const int64_t rows = kTaps * w.c, shares = (rows * w.c + 16383) / 16384, share = (rows + shares - 1) / shares;
  Buffer<A> hidden(batch * w.c);
  parallel_units<A>(batch, 1, [&](int64_t b, A*) { generator_hidden(w, f, branch_mean + b * w.c, hidden.get() + b * w.c); });
  parallel_units<A>(batch * shares, 1, [&](int64_t unit, A*) {
    const int64_t b = unit / shares, first = unit % shares * share, end = smaller(first + share, rows);
    for (int64_t m = first; m < end; ++m) {
      kernels[b * rows + m] = dot<A>(w.generator_out + m * w.c, hidden.get() + b * w.c, w.c);
    }
  });
}

// The second pass.
template <class T>
void apply(const Tensor& x, const Mixer<Operand<T>>& w, const Folded<Operand<T>>& f, const Acc<T>* branch_scale,
           const Acc<T>* attention, const Acc<T>* kernels, const Tensor& y) {
  using A = Acc<T>;
  const int64_t C = w.C, c = w.c, group = smaller(kGroup, w.h > 2 * c ? w.h : 2 * c);
  const Tiling tiling = choose_dense<A>(x.size[2], x.size[3], kMixerHalo, C + c, 6 * c + group);
  const int64_t O = tiling.outer_capacity<A>(), I = dense_capacity<A>(tiling), planes = x.size[2] * x.size[3];
  parallel_units<A>(x.size[0] * tiling.count(), (C + c) * O + (6 * c + group) * I, [&](int64_t unit, A* scratch) {
    A *normed = scratch, *wide = normed + C * O, *moved = wide + c * O, *conv_in = moved + c * I,
      *mlp_in = conv_in + c * I, *att = mlp_in + c * I, *conv = att + c * I, *mlp = conv + c * I, *hidden = mlp + c * I;
    const Tile tile = tiling.tile<A>(unit % tiling.count());
    const MixerTile at{tile, O, I, dense_pixels<A>(tile), unit / tiling.count()};
    load_normalised<T>(w, x, at, normed);
    copy_dense(normed + c * O, O, tile, 2 * c, conv_in, I);
    center(w, f, I, at.pixels, conv_in);

    attention_inputs(w, at, normed, 2 * c, c, wide, moved);
    attend(w, at, attention + at.sample * w.heads * (2 * w.d + 2) * w.d, moved, att);

    detail_rows(w, f, at, normed, wide);
    dynamic_rows(w, at, kernels + at.sample * c * kTaps, wide, moved);
    gated_branch(w, f, at, conv_in, moved, branch_scale[at.sample], hidden, mlp, conv, conv_in);
    project(w.products.proj_out, c, at, conv_in, conv);

    pixel_mlp(w, at, mlp_in, hidden, mlp);
    fuse(w, at, att);
    A* const out = normed;  // no longer needed, and large enough
    project(w.products.project_out, C, at, att, out);
    const T* px = x.as<const T>() + at.sample * x.stride[0];
    add_dense(px, x, tile, C, I, out, y.as<T>() + at.sample * C * planes, hidden);
  });
}

template <class T>
void run(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& options,
         const MixerStatistics& statistics, const Tensor& y) {
  using A = Acc<T>;
  const Mixer<Operand<T>> w(weights, options);
  const int64_t B = x.size[0];
  A *attention = statistics.attention.as<A>(), *kernels = statistics.kernels.as<A>(),
    *branch_mean = statistics.branch_mean.as<A>(), *mean = statistics.batch_mean.as<A>(),
    *var = statistics.batch_var.as<A>();
  const Tiling tiling = choose_dense<A>(x.size[2], x.size[3], 1, w.C + 2 * w.c, 2 * w.c);
  const Sums s(w);
  {
    Buffer<A> partial(B * tiling.count() * s.count);
    reduce<T>(x, w, tiling, s, partial.get());
    parallel_units<A>(B, 1, [&](int64_t b, A*) {
      attention_of(w, s, tiling, partial.get() + b * tiling.count() * s.count,
                   attention + b * w.heads * (2 * w.d + 2) * w.d, branch_mean + b * w.c);
    });
    if (options.training) {
      batch_moments(w, s, tiling, B, partial.get(), mean, var);
    } else {
      load_all(weights.bn_mean, mean);
      load_all(weights.bn_var, var);
    }
  }
  const Folded<Operand<T>> f(w, mean, var);
  generate_kernels(w, f, B, branch_mean, kernels);
  apply<T>(x, w, f, branch_scale.as<A>(), attention, kernels, y);
}

}  // namespace

void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& options,
                 const MixerStatistics& statistics, const Tensor& y) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run<T>(x, weights, branch_scale, options, statistics, y); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
