// dynamic_depthwise_conv2d on the CPU: argument checks and the choice of instruction set.
#include "mirage/dynamic_depthwise_conv2d.h"

#include "checks.h"
#include "cpu_kernels.h"

namespace mirage {

void dynamic_depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const Tensor& y) {
  depthwise::check_inputs(x, weight);
  depthwise::check_output("y", y, x);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(dynamic_depthwise_conv2d_forward(x, weight, y));
}

void dynamic_depthwise_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& grad_x, const Tensor& grad_weight) {
  depthwise::check_inputs(x, weight);
  depthwise::check_like("grad_y", grad_y, x);
  depthwise::check_optional_output("grad_x", grad_x, x);
  depthwise::check_optional_output("grad_weight", grad_weight, weight);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(dynamic_depthwise_conv2d_backward(grad_y, x, weight, grad_x, grad_weight));
}

}  // namespace mirage
