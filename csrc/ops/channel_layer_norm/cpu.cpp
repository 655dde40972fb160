// channel_layer_norm on the CPU: argument checks and the choice of instruction set.
#include "mirage/channel_layer_norm.h"

#include "checks.h"
#include "cpu_kernels.h"

namespace mirage {

void channel_layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  layer_norm::check_forward(x, weight, bias, y, mean, rstd);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype, channel_layer_norm_forward(x, weight, bias, eps, y, mean, rstd));
}

void channel_layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                 const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight,
                                 const Tensor& grad_bias) {
  layer_norm::check_backward(grad_y, x, weight, mean, rstd, grad_x, grad_weight, grad_bias);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype, channel_layer_norm_backward(grad_y, x, weight, mean, rstd, grad_x, grad_weight,
                                                              grad_bias));
}

}  // namespace mirage
