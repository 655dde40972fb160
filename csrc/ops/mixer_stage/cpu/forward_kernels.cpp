// mixer_stage forward: a pass that reduces (q k^T, norms, moments of the gated CNN's input), the small matrices of each
// sample, and a pass that recomputes what it needs tile by tile and writes y. On its own each serves parts of a map, and
// a grid of cells over it, which have matrices of their own.
#include "kernels.h"

#include "common/cpu/cells.h"
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

template <class P>
Cells cells_to_reduce(const Mixer<P>& w, const Tensor& x, const Cuts& rows, const Cuts& columns) {
  return Cells(rows, columns, x.size[2], x.size[3], [&](int64_t height, int64_t width) {
    return choose_dense<Acc<P>>(height, width, 1, w.C + 2 * w.c, 2 * w.c);
  });
}

// The first pass. partial: [samples * tiles, count].
template <class T>
void reduce(const Tensor& x, const Mixer<Operand<T>>& w, const Cells& cells, const Sums& s, Acc<T>* partial) {
  using A = Acc<T>;
  const int64_t O = cells.outer_capacity<A>(), I = cells.inner_capacity<A>(), c = w.c, tiles = cells.units();
  parallel_units<A>(x.size[0] * tiles, (w.C + 2 * c) * O + 2 * c * I, [&](int64_t unit, A* scratch) {
    A *normed = scratch, *before = normed + w.C * O, *q = before + 2 * c * O, *k = q + c * I;
    const Tile tile = cells.tile<A>(unit % tiles);
    const MixerTile at{tile, O, I, dense_pixels<A>(tile), unit / tiles};
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

// The sums of one sample over a cell, from those of its tiles: as of a tile, but for the sum of the branch in the place
// of its mean, and nothing behind that.
template <class A>
void merge(const Sums& s, int64_t c, const Cells& cells, int64_t cell, const A* partial, double* total) {
  for (int64_t i = 0; i < s.deviation; ++i) total[i] = 0;
  for (int64_t t = cells.first_unit(cell); t < cells.first_unit(cell + 1); ++t) {
    const A* p = partial + t * s.count;
    const Tile tile = cells.tile<A>(t);
    for (int64_t i = 0; i < s.mean; ++i) total[i] += p[i];
    for (int64_t j = 0; j < c; ++j) total[s.mean + j] += double(p[s.mean + j]) * double(tile.rows * tile.columns);
  }
}

// The matrices that follow from the sums over `pixels`, and the mean of the branch.
template <class P, class A>
void attention_of(const Mixer<P>& w, const Sums& s, const double* sums, double pixels, A* attention, A* branch_mean) {
  const int64_t d = w.d;
  Buffer<double> room(s.mean + d);
  double *const total = room.get(), *const norms = total + s.norms, *const row = total + s.mean;
  for (int64_t i = 0; i < s.mean; ++i) total[i] = sums[i];
  for (int64_t j = 0; j < w.c; ++j) branch_mean[j] = A(sums[s.mean + j] / pixels);
  for (int64_t j = 0; j < 2 * w.c; ++j) norms[j] = __builtin_sqrt(norms[j]);
  for (int64_t head = 0; head < w.heads; ++head) {
    A* const kept = attention + head * (2 * d + 2) * d;
    const double *gram = total + s.gram + head * d * d, *q = norms + head * d, *k = q + w.c;
    softmax_of_gram(gram, q, k, double(w.temperature[head]), d, row, kept);
    for (int64_t i = 0; i < d * d; ++i) kept[d * d + i] = A(gram[i]);
    for (int64_t i = 0; i < d; ++i) {
      kept[2 * d * d + i] = A(q[i]);
      kept[2 * d * d + d + i] = A(k[i]);
    }
  }
}

// Mean and biased variance of the branch over the whole batch, tiles merged in order.
template <class P, class A>
void batch_moments(const Mixer<P>& w, const Sums& s, const Cells& map, int64_t batch, const A* partial, A* mean,
                   A* var) {
  const double pixels = double(map.pixels(0)) * double(batch);
  for (int64_t j = 0; j < w.c; ++j) {
    double average = 0, squares = 0;
    for (int64_t u = 0; u < batch * map.units(); ++u) {
      const Tile tile = map.tile<A>(u % map.units());
      average += double(partial[u * s.count + s.mean + j]) * double(tile.rows * tile.columns);
    }
    average /= pixels;
    for (int64_t u = 0; u < batch * map.units(); ++u) {
      const Tile tile = map.tile<A>(u % map.units());
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

// The second pass. attention and kernels: of each sample and cell; x and y are whole maps (region.h).
template <class T>
void apply(const Tensor& x, const Cuts& rows, const Cuts& columns, const Mixer<Operand<T>>& w,
           const Folded<Operand<T>>& f, const Acc<T>* branch_scale, const Acc<T>* attention, const Acc<T>* kernels,
           const Tensor& y) {
  using A = Acc<T>;
  const int64_t C = w.C, c = w.c, group = smaller(kGroup, w.h > 2 * c ? w.h : 2 * c);
  const Cells cells(rows, columns, x.size[2], x.size[3], [&](int64_t height, int64_t width) {
    return choose_dense<A>(height, width, kMixerHalo, C + c, 6 * c + group);
  });
  const int64_t O = cells.outer_capacity<A>(), I = cells.inner_capacity<A>(), tiles = cells.units();
  parallel_units<A>(x.size[0] * tiles, (C + c) * O + (6 * c + group) * I, [&](int64_t unit, A* scratch) {
    A *normed = scratch, *wide = normed + C * O, *moved = wide + c * O, *conv_in = moved + c * I,
      *mlp_in = conv_in + c * I, *att = mlp_in + c * I, *conv = att + c * I, *mlp = conv + c * I, *hidden = mlp + c * I;
    const Tile tile = cells.tile<A>(unit % tiles);
    const MixerTile at{tile, O, I, dense_pixels<A>(tile), unit / tiles};
    const int64_t cell = at.sample * cells.count() + cells.cell_of(unit % tiles);
    load_normalised<T>(w, x, at, normed);
    copy_dense(normed + c * O, O, tile, 2 * c, conv_in, I);
    center(w, f, I, at.pixels, conv_in);

    attention_inputs(w, at, normed, 2 * c, c, wide, moved);
    attend(w, at, attention + cell * w.heads * (2 * w.d + 2) * w.d, moved, att);

    detail_rows(w, f, at, normed, wide);
    dynamic_rows(w, at, kernels + cell * c * kTaps, wide, moved);
    gated_branch(w, f, at, conv_in, moved, branch_scale[at.sample], hidden, mlp, conv, conv_in);
    project(w.products.proj_out, c, at, conv_in, conv);

    pixel_mlp(w, at, mlp_in, hidden, mlp);
    fuse(w, at, att);
    A* const out = normed;  // no longer needed, and large enough
    project(w.products.project_out, C, at, att, out);
    const T* px = x.as<const T>() + at.sample * x.stride[0];
    add_dense(px, x, tile, C, I, out, y.as<T>() + at.sample * y.stride[0], y, hidden);
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
  const int64_t lines[] = {0, x.size[2]}, columns[] = {0, x.size[3]};
  const Cells map = cells_to_reduce(w, x, {lines, 1}, {columns, 1});
  const Sums s(w);
  {
    Buffer<A> partial(B * map.units() * s.count);
    reduce<T>(x, w, map, s, partial.get());
    parallel_units<double>(B, s.deviation, [&](int64_t b, double* total) {
      merge(s, w.c, map, 0, partial.get() + b * map.units() * s.count, total);
      attention_of(w, s, total, double(map.pixels(0)), attention + b * w.heads * (2 * w.d + 2) * w.d,
                   branch_mean + b * w.c);
    });
    if (options.training) {
      batch_moments(w, s, map, B, partial.get(), mean, var);
    } else {
      load_all(weights.bn_mean, mean);
      load_all(weights.bn_var, var);
    }
  }
  const Folded<Operand<T>> f(w, mean, var);
  generate_kernels(w, f, B, branch_mean, kernels);
  apply<T>(x, {lines, 1}, {columns, 1}, w, f, branch_scale.as<A>(), attention, kernels, y);
}

template <class T>
void run_sums(const Tensor& x, const Cuts& rows, const Cuts& columns, const MixerWeights& weights,
              const MixerOptions& options, double* sums) {
  using A = Acc<T>;
  const Mixer<Operand<T>> w(weights, options);
  const Cells cells = cells_to_reduce(w, x, rows, columns);
  const Sums s(w);
  Buffer<A> partial(x.size[0] * cells.units() * s.count);
  reduce<T>(x, w, cells, s, partial.get());
  parallel_units<double>(x.size[0] * cells.count(), 1, [&](int64_t unit, double*) {
    const int64_t sample = unit / cells.count();
    merge(s, w.c, cells, unit % cells.count(), partial.get() + sample * cells.units() * s.count, sums + unit * s.deviation);
  });
}

// A: the accumulator, which products of the small matrices multiply whatever the maps are stored in.
template <class A>
void run_statistics(const Tensor& sums, const Tensor& pixels, const MixerWeights& weights, const MixerOptions& options,
                    A* attention, A* kernels) {
  const int64_t count = sums.size[0];
  const Mixer<A> w(weights, options);
  const Sums s(w);
  Buffer<A> room((count + 2) * w.c);
  A *const branch_mean = room.get(), *const mean = branch_mean + count * w.c, *const var = mean + w.c;
  parallel_units<A>(count, 1, [&](int64_t i, A*) {
    attention_of(w, s, sums.as<double>() + i * s.deviation, pixels.as<double>()[i],
                 attention + i * w.heads * (2 * w.d + 2) * w.d, branch_mean + i * w.c);
  });
  load_all(weights.bn_mean, mean);
  load_all(weights.bn_var, var);
  generate_kernels(w, Folded<A>(w, mean, var), count, branch_mean, kernels);
}

template <class T>
void run_apply(const Tensor& x, const Cuts& rows, const Cuts& columns, const MixerWeights& weights,
               const MixerOptions& options, const Tensor& attention, const Tensor& kernels, const Tensor& y) {
  using A = Acc<T>;
  const Mixer<Operand<T>> w(weights, options);
  Buffer<A> room(2 * w.c + x.size[0]);
  A *const mean = room.get(), *const var = mean + w.c, *const branch_scale = var + w.c;
  load_all(weights.bn_mean, mean);
  load_all(weights.bn_var, var);
  for (int64_t b = 0; b < x.size[0]; ++b) branch_scale[b] = A(1);
  const Folded<Operand<T>> f(w, mean, var);
  apply<T>(x, rows, columns, w, f, branch_scale, attention.as<A>(), kernels.as<A>(), y);
}

}  // namespace

void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& options,
                 const MixerStatistics& statistics, const Tensor& y) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run<T>(x, weights, branch_scale, options, statistics, y); })
}

void mixer_stage_sums(const Tensor& x, const Cuts& rows, const Cuts& columns, const MixerWeights& weights,
                      const MixerOptions& options, const Tensor& sums) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run_sums<T>(x, rows, columns, weights, options, sums.as<double>()); })
}

void mixer_stage_statistics(const Tensor& sums, const Tensor& pixels, const MixerWeights& weights,
                            const MixerOptions& options, const Tensor& attention, const Tensor& kernels) {
  if (attention.dtype == DType::f64) {
    run_statistics(sums, pixels, weights, options, attention.as<double>(), kernels.as<double>());
  } else {
    run_statistics(sums, pixels, weights, options, attention.as<float>(), kernels.as<float>());
  }
}

void mixer_stage_apply(const Tensor& x, const Cuts& rows, const Cuts& columns, const MixerWeights& weights,
                       const MixerOptions& options, const Tensor& attention, const Tensor& kernels, const Tensor& y) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run_apply<T>(x, rows, columns, weights, options, attention, kernels, y); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
