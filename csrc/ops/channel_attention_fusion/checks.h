// Argument checks of channel_attention_fusion, for every implementation.
#pragma once

#include "ops/channel_attention/checks.h"
#include "ops/tri_branch_fusion/checks.h"

namespace mirage {

// Checks the inputs of forward, which backward takes too.
inline void check_attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                                   const Tensor& conv, const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                                   const Tensor& l_mlp, const Tensor& matrices) {
  check_like("q", q, {{"k", &k}, {"v", &v}, {"conv", &conv}, {"mlp", &mlp}});
  check_attention(q, temperature, matrices);
  check_scalars({{"l_att", &l_att}, {"l_conv", &l_conv}, {"l_mlp", &l_mlp}});
}

inline void check_attention_gradients(const Tensor& grad_out, const Tensor& q, const Tensor& matrices,
                                      const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                      const Tensor& grad_temperature, const Tensor& grad_conv, const Tensor& grad_mlp,
                                      const Tensor& grad_l_att, const Tensor& grad_l_conv, const Tensor& grad_l_mlp) {
  check_concatenated("grad_out", grad_out, q);
  check_results_like("q", q, {{"grad_q", &grad_q}, {"grad_k", &grad_k}, {"grad_v", &grad_v},
                              {"grad_conv", &grad_conv}, {"grad_mlp", &grad_mlp}});
  check_shape("grad_temperature", grad_temperature, {matrices.size[1]});
  check_scalars({{"grad_l_att", &grad_l_att}, {"grad_l_conv", &grad_l_conv}, {"grad_l_mlp", &grad_l_mlp}});
}

}  // namespace mirage
