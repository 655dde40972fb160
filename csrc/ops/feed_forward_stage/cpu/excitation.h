// Squeeze and excitation without activations: what gated channels are multiplied by is a product with their means. It is
// folded into project_out, a matrix for each sample.
#pragma once

#include "common/cpu/dtypes.h"
#include "common/cpu/layer_norm_tile.h"
#include "common/cpu/parallel.h"
#include "mirage/feed_forward_stage.h"

namespace mirage::cpu::MIRAGE_ISA {

template <class A>
class Excitation {
 public:
  explicit Excitation(const FeedForwardWeights& w)
      : C_(w.project_out.size[0]), M_(w.project_out.size[1]), matrix_(w.excite), bias_(w.excite_bias, M_),
        project_out_(w.project_out) {}

  // means [samples, M] of sums over planes, `stride` apart.
  void means(int64_t samples, const double* sums, int64_t stride, int64_t plane, A* out) const {
    for (int64_t b = 0; b < samples; ++b) {
      for (int64_t j = 0; j < M_; ++j) out[b * M_ + j] = A(sums[b * stride + j] / double(plane));
    }
  }

  // scales [samples, M] of the gated channels.
  void scales(int64_t samples, const A* means, A* out) const {
    parallel_units<A>(samples * M_, 0, [&](int64_t unit, A*) {
      const int64_t j = unit % M_;
      out[unit] = dot(matrix_ + j * M_, means + (unit - j), M_) + bias_.get()[j];
    });
  }

  // project_out with its columns scaled: [samples, C, M].
  void fold(int64_t samples, const A* scales, A* out) const {
    parallel_units<A>(samples * C_, 0, [&](int64_t unit, A*) {
      const A *const row = project_out_ + unit % C_ * M_, *const scale = scales + unit / C_ * M_;
      for (int64_t j = 0; j < M_; ++j) out[unit * M_ + j] = row[j] * scale[j];
    });
  }

  // What the gradients of the scales add to each pixel's gradient of a gated channel, [samples, M].
  void means_gradient(int64_t samples, const double* of_scales, int64_t plane, A* out) const {
    Buffer<double> totals(samples * M_);
    for (int64_t i = 0; i < samples * M_; ++i) totals[i] = 0;
    for (int64_t b = 0; b < samples; ++b) {
      for (int64_t j = 0; j < M_; ++j) {
        for (int64_t i = 0; i < M_; ++i) totals[b * M_ + i] += double(matrix_[j * M_ + i]) * of_scales[b * M_ + j];
      }
    }
    for (int64_t i = 0; i < samples * M_; ++i) out[i] = A(totals[i] / double(plane));
  }

 private:
  const int64_t C_, M_;
  const InAccumulator<A> matrix_;
  const VectorOrZeros<A> bias_;
  const InAccumulator<A> project_out_;
};

}  // namespace mirage::cpu::MIRAGE_ISA
