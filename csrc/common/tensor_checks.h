// Argument checks of several tensors at once, for every implementation.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include "mirage/tensor.h"

namespace mirage {

using Named = std::pair<const char*, const Tensor*>;

// Inputs of the shape and dtype of `first`, any strides.
inline void check_like(const char* name, const Tensor& first, std::initializer_list<Named> others) {
  check_ndim(name, first, 4);
  for (const auto& [other, t] : others) {
    check_shape(other, *t, {first.size[0], first.size[1], first.size[2], first.size[3]});
    check_dtype(other, *t, first.dtype);
  }
}

// The same for results, which are contiguous.
inline void check_results_like(const char* name, const Tensor& first, std::initializer_list<Named> results) {
  check_like(name, first, results);
  for (const auto& [result, t] : results) check_contiguous(result, *t);
}

inline void check_scalars(std::initializer_list<Named> scalars) {
  for (const auto& [name, t] : scalars) check_shape(name, *t, {1});
}

}  // namespace mirage
