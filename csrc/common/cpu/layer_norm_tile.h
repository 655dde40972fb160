// A norm over the channels of a dense tile and its gradient, for the last step of a stage's backward pass.
#pragma once

#include "dtypes.h"
#include "mirage/norm.h"
#include "mirage/stage_weights.h"
#include "parallel.h"
#include "run_sums.h"
#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {

// A mean that was summed in one go is off by some of its last bits, which is a good part of the deviation where that is
// small beside the mean. From the averages of the deviations and of their squares: corrects the mean, and returns the
// variance around it.
template <class A>
MIRAGE_INLINE Vec<A> correct_mean(Vec<A>& mean, Vec<A> deviation, Vec<A> square) {
  mean += deviation;
  const Vec<A> variance = square - deviation * deviation;
  return select<A>(variance >= A(0), variance, square);  // rounding, or infinite squares
}

// A vector in the accumulator type; `n` zeros where it is absent. A norm with an absent bias adds them.
template <class A>
class VectorOrZeros {
 public:
  VectorOrZeros(const Tensor& t, int64_t n)
      : zeros_(exists(t) ? 0 : n), values_(exists(t) ? t : Tensor{zeros_.get(), kDTypeOf<A>, 1, {n}, {1}}) {
    if (exists(t)) return;
    for (int64_t i = 0; i < n; ++i) zeros_[i] = A(0);
  }
  MIRAGE_INLINE operator const A*() const { return values_.get(); }
  MIRAGE_INLINE const A* get() const { return values_.get(); }

 private:
  Buffer<A> zeros_;
  InAccumulator<A> values_;
};

// Buffers are [channels, stride]; `pixels` of each row are whole vectors, of which `valid` pixels count.
template <class A>
struct NormTile {
  int64_t channels, stride, pixels, valid;
  const A* weight;
  A eps;
  NormKind kind = NormKind::centred;

  // x becomes (x - mean) / sqrt(var + eps), or x / sqrt(var + eps) of an uncentred norm; rstd: [stride].
  void standardise(A* x, A* rstd) const {
    const A inverse = A(1) / A(channels);
    for (int64_t p = 0; p < pixels; p += kLanes<A>) {
      A* const at = x + p;
      Vec<A> mean = {}, rest = {}, square = {};
      for (int64_t k = 0; k < channels; ++k) mean += load(at + k * stride);
      mean *= inverse;
      for (int64_t k = 0; k < channels; ++k) {
        const Vec<A> e = load(at + k * stride) - mean;
        rest += e;
        square += e * e;
      }
      square = correct_mean<A>(mean, rest * inverse, square * inverse);
      if (kind == NormKind::uncentred) mean = Vec<A>{};
      for (int i = 0; i < kLanes<A>; ++i) square[i] = A(1) / A(__builtin_sqrt(square[i] + eps));
      for (int64_t k = 0; k < channels; ++k) store(at + k * stride, (load(at + k * stride) - mean) * square);
      store(rstd + p, square);
    }
  }

  // sums: of the weight's gradient [channels], then of the bias's. grad: of the norm's output.
  void add_sums(const A* standard, const A* grad, A* sums) const {
    for (int64_t k = 0; k < channels; ++k) {
      const A *const of_output = grad + k * stride, *const normal = standard + k * stride;
      add_in_runs<2, A>(pixels, {sums + k, sums + channels + k}, [&](int64_t p, Vec<A>* lanes) {
        const Vec<A> g = valid - p >= kLanes<A> ? load(of_output + p) : load_n(of_output + p, int(valid - p));
        lanes[0] += g * load(normal + p);
        lanes[1] += g;
      });
    }
  }

  // out += the gradient of x.
  void add_input_gradient(const A* standard, const A* rstd, const A* grad, A* out) const {
    if (kind == NormKind::uncentred) return add_uncentred_gradient(standard, rstd, grad, out);
    const A inverse = A(1) / A(channels);
    for (int64_t p = 0; p < pixels; p += kLanes<A>) {
      Vec<A> mean = {}, along = {};
      for (int64_t k = 0; k < channels; ++k) {
        const Vec<A> g = load(grad + k * stride + p) * weight[k];
        mean += g;
        along += g * load(standard + k * stride + p);
      }
      mean *= inverse;
      along *= inverse;
      const Vec<A> scale = load(rstd + p);
      for (int64_t k = 0; k < channels; ++k) {
        const Vec<A> g = load(grad + k * stride + p) * weight[k] - mean - load(standard + k * stride + p) * along;
        store(out + k * stride + p, load(out + k * stride + p) + scale * g);
      }
    }
  }

 private:
  // Only the deviation depends on the mean, so that it is what is standard that has to be centred.
  void add_uncentred_gradient(const A* standard, const A* rstd, const A* grad, A* out) const {
    const A inverse = A(1) / A(channels);
    for (int64_t p = 0; p < pixels; p += kLanes<A>) {
      Vec<A> mean = {}, rest = {}, along = {};
      for (int64_t k = 0; k < channels; ++k) {
        const Vec<A> n = load(standard + k * stride + p);
        mean += n;
        along += load(grad + k * stride + p) * weight[k] * n;
      }
      mean *= inverse;
      along *= inverse;
      for (int64_t k = 0; k < channels; ++k) rest += load(standard + k * stride + p) - mean;
      mean += rest * inverse;
      const Vec<A> scale = load(rstd + p);
      for (int64_t k = 0; k < channels; ++k) {
        const Vec<A> n = load(standard + k * stride + p) - mean;
        const Vec<A> g = load(grad + k * stride + p) * weight[k] - n * along;
        store(out + k * stride + p, load(out + k * stride + p) + scale * g);
      }
    }
  }
};

}  // namespace mirage::cpu::MIRAGE_ISA
