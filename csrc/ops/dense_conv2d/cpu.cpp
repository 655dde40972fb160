// dense_conv2d on the CPU: argument checks and the choice of instruction set.
#include "mirage/dense_conv2d.h"

#include <cstring>

#include "checks.h"
#include "cpu_kernels.h"

namespace mirage {

void dense_conv2d(const Tensor& x, const Tensor& weight, const Tensor& y) {
  dense_conv::check_forward(x, weight, y);
  if (y.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_PRODUCTS_OF(x.dtype, dense_conv2d(x, weight, y));
}

void dense_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                           const Tensor& grad_weight) {
  dense_conv::check_backward(grad_y, x, weight, grad_x, grad_weight);
  if (grad_y.numel() == 0) {
    for (const Tensor* t : {&grad_x, &grad_weight}) {
      if (t->numel()) std::memset(t->data, 0, size_t(t->numel() * bytes_of(t->dtype)));
    }
    return;
  }
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype, dense_conv2d_backward(grad_y, x, weight, grad_x, grad_weight));
}

}  // namespace mirage
