// The fusion of three branches, one row of pixels at a time, forward and backward. The fused attention and
// tri_branch_fusion differ only in where the row of the attention branch comes from and goes to.
#pragma once

#include "common/cpu/vec_math.h"
#include "ops/channel_attention/cpu_core.h"

namespace mirage::cpu::MIRAGE_ISA {

// The scalars that weigh the modulations.
template <class A>
struct Weights {
  A att, conv, mlp;

  Weights(const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp) {
    load_all(l_att, &att);
    load_all(l_conv, &conv);
    load_all(l_mlp, &mlp);
  }
};

template <class T>
MIRAGE_INLINE void store_lanes(T* p, Vec<Acc<T>> v, int64_t n) {
  if (n >= kLanes<Acc<T>>) store(p, v);
  else store_n(p, v, int(n));
}

template <class A>
MIRAGE_INLINE Vec<A> load_lanes(const A* p, int64_t n) {
  return n >= kLanes<A> ? load(p) : load_n(p, int(n));
}

// The gradients of the three scalars are sums over every pixel, which may cancel: a few vectors are added up in the
// accumulator type, the rest in double.
template <class A>
struct ScalarSums {
  static constexpr int kShort = 4;  // vectors
  alignas(64) double lanes[3 * kLanes<A>] = {};

  MIRAGE_INLINE void add(int which, Vec<A> v) {
    A buffer[kLanes<A>];
    store(buffer, v);
    for (int i = 0; i < kLanes<A>; ++i) lanes[which * kLanes<A> + i] += buffer[i];
  }

  void total(double* out) const {
    for (int which = 0; which < 3; ++which) {
      out[which] = 0;
      for (int i = 0; i < kLanes<A>; ++i) out[which] += lanes[which * kLanes<A> + i];
    }
  }
};

// TIn: the branches. TOut: the result.
template <class TIn, class TOut>
class FusionForward {
 public:
  using A = Acc<TIn>;

  FusionForward(const Tensor& conv, const Tensor& mlp, const Weights<A>& weights, const Tensor& out, int64_t tile)
      : conv_(conv), mlp_(mlp), weights_(weights), out_(out), channels_(conv.size[1]), tile_(tile) {}

  int64_t scratch() const { return 2 * tile_; }

  // Pixels [begin, begin + n) of channel c of sample b, given the row a of the attention branch.
  void row(int64_t b, int64_t c, int64_t begin, int64_t n, const A* a, A* scratch) const {
    constexpr int L = kLanes<A>;
    const A* g = conv_.rows(b, c, 1, begin, n, tile_, scratch).data;
    const A* m = mlp_.rows(b, c, 1, begin, n, tile_, scratch + tile_).data;
    TOut *to_a = out_.at(b, c, begin), *to_g = out_.at(b, channels_ + c, begin),
         *to_m = out_.at(b, 2 * channels_ + c, begin);
    for (int64_t p = 0; p < n; p += L) {
      const int64_t left = n - p;
      const Vec<A> va = load_lanes(a + p, left), vg = load_lanes(g + p, left), vm = load_lanes(m + p, left);
      store_lanes(to_a + p, va + weights_.att * vsigmoid<A>(vg + vm), left);
      store_lanes(to_g + p, vg + weights_.conv * vsigmoid<A>(va + vm), left);
      store_lanes(to_m + p, vm + weights_.mlp * vsigmoid<A>(va + vg), left);
    }
  }

 private:
  Source<TIn> conv_, mlp_;
  Weights<A> weights_;
  Sink<TOut> out_;
  int64_t channels_, tile_;
};

template <class TIn, class TOut>
class FusionBackward {
 public:
  using A = Acc<TIn>;

  FusionBackward(const Tensor& grad_out, const Tensor& conv, const Tensor& mlp, const Weights<A>& weights,
                 const Tensor& grad_conv, const Tensor& grad_mlp, int64_t tile)
      : grad_(grad_out), conv_(conv), mlp_(mlp), weights_(weights), grad_conv_(grad_conv), grad_mlp_(grad_mlp),
        channels_(conv.size[1]), tile_(tile) {}

  int64_t scratch() const { return 5 * tile_; }

  // Backward of a row. grad_a receives the gradient of a and may be the row a itself; sums accumulates the gradients of
  // the three scalars.
  template <class T>
  void row(int64_t b, int64_t c, int64_t begin, int64_t n, const A* a, T* grad_a, ScalarSums<A>& sums,
           A* scratch) const {
    constexpr int L = kLanes<A>;
    const A* g = conv_.rows(b, c, 1, begin, n, tile_, scratch).data;
    const A* m = mlp_.rows(b, c, 1, begin, n, tile_, scratch + tile_).data;
    const A* d_a = grad_.rows(b, c, 1, begin, n, tile_, scratch + 2 * tile_).data;
    const A* d_g = grad_.rows(b, channels_ + c, 1, begin, n, tile_, scratch + 3 * tile_).data;
    const A* d_m = grad_.rows(b, 2 * channels_ + c, 1, begin, n, tile_, scratch + 4 * tile_).data;
    TIn *to_g = grad_conv_.at(b, c, begin), *to_m = grad_mlp_.at(b, c, begin);
    Vec<A> sum_a = {}, sum_g = {}, sum_m = {};
    for (int64_t p = 0; p < n; p += L) {
      const int64_t left = n - p;
      const Vec<A> va = load_lanes(a + p, left), vg = load_lanes(g + p, left), vm = load_lanes(m + p, left);
      const Vec<A> da = load_lanes(d_a + p, left), dg = load_lanes(d_g + p, left), dm = load_lanes(d_m + p, left);
      const Vec<A> sa = vsigmoid<A>(vg + vm), sg = vsigmoid<A>(va + vm), sm = vsigmoid<A>(va + vg);
      sum_a += da * sa;
      sum_g += dg * sg;
      sum_m += dm * sm;
      const Vec<A> ta = da * weights_.att * (sa - sa * sa), tg = dg * weights_.conv * (sg - sg * sg),
                   tm = dm * weights_.mlp * (sm - sm * sm);
      store_lanes(grad_a + p, da + tg + tm, left);
      store_lanes(to_g + p, dg + ta + tm, left);
      store_lanes(to_m + p, dm + ta + tg, left);
      if (p / L % ScalarSums<A>::kShort == ScalarSums<A>::kShort - 1 || left <= L) {
        sums.add(0, sum_a);
        sums.add(1, sum_g);
        sums.add(2, sum_m);
        sum_a = sum_g = sum_m = Vec<A>{};
      }
    }
  }

 private:
  Source<TOut> grad_;
  Source<TIn> conv_, mlp_;
  Weights<A> weights_;
  Sink<TIn> grad_conv_, grad_mlp_;
  int64_t channels_, tile_;
};

// Element types of (branches, result): the same, or 16-bit branches whose result 32-bit scalars promote to float.
#define MIRAGE_FOR_FUSION(in, out, call, ...)                      \
  if ((in).dtype == (out).dtype) {                                 \
    MIRAGE_FOR_DTYPE((in).dtype, T, { call<T, T>(__VA_ARGS__); })  \
  } else if ((in).dtype == DType::f16) {                           \
    call<f16, float>(__VA_ARGS__);                                 \
  } else {                                                         \
    call<bf16, float>(__VA_ARGS__);                                \
  }

// Adds up the partial sums of the three scalars' gradients in the order of the units.
inline void add_scalar_gradients(const double* partial, int64_t units, const Tensor& grad_l_att,
                                 const Tensor& grad_l_conv, const Tensor& grad_l_mlp) {
  double total[3] = {};
  for (int64_t u = 0; u < units; ++u) {
    for (int i = 0; i < 3; ++i) total[i] += partial[u * 3 + i];
  }
  store_all(total, grad_l_att);
  store_all(total + 1, grad_l_conv);
  store_all(total + 2, grad_l_mlp);
}

}  // namespace mirage::cpu::MIRAGE_ISA
