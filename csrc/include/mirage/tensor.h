// A non-owning view of a dense, strided tensor: everything the library knows of its caller's memory.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mirage {

enum class DType : int { f32, f64, f16, bf16 };

constexpr int kMaxDims = 5;

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
  }
  return "unknown";
}

inline int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    default: return 2;
  }
}

// Sizes and strides count elements. Strides are never negative; a stride of 0 repeats an element (inputs only).
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= size[d];
    return n;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (size[d] != 1 && stride[d] != expected) return false;
      expected *= size[d];
    }
    return true;
  }

  template <class T>
  T* as() const { return static_cast<T*>(data); }
};

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int d = 0; d < t.ndim; ++d) text += (d ? ", " : "") + std::to_string(t.size[d]);
  return text + "]";
}

// Argument checks. Each throws std::invalid_argument naming the argument, what was expected and what came.
[[noreturn]] inline void fail(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(argument + ": expected " + expected + ", got " + got);
}

inline void check_shape(const char* argument, const Tensor& t, std::initializer_list<int64_t> shape) {
  Tensor expected;
  for (int64_t n : shape) expected.size[expected.ndim++] = n;
  bool same = t.ndim == expected.ndim;
  for (int d = 0; same && d < t.ndim; ++d) same = t.size[d] == expected.size[d];
  if (!same) fail(argument, "shape " + shape_of(expected), shape_of(t));
}

inline void check_ndim(const char* argument, const Tensor& t, int ndim) {
  if (t.ndim != ndim) fail(argument, std::to_string(ndim) + " dimensions", shape_of(t));
}

inline void check_dtype(const char* argument, const Tensor& t, DType dtype) {
  if (t.dtype != dtype) fail(argument, name_of(dtype), name_of(t.dtype));
}

inline void check_contiguous(const char* argument, const Tensor& t) {
  if (!t.is_contiguous()) fail(argument, "a contiguous tensor", "other strides");
}

// Check dtype, shape and contiguity at once.
inline void check_dense(const char* argument, const Tensor& t, std::initializer_list<int64_t> shape) {
  check_shape(argument, t, shape);
  check_contiguous(argument, t);
}

inline void check_dense(const char* argument, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) {
  check_dtype(argument, t, dtype);
  check_dense(argument, t, shape);
}

// The type in which sums of elements of `dtype` are held: double for f64, float for the rest.
inline DType accumulator_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace mirage
