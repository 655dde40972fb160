// Argument checks that the operators on three branches and on attention share.
#pragma once

#include <initializer_list>
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

// [B, 3C, H, W], of the dtype of the branches, or float32 for 16-bit ones.
inline void check_concatenated(const char* name, const Tensor& t, const Tensor& branch) {
  check_shape(name, t, {branch.size[0], 3 * branch.size[1], branch.size[2], branch.size[3]});
  const bool promoted = t.dtype == DType::f32 && (branch.dtype == DType::f16 || branch.dtype == DType::bf16);
  if (t.dtype != branch.dtype && !promoted) {
    fail(name, std::string(name_of(branch.dtype)) + " (or float32 for 16-bit branches)", name_of(t.dtype));
  }
}

inline void check_scalars(std::initializer_list<Named> scalars) {
  for (const auto& [name, t] : scalars) check_shape(name, *t, {1});
}

// The matrices that attention over q keeps, whose shape says how many heads there are.
inline void check_attention(const Tensor& q, const Tensor& temperature, const Tensor& matrices) {
  check_ndim("matrices", matrices, 4);
  const int64_t heads = matrices.size[1], d = matrices.size[3];
  if (heads < 1 || heads * d != q.size[1]) {
    fail("matrices", "[B, heads, 2 d + 2, d] with heads * d = " + std::to_string(q.size[1]), shape_of(matrices));
  }
  check_shape("matrices", matrices, {q.size[0], heads, 2 * d + 2, d});
  check_dtype("matrices", matrices, accumulator_of(q.dtype));
  check_contiguous("matrices", matrices);
  check_shape("temperature", temperature, {heads});
}

}  // namespace mirage
