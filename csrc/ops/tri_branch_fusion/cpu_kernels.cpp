// Kernels of tri_branch_fusion: rows of pixels, each read once and written once.
#include "cpu_kernels.h"

#include "cpu_rows.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

// Units of work: (sample, group of channels, run of pixels), about kElements elements of each branch.
constexpr int64_t kElements = 8192, kTile = 512;

struct PlaneWork {
  int64_t channels, pixels, unit, units, group, groups, all;

  explicit PlaneWork(const Tensor& x) : channels(x.size[1]), pixels(x.size[2] * x.size[3]) {
    unit = pixels < kElements ? round_up(pixels, kTile) : kElements;
    units = unit ? (pixels + unit - 1) / unit : 0;
    group = unit ? kElements / unit : 1;
    groups = (channels + group - 1) / group;
    all = x.size[0] * groups * units;
  }

  // Calls f(sample, channel, begin, n) for every tile of the unit.
  template <class F>
  MIRAGE_INLINE void tiles(int64_t index, F f) const {
    const int64_t first = index % units * unit, sample = index / units / groups;
    const int64_t c0 = index / units % groups * group;
    const int64_t c1 = c0 + group < channels ? c0 + group : channels;
    const int64_t last = first + unit < pixels ? first + unit : pixels;
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t p = first; p < last; p += kTile) f(sample, c, p, last - p < kTile ? last - p : kTile);
    }
  }
};

template <class TIn, class TOut>
void forward(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
             const Tensor& l_mlp, const Tensor& out) {
  using A = Acc<TIn>;
  const PlaneWork w(att);
  const Source<TIn> source(att);
  const FusionForward<TIn, TOut> fusion(conv, mlp, Weights<A>(l_att, l_conv, l_mlp), out, kTile);
  parallel_units<A>(w.all, kTile + fusion.scratch(), [&](int64_t unit, A* scratch) {
    w.tiles(unit, [&](int64_t b, int64_t c, int64_t p, int64_t n) {
      fusion.row(b, c, p, n, source.rows(b, c, 1, p, n, kTile, scratch).data, scratch + kTile);
    });
  });
}

template <class TIn, class TOut>
void backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
              const Tensor& l_conv, const Tensor& l_mlp, const Tensor& grad_att, const Tensor& grad_conv,
              const Tensor& grad_mlp, const Tensor& grad_l_att, const Tensor& grad_l_conv, const Tensor& grad_l_mlp) {
  using A = Acc<TIn>;
  const PlaneWork w(att);
  const Source<TIn> source(att);
  const Sink<TIn> to(grad_att);
  const FusionBackward<TIn, TOut> fusion(grad_out, conv, mlp, Weights<A>(l_att, l_conv, l_mlp), grad_conv, grad_mlp,
                                         kTile);
  Buffer<double> partial(w.all * 3);
  parallel_units<A>(w.all, kTile + fusion.scratch(), [&](int64_t unit, A* row) {
    A* rest = row + kTile;
    ScalarSums<A> sums;
    w.tiles(unit, [&](int64_t b, int64_t c, int64_t p, int64_t n) {
      fusion.row(b, c, p, n, source.rows(b, c, 1, p, n, kTile, row).data, to.at(b, c, p), sums, rest);
    });
    sums.total(partial.get() + unit * 3);
  });
  add_scalar_gradients(partial.get(), w.all, grad_l_att, grad_l_conv, grad_l_mlp);
}

}  // namespace

void tri_branch_fusion_forward(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                               const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out) {
  MIRAGE_FOR_FUSION(att, out, forward, att, conv, mlp, l_att, l_conv, l_mlp, out)
}

void tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv, const Tensor& mlp,
                                const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                const Tensor& grad_att, const Tensor& grad_conv, const Tensor& grad_mlp,
                                const Tensor& grad_l_att, const Tensor& grad_l_conv, const Tensor& grad_l_mlp) {
  MIRAGE_FOR_FUSION(att, grad_out, backward, grad_out, att, conv, mlp, l_att, l_conv, l_mlp, grad_att, grad_conv,
                    grad_mlp, grad_l_att, grad_l_conv, grad_l_mlp)
}

}  // namespace mirage::cpu::MIRAGE_ISA
