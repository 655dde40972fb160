// channel_attention_stage on the CPU: argument checks and the choice of instruction set.
#include "kernels.h"
#include "ops/channel_attention_stage/checks.h"

namespace mirage {

void channel_attention_stage(const Tensor& x, const ChannelAttentionWeights& weights, NormKind norm, double eps,
                             const Tensor& attention, const Tensor& y) {
  check_channel_attention_stage(x, weights, attention);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (x.numel() == 0) return;
  if (x.data == y.data) fail("y", "memory other than that of x", "the same");
  using namespace cpu;
  MIRAGE_DISPATCH_PRODUCTS_OF(x.dtype, channel_attention_stage(x, weights, norm, eps, attention, y));
}

void channel_attention_stage_backward(const Tensor& grad_y, const Tensor& x, const ChannelAttentionWeights& weights,
                                      NormKind norm, double eps, const Tensor& attention, const Tensor& grad_x,
                                      const ChannelAttentionGradients& gradients) {
  check_channel_attention_stage(x, weights, attention);
  check_channel_attention_stage_backward(grad_y, x, weights, grad_x, gradients);
  if (x.numel() == 0) return clear_gradients(channel_attention_gradients(weights, gradients));
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype, channel_attention_stage_backward(grad_y, x, weights, norm, eps, attention, grad_x,
                                                                   gradients));
}

}  // namespace mirage
