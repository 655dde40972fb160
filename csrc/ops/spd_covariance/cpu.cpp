// spd_covariance on the CPU: argument checks and the choice of instruction set.
#include "mirage/spd_covariance.h"

#include "checks.h"
#include "cpu_kernels.h"

namespace mirage {

void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean) {
  covariance::check_forward(x, y, mean);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(spd_covariance_forward(x, eps, y, mean));
}

void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x) {
  covariance::check_backward(grad_y, x, mean, grad_x);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(spd_covariance_backward(grad_y, x, mean, grad_x));
}

}  // namespace mirage
