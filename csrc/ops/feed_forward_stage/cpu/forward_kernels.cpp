// A gated half of a block, tile by tile: the tile's normalised input, then the hidden channels a group at a time
// (project_in and GELU, depthwise 3x3 and gate, their share of project_out), all in cache. Lines of hidden channels that the
// tile below reads too are kept for it. With `excite` the gated channels are left in memory instead, and a second pass
// multiplies them by each sample's own project_out.
#include "kernels.h"

#include "common/cpu/ahead.h"
#include "common/cpu/by_sample.h"
#include "common/cpu/carried_lines.h"
#include "common/cpu/in_place.h"
#include "common/cpu/line_sums.h"
#include "excitation.h"
#include "gate.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

using namespace feed_forward_forward;

constexpr int64_t kChunks = 64;      // of all tiles, with sums of their own

// Pairs of hidden channels that are worked on together.
struct Group { int64_t first, count; };

// How many pairs of hidden channels are worked on together: groups of about one size, a multiple of every kMixRows. For each
// project_out adds to what is there, which costs as much as a product of a few channels; but where rows of a convolved group
// are many beside those of the input, they leave so little of the cache that lines are cut in two. What was measured decides,
// by the weights alone: sums have other bits in other groups.
inline int64_t group_of(int64_t channels, int64_t hidden, bool convolves) {
  const bool cuts_lines = convolves && hidden > 64 && channels < 96;
  const int64_t most = hidden <= 36 || cuts_lines ? 24 : 48, groups = (hidden + most - 1) / most;
  return smaller(hidden, round_up((hidden + groups - 1) / groups, 12));
}

template <class T>
class Stage {
 public:
  using A = Acc<T>;
  using P = Operand<T>;

  // x and y are whole maps; of y the pixels of the region are written.
  Stage(const Tensor& x, const Weights<P>& w, const A* scale, const Region& region, const Tensor& y, T* kept)
      : x_(x), w_(w), scale_(scale), region_(region), y_(y), kept_(kept), C_(x.size[1]), hidden_(w.hidden),
        group_(group_of(C_, hidden_, w.convolves)), out_rows_(w.excites ? 0 : C_), strips_(strips_of(w, region, group_)),
        tiling_(w.convolves ? Tiling(strips_) : pointwise_tiling(w, region, group_)), outer_(tiling_.outer_capacity<A>()),
        inner_(w.convolves ? dense_capacity<A>(tiling_) : outer_),
        carried_(w.convolves ? CarriedLines<A>::capacity_of(tiling_) : 0) {}

  int64_t tiles() const { return tiling_.count(); }
  int64_t scratch() const {
    return (C_ + 2 * group_) * outer_ + (group_ + out_rows_) * inner_ + 2 * hidden_ * carried_;
  }

  void run() const {
    if (x_.data == y_.data && w_.convolves) {
      const auto one = [&](int64_t sample, const Tile& tile, bool follows, const Around<T>& around, A* room) {
        add_to_y({tile, sample, follows, around}, {}, room);
      };
      return parallel_tiles_in_place<T>(x_, strips_, scratch(), one);
    }
    parallel_units<A>(x_.size[0] * tiles(), scratch(), [&](WorkUnit unit, A* room) {
      const Place at = placed(unit);
      const bool over_x = x_.data == y_.data;  // whose lines are there when y is written
      add_to_y(at, {next(unit), over_x ? TileLines() : TileLines::of<T>(y_, at.sample, at.tile)}, room);
    });
  }

  // Leaves the gated channels of a tile in `gated` [B, M, H, W], and adds them up in sums [M].
  void leave_gated(WorkUnit unit, const Tensor& gated, A* sums, A* scratch) const {
    const Place at = placed(unit);
    T* const planes = gated.as<T>() + at.sample * gated.stride[0];
    Ahead ahead{next(unit), TileLines::of<T>(gated, at.sample, at.tile)};
    gated_groups(at, ahead, scratch, [&](Group group, A* g) {
      add_line_sums(g, group.count, inner_, at.tile.rows, at.tile.columns, at.tile.columns, sums + group.first);
      for (int64_t i = 0; i < group.count; ++i) {
        T* const to = planes + (group.first + i) * gated.stride[1] + at.tile.row * at.tile.width + at.tile.column;
        for (int64_t r = 0; r < at.tile.rows; ++r) {
          store_row(to + r * at.tile.width, g + i * inner_ + r * at.tile.columns, at.tile.columns);
        }
      }
    });
  }

 private:
  // A tile of a sample, whether the thread's last one was that above, and what is read instead of its halo.
  struct Place {
    Tile tile;
    int64_t sample;
    bool follows;
    Around<T> around;
  };

  // Tiles down strips. No share of project_out has to stay in cache beside the hidden channels where these are left in memory.
  static StripTiling strips_of(const Weights<P>& w, const Region& region, int64_t group) {
    const int64_t inner = group + (w.excites ? 0 : w.channels);
    return StripTiling::choose<A>(region.rows, region.columns, w.channels + 2 * group, inner,
                                  w.excites ? StripTiling::kThreadsOfSums : most_threads());
  }

  // Without a convolution there is no halo to save, nor to carry on.
  static Tiling pointwise_tiling(const Weights<P>& w, const Region& region, int64_t group) {
    return choose_pointwise<A>(region.rows, region.columns, w.channels + 3 * group + (w.excites ? 0 : w.channels));
  }

  // A tile of the region, in the map.
  Place placed(WorkUnit unit) const {
    Tile tile = w_.convolves ? strips_.tile<A>(unit % tiles()) : tiling_.tile<A>(unit % tiles());
    tile.row += region_.row;
    tile.column += region_.column;
    tile.height = x_.size[2];
    tile.width = x_.size[3];
    return {tile, unit / tiles(), w_.convolves && strips_.follows(unit), {}};
  }

  // The pixels of x that the thread most probably reads next.
  TileLines next(int64_t unit) const {
    return TileLines::after<T>(unit, x_, tiles(), w_.convolves, [&](int64_t i) { return placed({i, true}).tile; });
  }

  void add_to_y(const Place& at, Ahead ahead, A* scratch) const {
    const int64_t pixels = w_.convolves ? dense_pixels<A>(at.tile) : at.tile.inner_pixels;
    A *const gated = scratch + (C_ + 2 * group_) * outer_, *const out = gated + group_ * inner_;
    gated_groups(at, ahead, scratch, [&](Group group, A* g) {
      project_out(group, operand_rows<P>(g, group.count, inner_, pixels, g), pixels, out);
    });
    add_dense(x_.as<const T>() + at.sample * x_.stride[0], x_, at.tile, C_, inner_, out,
              y_.as<T>() + at.sample * y_.stride[0], y_, gated, scale_);
  }

  // take(group, gated) for each group of the gated channels of a tile, [count, inner].
  template <class F>
  MIRAGE_INLINE void gated_groups(const Place& at, Ahead& ahead, A* scratch, F take) const {
    A *const normed = scratch, *const h1 = normed + C_ * outer_, *const h2 = h1 + group_ * outer_,
      *const g = h2 + group_ * outer_;
    const CarriedLines<A> carried{g + (group_ + out_rows_) * inner_, carried_};
    const Lines lines = w_.convolves ? Lines::around<A>(at.tile, at.follows) : Lines::all(at.tile);
    const P* const in = normalised(at, lines, normed);
    for (int64_t first = 0; first < hidden_; first += group_) {
      const Group group{first, smaller(group_, hidden_ - first)};
      for (int half = 0; half < 2; ++half) {
        A* const h = half ? h2 : h1;
        const auto project = [&](A* to) { project_in(at, lines, in, group, half, ahead, to); };
        if (w_.convolves) carried.from(half * hidden_ + first).fill(group.count, at.tile, outer_, at.follows, h, project);
        else project(h);
      }
      for (int64_t i = 0; i < group.count; ++i) {
        const A *const a = h1 + i * outer_, *const b = h2 + i * outer_;
        if (w_.convolves) gate_convolved<P>(a, b, w_, first + i, at.tile, g + i * inner_);
        else gate_rows<P>(a, b, w_.gate, at.tile.inner_pixels, g + i * inner_);
      }
      take(group, g);
    }
  }

  // Lines of x, normalised, as the right operand of products: [C, outer].
  const P* normalised(const Place& at, const Lines& lines, A* out) const {
    load_tile(x_.as<const T>() + at.sample * x_.stride[0], x_, lines.tile, C_, outer_, out, at.around);
    normalise_tile(out, C_, outer_, lines.tile, w_.norm_weight.get(), w_.norm_bias.get(), w_.eps, w_.norm);
    return operand_rows<P>(out, C_, outer_, lines.tile.outer_pixels, out);
  }

  // h = activation(project_in(in)) of one half of a group, zero outside the plane.
  MIRAGE_INLINE void project_in(const Place& at, const Lines& lines, const P* in, Group group, int half, Ahead& ahead,
                                A* h) const {
    const int64_t row = group.first + half * hidden_;
    const Matrix<P> matrix = w_.project_in.at(row);
    const A* const bias = w_.with_input_bias ? w_.project_in_bias + row : nullptr;
    const bool gelu = w_.activation == Activation::gelu;
    lines.product(matrix, group.count, C_, in, outer_, at.tile.stride, h, [&](int64_t m, auto& v) {
      if (bias) add_to_each(v, bias[m]);
      if (gelu && !kept_) gelu_between<P>(v);
      ahead.step<A, sizeof(v) / sizeof(v[0])>(2);
    });
    if (!kept_) return;
    keep(at, lines, row, group.count, h);
    for (int64_t m = 0; gelu && m < group.count; ++m) gelu_row(h + m * outer_, whole_vectors<A>(lines.count * at.tile.stride));
  }

  // Stores those lines of h [count, outer] that lie in the plane to the hidden tensor, from its channel `row` on. What the tile
  // above has, it has stored.
  void keep(const Place& at, const Lines& lines, int64_t row, int64_t count, const A* h) const {
    const Tile& tile = at.tile;
    T* const planes = kept_ + (at.sample * 2 * hidden_ + row) * tile.height * tile.width;
    const int64_t first = w_.convolves && tile.row > 0 ? tile.row + 1 : tile.row;
    const int64_t stop = smaller(lines.row + lines.count, tile.height);
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t r = first; r < stop; ++r) {
        T* const to = planes + (m * tile.height + r) * tile.width + tile.column;
        if (m + 1 < count) prefetch_row_to_write(to + tile.height * tile.width, tile.columns);
        store_row(to, h + m * outer_ + (r - lines.row) * tile.stride + tile.halo, tile.columns);
      }
    }
  }

  // out (+)= project_out(gated), for a group.
  MIRAGE_INLINE void project_out(Group group, const P* gated, int64_t pixels, A* out) const {
    const Matrix<P> columns = w_.project_out.at(0, group.first);
    if (group.first > 0 || !w_.with_output_bias) {
      return mix_share(columns, C_, group.count, gated, inner_, pixels, group.first == 0, out);
    }
    mix(columns, C_, group.count, gated, inner_, pixels, [&](int64_t m, int64_t p, Vec<A> v) {
      store(out + m * inner_ + p, v + w_.project_out_bias[m]);
    });
  }

  const Tensor& x_;
  const Weights<P>& w_;
  const A* const scale_;  // what is added to x is multiplied by it; or null
  const Region region_;
  const Tensor& y_;
  T* const kept_;
  const int64_t C_, hidden_, group_, out_rows_;  // out_rows_: of project_out's share that stays beside the hidden channels
  const StripTiling strips_;  // where there is a convolution
  const Tiling tiling_;
  const int64_t outer_, inner_, carried_;
};

template <class T>
void run(const Tensor& x, const FeedForwardWeights& weights, const FeedForwardOptions& options, const Region& region,
         const Tensor& y, T* hidden, const Tensor& scale) {
  using A = Acc<T>;
  using P = Operand<T>;
  const Weights<P> w(weights, options);
  const VectorOrNull<A> scale_of(scale);
  const Stage<T> stage(x, w, scale_of.from(0), region, y, hidden);
  if (!exists(weights.excite)) return stage.run();
  const int64_t B = x.size[0], C = x.size[1], M = w.hidden, plane = x.size[2] * x.size[3];
  Buffer<T> room(M == C ? 0 : B * M * plane);  // else y holds them, until it has its own values
  const Tensor gated{M == C ? y.data : room.get(), x.dtype, 4, {B, M, x.size[2], x.size[3]}, {M * plane, plane, x.size[3], 1}};
  Buffer<double> sums(B * M);
  sum_by_sample<A>(B, stage.tiles(), kChunks, M, stage.scratch(), sums.get(),
                   [&](WorkUnit unit, A* of_tiles, A* scratch) { stage.leave_gated(unit, gated, of_tiles, scratch); });
  const Excitation<A> excitation(weights);
  Buffer<A> means(B * M), scales(B * M), folded(B * C * M);
  excitation.means(B, sums.get(), M, plane, means.get());
  excitation.scales(B, means.get(), scales.get());
  excitation.fold(B, scales.get(), folded.get());
  apply_by_sample<T>(x, OperandMatrix<P>(matrix_of(folded.get(), B * C, M)), gated, w.project_out_bias, y, scale_of.from(0));
}

}  // namespace

void feed_forward_stage(const Tensor& x, const FeedForwardWeights& weights, const FeedForwardOptions& options,
                        const Region& region, const Tensor& y, const Tensor* hidden, const Tensor& scale) {
  MIRAGE_FOR_MAP_DTYPE(x.dtype, T, { run<T>(x, weights, options, region, y, hidden ? hidden->as<T>() : nullptr, scale); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
