// From tensors of the caller to what kernels take (pixel_maps.h).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "call_checks.h"
#include "pixel_maps.h"

namespace mirage::cuda {

inline MapView map_of(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2], t.stride[3]}; }

// Whether planes are lines of pixels without gaps, and each group of four is aligned.
inline bool is_packed(const Tensor& t) {
  const int64_t pixels = t.size[2] * t.size[3];
  const auto neighbours = [&](int d, int64_t stride) { return t.size[d] == 1 || t.stride[d] == stride; };
  return pixels % 4 == 0 && neighbours(3, 1) && neighbours(2, t.size[3]) && (t.size[0] == 1 || t.stride[0] % 4 == 0) &&
         (t.size[1] == 1 || t.stride[1] % 4 == 0) &&
         reinterpret_cast<uintptr_t>(t.data) % uint64_t(4 * bytes_of(t.dtype)) == 0;
}

// Of maps with the same planes, results among them. Throws std::invalid_argument where one has more than kernels count.
inline Pixels pixels_of(const char* argument, const Tensor& model, std::initializer_list<const Tensor*> maps) {
  const int64_t count = model.size[2] * model.size[3];
  if (count > INT32_MAX / 2) fail(argument, "at most " + std::to_string(INT32_MAX / 2) + " pixels", shape_of(model));
  bool packed = is_packed(model);
  for (const Tensor* t : maps) packed = packed && is_packed(*t);
  return {int(count), int(model.size[3]), packed};
}

// Calls function(T()) with the storage type of a dtype.
template <class Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::f16: return function(f16());
    case DType::bf16: return function(bf16());
    default: return function(float());
  }
}

}  // namespace mirage::cuda
