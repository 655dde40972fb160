// gated_depthwise_ffn on the CPU: argument checks and the choice of instruction set.
#include "mirage/gated_depthwise_ffn.h"

#include "checks.h"
#include "cpu_kernels.h"

namespace mirage {

void gated_depthwise_ffn_forward(const Tensor& h, const Tensor& weight, const Tensor& y) {
  gated::check_forward(h, weight, y);
  if (y.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(h.dtype, gated_depthwise_ffn_forward(h, weight, y));
}

void gated_depthwise_ffn_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
                                  const Tensor& grad_weight) {
  gated::check_backward(grad_y, h, weight, grad_h, grad_weight);
  if (grad_weight.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(h.dtype, gated_depthwise_ffn_backward(grad_y, h, weight, grad_h, grad_weight));
}

}  // namespace mirage
