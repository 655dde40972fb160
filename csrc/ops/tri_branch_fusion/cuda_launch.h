// Host code that the operators with a fusion of branches share.
#pragma once

#include "checks.h"
#include "common/cuda/tensor_views.h"
#include "cuda_kernels.h"

namespace mirage::cuda {

// Adds up [count, 3] partial sums, into three gradients of one element each.
void sum_fusion_weights(const float* partial, int64_t count, const AnyVector (&grad_weight)[3], void* stream);

// Calls function(T(), O()) with the dtypes of the branches and of their concatenation.
template <class Function>
void with_fusion_types(DType branches, DType out, Function function) {
  with_type(branches, [&](auto type) {
    if (branches == out) function(type, type);
    else function(type, float());
  });
}

}  // namespace mirage::cuda
