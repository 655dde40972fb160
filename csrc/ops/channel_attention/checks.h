// Argument checks of channel_attention, for every implementation.
#pragma once

#include <string>

#include "common/tensor_checks.h"

namespace mirage {

// The matrices that attention over q keeps, whose shape says how many heads there are.
inline void check_attention(const Tensor& q, const Tensor& temperature, const Tensor& matrices) {
  check_ndim("matrices", matrices, 4);
  const int64_t heads = matrices.size[1], d = matrices.size[3];
  if (heads < 1 || heads * d != q.size[1]) {
    fail("matrices", "[B, heads, 2 d + 2, d] with heads * d = " + std::to_string(q.size[1]), shape_of(matrices));
  }
  check_shape("matrices", matrices, {q.size[0], heads, 2 * d + 2, d});
  check_dtype("matrices", matrices, accumulator_of(q.dtype));
  check_contiguous("matrices", matrices);
  check_shape("temperature", temperature, {heads});
}

inline void check_channel_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                                    const Tensor& out, const Tensor& matrices) {
  check_like("q", q, {{"k", &k}, {"v", &v}});
  check_results_like("q", q, {{"out", &out}});
  check_attention(q, temperature, matrices);
}

inline void check_channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& temperature, const Tensor& matrices, const Tensor& grad_q,
                                             const Tensor& grad_k, const Tensor& grad_v,
                                             const Tensor& grad_temperature) {
  check_like("q", q, {{"k", &k}, {"v", &v}, {"grad_out", &grad_out}});
  check_results_like("q", q, {{"grad_q", &grad_q}, {"grad_k", &grad_k}, {"grad_v", &grad_v}});
  check_attention(q, temperature, matrices);
  check_shape("grad_temperature", grad_temperature, {matrices.size[1]});
}

}  // namespace mirage
