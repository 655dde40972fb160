// Argument checks of tri_branch_fusion, for every implementation.
#pragma once

#include <string>

#include "common/tensor_checks.h"

namespace mirage {

// [B, 3C, H, W], of the dtype of the branches, or float32 for 16-bit ones.
inline void check_concatenated(const char* name, const Tensor& t, const Tensor& branch) {
  check_shape(name, t, {branch.size[0], 3 * branch.size[1], branch.size[2], branch.size[3]});
  const bool promoted = t.dtype == DType::f32 && (branch.dtype == DType::f16 || branch.dtype == DType::bf16);
  if (t.dtype != branch.dtype && !promoted) {
    fail(name, std::string(name_of(branch.dtype)) + " (or float32 for 16-bit branches)", name_of(t.dtype));
  }
}

inline void check_tri_branch_fusion(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                                    const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out) {
  check_like("att", att, {{"conv", &conv}, {"mlp", &mlp}});
  check_scalars({{"l_att", &l_att}, {"l_conv", &l_conv}, {"l_mlp", &l_mlp}});
  check_concatenated("out", out, att);
  check_contiguous("out", out);
}

inline void check_tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv,
                                             const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                                             const Tensor& l_mlp, const Tensor& grad_att, const Tensor& grad_conv,
                                             const Tensor& grad_mlp, const Tensor& grad_l_att,
                                             const Tensor& grad_l_conv, const Tensor& grad_l_mlp) {
  check_like("att", att, {{"conv", &conv}, {"mlp", &mlp}});
  check_scalars({{"l_att", &l_att}, {"l_conv", &l_conv}, {"l_mlp", &l_mlp}});
  check_concatenated("grad_out", grad_out, att);
  check_results_like("att", att, {{"grad_att", &grad_att}, {"grad_conv", &grad_conv}, {"grad_mlp", &grad_mlp}});
  check_scalars({{"grad_l_att", &grad_l_att}, {"grad_l_conv", &grad_l_conv}, {"grad_l_mlp", &grad_l_mlp}});
}

}  // namespace mirage
