// channel_layer_norm on the CPU: argument checks and the choice of instruction set.
#include "mirage/channel_layer_norm.h"

#include "channel_layer_norm_kernels.h"

namespace mirage {
namespace {

void check_pair(const Tensor& x, const Tensor& y) {
  const bool promoted = y.dtype == DType::f32 && (x.dtype == DType::f16 || x.dtype == DType::bf16);
  if (x.dtype != y.dtype && !promoted) {
    fail("y", std::string(name_of(x.dtype)) + " (or float32 for a 16-bit x)", name_of(y.dtype));
  }
}

void check_statistics(const Tensor& x, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  for (auto [name, t] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    check_shape(name, *t, {x.size[0], x.size[2], x.size[3]});
    check_dtype(name, *t, accumulator_of(y.dtype));
    check_contiguous(name, *t);
  }
}

}  // namespace

void channel_layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  check_ndim("x", x, 4);
  check_shape("weight", weight, {x.size[1]});
  check_shape("bias", bias, {x.size[1]});
  check_shape("y", y, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_contiguous("y", y);
  check_pair(x, y);
  check_statistics(x, y, mean, rstd);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(channel_layer_norm_forward(x, weight, bias, eps, y, mean, rstd));
}

void channel_layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                 const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight,
                                 const Tensor& grad_bias) {
  check_ndim("x", x, 4);
  check_shape("weight", weight, {x.size[1]});
  check_shape("grad_y", grad_y, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_shape("grad_x", grad_x, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_contiguous("grad_x", grad_x);
  check_dtype("grad_x", grad_x, x.dtype);
  check_shape("grad_weight", grad_weight, {x.size[1]});
  check_shape("grad_bias", grad_bias, {x.size[1]});
  check_pair(x, grad_y);
  check_statistics(x, grad_y, mean, rstd);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(
      channel_layer_norm_backward(grad_y, x, weight, mean, rstd, grad_x, grad_weight, grad_bias));
}

}  // namespace mirage
