// dynamic_depthwise_conv2d on the CPU: argument checks and the choice of instruction set.
#include "mirage/dynamic_depthwise_conv2d.h"

#include "dynamic_depthwise_conv2d_kernels.h"

namespace mirage {
namespace {

void check_like(const char* argument, const Tensor& t, const Tensor& model) {
  check_shape(argument, t, {model.size[0], model.size[1], model.size[2], model.size[3]});
  check_dtype(argument, t, model.dtype);
}

void check_output(const char* argument, const Tensor& t, const Tensor& model) {
  check_like(argument, t, model);
  if (t.numel() > 0) check_contiguous(argument, t);
}

void check_inputs(const Tensor& x, const Tensor& weight) {
  check_ndim("x", x, 4);
  check_ndim("weight", weight, 4);
  const int64_t k = weight.size[2];
  if (k < 3 || k > 11 || k % 2 == 0) fail("weight", "a kernel size of 3, 5, 7, 9 or 11", std::to_string(k));
  check_shape("weight", weight, {x.size[0], x.size[1], k, k});
  check_dtype("weight", weight, x.dtype);
}

// An output that the caller may decline by passing a tensor of shape [0].
void check_optional_output(const char* argument, const Tensor& t, const Tensor& model) {
  if (t.ndim == 1 && t.size[0] == 0) return;
  check_output(argument, t, model);
}

}  // namespace

void dynamic_depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const Tensor& y) {
  check_inputs(x, weight);
  check_output("y", y, x);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(dynamic_depthwise_conv2d_forward(x, weight, y));
}

void dynamic_depthwise_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& grad_x, const Tensor& grad_weight) {
  check_inputs(x, weight);
  check_like("grad_y", grad_y, x);
  check_optional_output("grad_x", grad_x, x);
  check_optional_output("grad_weight", grad_weight, weight);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(dynamic_depthwise_conv2d_backward(grad_y, x, weight, grad_x, grad_weight));
}

}  // namespace mirage
