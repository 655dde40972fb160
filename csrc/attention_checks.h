// Argument checks that the operators on three branches and on attention share.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include "mirage/tensor.h"

namespace mirage {

using Named = std::pair<const char*, const Tensor*>;

// Inputs of the shape and dtype of `first`, any strides.
inline void check_like(const char* name, const Tensor& first, std::initializer_list<Named> others) {
  check_ndim(name, first, 4);
  for (const auto& [other, t] : others) {
    check_shape(other, *t, {first.size[0], first.size[1], first.size[2], first.size[3]});
    check_dtype(other, *t, first.dtype);
  }
}

// The same for results, which are contiguous.
inline void check_results_like(const char* name, const Tensor& first, std::initializer_list<Named> results) {
  check_like(name, first, results);
  for (const auto& [result, t] : results) check_contiguous(result, *t);
}

// [B, 3C, H, W], of the dtype of the branches, or float32 for 16-bit ones.
inline void check_concatenated(const char* name, const Tensor& t, const Tensor& branch) {
  check_shape(name, t, {branch.size[0], 3 * branch.size[1], branch.size[2], branch.size[3]});
  const bool promoted = t.dtype == DType::f32 && (branch.dtype == DType::f16 || branch.dtype == DType::bf16);
  if (t.dtype != branch.dtype && !promoted) {
    fail(name, std::string(name_of(branch.dtype)) + " (or float32 for 16-bit branches)", name_of(t.dtype));
  }
}

inline void check_scalars(std::initializer_list<Named> scalars) {
  for (const auto& [name, t] : scalars) check_shape(name, *t, {1});
}

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

// ---- operators whole, for every implementation ----------------------------------------------------------------------

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

// Of channel_attention_fusion, what forward and backward take.
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
