// spd_covariance on the CPU: argument checks and the choice of instruction set.
#include "mirage/spd_covariance.h"

#include "spd_covariance_kernels.h"

namespace mirage {
namespace {

void check_common(const Tensor& x, const char* square_name, const Tensor& square, const Tensor& mean) {
  check_ndim("x", x, 4);
  if (x.size[2] * x.size[3] < 2) fail("x", "at least 2 pixels", shape_of(x));
  check_shape(square_name, square, {x.size[0], x.size[1], x.size[1]});
  check_dtype(square_name, square, x.dtype);
  check_shape("mean", mean, {x.size[0], 2, x.size[1]});
  check_dtype("mean", mean, accumulator_of(x.dtype));
  check_contiguous("mean", mean);
}

}  // namespace

void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean) {
  check_common(x, "y", y, mean);
  check_contiguous("y", y);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(spd_covariance_forward(x, eps, y, mean));
}

void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x) {
  check_common(x, "grad_y", grad_y, mean);
  check_shape("grad_x", grad_x, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("grad_x", grad_x, x.dtype);
  check_contiguous("grad_x", grad_x);
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(spd_covariance_backward(grad_y, x, mean, grad_x));
}

}  // namespace mirage
