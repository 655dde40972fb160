// LayerNorm over the channels of a dense tile and its gradient, for the last step of a stage's backward pass.
#pragma once

#include "parallel.h"
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

// Buffers are [channels, stride]; `pixels` of each row are whole vectors, of which `valid` pixels count.
template <class A>
struct NormTile {
  int64_t channels, stride, pixels, valid;
  const A* weight;
  A eps;

  // x becomes (x - mean) / sqrt(var + eps); rstd: [stride].
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
      for (int i = 0; i < kLanes<A>; ++i) square[i] = A(1) / A(__builtin_sqrt(square[i] + eps));
      for (int64_t k = 0; k < channels; ++k) store(at + k * stride, (load(at + k * stride) - mean) * square);
      store(rstd + p, square);
    }
  }

  // sums: of the weight's gradient [channels], then of the bias's. grad: of the norm's output.
  void add_sums(const A* standard, const A* grad, A* sums) const {
    for (int64_t k = 0; k < channels; ++k) {
      Vec<A> weights = {}, biases = {};
      for (int64_t p = 0; p < pixels; p += kLanes<A>) {
        const Vec<A> g = valid - p >= kLanes<A> ? load(grad + k * stride + p)
                                                : load_n(grad + k * stride + p, int(valid - p));
        weights += g * load(standard + k * stride + p);
        biases += g;
      }
      sums[k] += sum<A>(weights);
      sums[channels + k] += sum<A>(biases);
    }
  }

  // out += the gradient of x.
  void add_input_gradient(const A* standard, const A* rstd, const A* grad, A* out) const {
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
};

}  // namespace mirage::cpu::MIRAGE_ISA
