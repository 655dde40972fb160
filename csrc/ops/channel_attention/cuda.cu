// channel_attention on a GPU: checks the arguments and launches the kernels.
#include "mirage/cuda/channel_attention.h"

#include "common/cuda/registry.h"
#include "cuda_apply.h"
#include "cuda_launch.h"

namespace mirage::cuda {

MIRAGE_KERNELS(list) {
  with_every_head([&](auto kind, auto type, auto channel_tiles) {
    using Kind = decltype(kind);
    using T = decltype(type);
    constexpr int kChannelTiles = decltype(channel_tiles)::kChannelTiles;
    list.add<attention_apply_kernel<Kind, T, kChannelTiles>>(kAttentionThreads, sizeof(ApplyTile<kChannelTiles>));
    list.add<attention_apply_backward_kernel<Kind, T, kChannelTiles>>(kAttentionThreads,
                                                                      sizeof(ApplyBackwardTile<kChannelTiles>));
  });
}

std::string channel_attention_problem(const Tensor& q, int64_t heads) { return attention_problem(q, heads); }

int64_t channel_attention_workspace(const Tensor& q, int64_t heads) {
  check_heads(q, heads);
  return attention_workspace(q, heads).total * int64_t(sizeof(float));
}

void channel_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                               const Tensor& out, const Tensor& matrices, const Options& options) {
  check_channel_attention(q, k, v, temperature, out, matrices);
  check_attention_problem("channel_attention", q, matrices);
  if (q.numel() == 0) return;
  AttentionArguments p = attention_arguments(q, k, v, temperature, matrices, options);
  attention_matrices(q, k, p, options);
  p.pixels = pixels_of("v", v, {&out}), p.parts = attention_runs(q), p.out = out.data;
  with_head(q.dtype, options.tf32, p.d, [&](auto kind, auto type, auto channel_tiles) {
    constexpr int kChannelTiles = decltype(channel_tiles)::kChannelTiles;
    launch("attention_apply_kernel", attention_apply_kernel<decltype(kind), decltype(type), kChannelTiles>,
           attention_grid(p, sizeof(ApplyTile<kChannelTiles>)), options.stream, p);
  });
}

void channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& temperature, const Tensor& matrices, const Tensor& grad_q,
                                const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_temperature,
                                const Options& options) {
  check_channel_attention_backward(grad_out, q, k, v, temperature, matrices, grad_q, grad_k, grad_v, grad_temperature);
  check_attention_problem("channel_attention", q, matrices);
  AttentionArguments p = attention_arguments(q, k, v, temperature, matrices, options);
  p.grad_out = map_of(grad_out), p.grad_v = grad_v.data;
  if (q.numel() > 0) {
    p.pixels = pixels_of("v", v, {&grad_out, &grad_v});
    with_head(q.dtype, options.tf32, p.d, [&](auto kind, auto type, auto channel_tiles) {
      constexpr int kChannelTiles = decltype(channel_tiles)::kChannelTiles;
      launch("attention_apply_backward_kernel",
             attention_apply_backward_kernel<decltype(kind), decltype(type), kChannelTiles>,
             attention_grid(p, sizeof(ApplyBackwardTile<kChannelTiles>)), options.stream, p);
    });
  }
  attention_matrices_backward(q, k, grad_q, grad_k, grad_temperature, p, options);
}

}  // namespace mirage::cuda
