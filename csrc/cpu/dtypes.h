// From a run-time DType to a kernel's element type.
#pragma once

#include "mirage/tensor.h"
#include "vec.h"

// Runs `...` with T standing for the element type of `dtype`.
#define MIRAGE_FOR_DTYPE(dtype, T, ...)                               \
  switch (dtype) {                                                    \
    case ::mirage::DType::f32: { using T = float; __VA_ARGS__; } break;  \
    case ::mirage::DType::f64: { using T = double; __VA_ARGS__; } break; \
    case ::mirage::DType::f16: { using T = f16; __VA_ARGS__; } break;    \
    case ::mirage::DType::bf16: { using T = bf16; __VA_ARGS__; } break;  \
  }

namespace mirage::cpu::MIRAGE_ISA {

// A whole one-dimensional tensor in the accumulator type A, whatever it is stored as.
template <class A>
inline void load_all(const Tensor& t, A* out) {
  MIRAGE_FOR_DTYPE(t.dtype, T, {
    const T* p = static_cast<const T*>(t.data);
    for (int64_t i = 0; i < t.size[0]; ++i) out[i] = A(to_acc(p[i * t.stride[0]]));
  })
}

// The reverse: sums held in double, rounded to the type that `t` stores.
inline void store_all(const double* in, const Tensor& t) {
  MIRAGE_FOR_DTYPE(t.dtype, T, {
    T* p = static_cast<T*>(t.data);
    for (int64_t i = 0; i < t.size[0]; ++i) p[i * t.stride[0]] = from_acc<T>(Acc<T>(in[i]));
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
