// The argument checks of channel_layer_norm, for every implementation.
#pragma once

#include <string>
#include <utility>

#include "mirage/tensor.h"

namespace mirage::layer_norm {

inline void check_map(const char* argument, const Tensor& t, const Tensor& x) {
  check_shape(argument, t, {x.size[0], x.size[1], x.size[2], x.size[3]});
}

// y, or its gradient: of the dtype of x, or float32 where weights have widened a 16-bit x.
inline void check_pair(const Tensor& x, const Tensor& y) {
  const bool promoted = y.dtype == DType::f32 && (x.dtype == DType::f16 || x.dtype == DType::bf16);
  if (x.dtype != y.dtype && !promoted) {
    fail("y", std::string(name_of(x.dtype)) + " (or float32 for a 16-bit x)", name_of(y.dtype));
  }
}

inline void check_statistics(const Tensor& x, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  for (auto [name, t] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    check_dense(name, *t, accumulator_of(y.dtype), {x.size[0], x.size[2], x.size[3]});
  }
}

inline void check_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y,
                          const Tensor& mean, const Tensor& rstd) {
  check_ndim("x", x, 4);
  check_dense("weight", weight, {x.size[1]});
  check_dense("bias", bias, {x.size[1]});
  check_map("y", y, x);
  check_contiguous("y", y);
  check_pair(x, y);
  check_statistics(x, y, mean, rstd);
}

inline void check_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                           const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight,
                           const Tensor& grad_bias) {
  check_ndim("x", x, 4);
  check_dense("weight", weight, {x.size[1]});
  check_map("grad_y", grad_y, x);
  check_map("grad_x", grad_x, x);
  check_contiguous("grad_x", grad_x);
  check_dtype("grad_x", grad_x, x.dtype);
  check_dense("grad_weight", grad_weight, {x.size[1]});
  check_dense("grad_bias", grad_bias, {x.size[1]});
  check_pair(x, grad_y);
  check_statistics(x, grad_y, mean, rstd);
}

}  // namespace mirage::layer_norm
