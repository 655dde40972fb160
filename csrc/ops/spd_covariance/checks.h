// The argument checks of spd_covariance, for every implementation.
#pragma once

#include "mirage/tensor.h"

namespace mirage::covariance {

inline void check_common(const Tensor& x, const char* square_name, const Tensor& square, const Tensor& mean) {
  check_ndim("x", x, 4);
  if (x.size[2] * x.size[3] < 2) fail("x", "at least 2 pixels", shape_of(x));
  check_shape(square_name, square, {x.size[0], x.size[1], x.size[1]});
  check_dtype(square_name, square, x.dtype);
  check_shape("mean", mean, {x.size[0], 2, x.size[1]});
  check_dtype("mean", mean, accumulator_of(x.dtype));
  check_contiguous("mean", mean);
}

inline void check_forward(const Tensor& x, const Tensor& y, const Tensor& mean) {
  check_common(x, "y", y, mean);
  check_contiguous("y", y);
}

inline void check_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x) {
  check_common(x, "grad_y", grad_y, mean);
  check_shape("grad_x", grad_x, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("grad_x", grad_x, x.dtype);
  check_contiguous("grad_x", grad_x);
}

}  // namespace mirage::covariance
