// channel_attention_fusion on a GPU: checks the arguments and launches the kernels.
#include "mirage/cuda/channel_attention_fusion.h"

#include "checks.h"
#include "common/cuda/registry.h"
#include "ops/channel_attention/cuda_apply.h"
#include "ops/channel_attention/cuda_launch.h"
#include "ops/tri_branch_fusion/cuda_launch.h"

namespace mirage::cuda {

namespace {

// Arguments of the fusion. There is no tensor `att`, which the kernels compute on chip.
FusionArguments fusion_of(const Tensor& conv, const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                          const Tensor& l_mlp) {
  FusionArguments f{};
  f.branch[1] = map_of(conv), f.branch[2] = map_of(mlp);
  f.weight[0] = vector_of(l_att), f.weight[1] = vector_of(l_conv), f.weight[2] = vector_of(l_mlp);
  return f;
}

// Calls function(Kind(), T(), O(), HeadChannelTiles<n>()).
template <class Function>
void with_fused_head(DType dtype, DType out, bool tf32, int d, Function function) {
  with_head(dtype, tf32, d, [&](auto kind, auto type, auto channel_tiles) {
    if (dtype == out) function(kind, type, type, channel_tiles);
    else function(kind, type, float(), channel_tiles);
  });
}

}  // namespace

MIRAGE_KERNELS(list) {
  with_every_head([&](auto kind, auto type, auto channel_tiles) {
    using Kind = decltype(kind);
    using T = decltype(type);
    constexpr int kChannelTiles = decltype(channel_tiles)::kChannelTiles;
    const int64_t bytes = sizeof(ApplyTile<kChannelTiles>), backward = sizeof(ApplyBackwardTile<kChannelTiles>);
    list.add<attention_fuse_kernel<Kind, T, T, kChannelTiles>>(kAttentionThreads, bytes);
    list.add<attention_fuse_kernel<Kind, T, float, kChannelTiles>>(kAttentionThreads, bytes);
    list.add<attention_fuse_backward_kernel<Kind, T, T, kChannelTiles>>(kAttentionThreads, backward);
    list.add<attention_fuse_backward_kernel<Kind, T, float, kChannelTiles>>(kAttentionThreads, backward);
  });
}

std::string channel_attention_fusion_problem(const Tensor& q, int64_t heads) { return attention_problem(q, heads); }

int64_t channel_attention_fusion_workspace(const Tensor& q, int64_t heads) {
  check_heads(q, heads);
  return attention_workspace(q, heads).total * int64_t(sizeof(float));
}

void channel_attention_fusion_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                                      const Tensor& conv, const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                                      const Tensor& l_mlp, const Tensor& out, const Tensor& matrices,
                                      const Options& options) {
  check_attention_inputs(q, k, v, temperature, conv, mlp, l_att, l_conv, l_mlp, matrices);
  check_concatenated("out", out, q);
  check_contiguous("out", out);
  check_attention_problem("channel_attention_fusion", q, matrices);
  if (q.numel() == 0) return;
  AttentionArguments p = attention_arguments(q, k, v, temperature, matrices, options);
  attention_matrices(q, k, p, options);
  FusionArguments f = fusion_of(conv, mlp, l_att, l_conv, l_mlp);
  p.pixels = pixels_of("v", v, {&conv, &mlp, &out}), p.parts = attention_runs(q), f.out = out.data;
  with_fused_head(q.dtype, out.dtype, options.tf32, p.d, [&](auto kind, auto type, auto of_out, auto channel_tiles) {
    constexpr int kChannelTiles = decltype(channel_tiles)::kChannelTiles;
    launch("attention_fuse_kernel",
           attention_fuse_kernel<decltype(kind), decltype(type), decltype(of_out), kChannelTiles>,
           attention_grid(p, sizeof(ApplyTile<kChannelTiles>)), options.stream, p, f);
  });
}

void channel_attention_fusion_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& temperature, const Tensor& conv, const Tensor& mlp,
                                       const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                       const Tensor& matrices, const Tensor& grad_q, const Tensor& grad_k,
                                       const Tensor& grad_v, const Tensor& grad_temperature, const Tensor& grad_conv,
                                       const Tensor& grad_mlp, const Tensor& grad_l_att, const Tensor& grad_l_conv,
                                       const Tensor& grad_l_mlp, const Options& options) {
  check_attention_inputs(q, k, v, temperature, conv, mlp, l_att, l_conv, l_mlp, matrices);
  check_attention_gradients(grad_out, q, matrices, grad_q, grad_k, grad_v, grad_temperature, grad_conv, grad_mlp,
                            grad_l_att, grad_l_conv, grad_l_mlp);
  check_attention_problem("channel_attention_fusion", q, matrices);
  AttentionArguments p = attention_arguments(q, k, v, temperature, matrices, options);
  FusionArguments f = fusion_of(conv, mlp, l_att, l_conv, l_mlp);
  f.grad_out = map_of(grad_out), f.grad_branch[1] = grad_conv.data, f.grad_branch[2] = grad_mlp.data;
  f.partial = static_cast<float*>(options.workspace) + attention_workspace(q, p.heads).weights;
  p.grad_v = grad_v.data;
  if (q.numel() > 0) {
    p.pixels = pixels_of("v", v, {&conv, &mlp, &grad_out, &grad_v, &grad_conv, &grad_mlp});
    with_fused_head(
        q.dtype, grad_out.dtype, options.tf32, p.d, [&](auto kind, auto type, auto of_out, auto channel_tiles) {
          constexpr int kChannelTiles = decltype(channel_tiles)::kChannelTiles;
          launch("attention_fuse_backward_kernel",
                 attention_fuse_backward_kernel<decltype(kind), decltype(type), decltype(of_out), kChannelTiles>,
                 attention_grid(p, sizeof(ApplyBackwardTile<kChannelTiles>)), options.stream, p, f);
        });
  }
  const AnyVector grads[3] = {vector_of(grad_l_att), vector_of(grad_l_conv), vector_of(grad_l_mlp)};
  const int64_t parts = q.numel() > 0 ? int64_t(p.batch) * p.heads * p.parts : 0;
  sum_fusion_weights(f.partial, parts, grads, options.stream);
  attention_matrices_backward(q, k, grad_q, grad_k, grad_temperature, p, options);
}

}  // namespace mirage::cuda
