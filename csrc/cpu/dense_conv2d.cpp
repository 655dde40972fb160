// dense_conv2d on the CPU: argument checks and the choice of instruction set.
#include "mirage/dense_conv2d.h"

#include <cstring>

#include "dense_conv2d_kernels.h"

namespace mirage {
namespace {

void check_inputs(const Tensor& x, const Tensor& weight) {
  check_ndim("x", x, 4);
  check_ndim("weight", weight, 3);
  if (weight.size[2] != 1 && weight.size[2] != 9) fail("weight", "1 or 9 taps", shape_of(weight));
  check_dense("weight", weight, {weight.size[0], x.size[1], weight.size[2]});
}

}  // namespace

void dense_conv2d(const Tensor& x, const Tensor& weight, const Tensor& y) {
  check_inputs(x, weight);
  check_dense("y", y, x.dtype, {x.size[0], weight.size[0], x.size[2], x.size[3]});
  if (y.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(dense_conv2d(x, weight, y));
}

void dense_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                           const Tensor& grad_weight) {
  check_inputs(x, weight);
  const DType acc = accumulator_of(x.dtype);
  check_shape("grad_y", grad_y, {x.size[0], weight.size[0], x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
  check_dense("grad_x", grad_x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dense("grad_weight", grad_weight, acc, {weight.size[0], weight.size[1], weight.size[2]});
  if (grad_y.numel() == 0) {
    if (x.numel()) std::memset(grad_x.data, 0, size_t(x.numel() * bytes_of(x.dtype)));
    if (grad_weight.numel()) std::memset(grad_weight.data, 0, size_t(grad_weight.numel() * bytes_of(acc)));
    return;
  }
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(dense_conv2d_backward(grad_y, x, weight, grad_x, grad_weight));
}

}  // namespace mirage
