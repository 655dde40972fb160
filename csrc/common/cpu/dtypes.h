// Maps a run-time DType to a kernel's element type.
#pragma once

#include <type_traits>

#include "mirage/tensor.h"
#include "parallel.h"

// Runs `...` with T standing for the element type of `dtype`.
#define MIRAGE_FOR_DTYPE(dtype, T, ...)                               \
  switch (dtype) {                                                    \
    case ::mirage::DType::f32: { using T = float; __VA_ARGS__; } break;  \
    case ::mirage::DType::f64: { using T = double; __VA_ARGS__; } break; \
    case ::mirage::DType::f16: { using T = f16; __VA_ARGS__; } break;    \
    case ::mirage::DType::bf16: { using T = bf16; __VA_ARGS__; } break;  \
  }

// The same for activations, in kernels of which the avx512_bf16 build contains bfloat16 alone (isa.h).
#if defined(__AVX512BF16__)
#define MIRAGE_FOR_MAP_DTYPE(dtype, T, ...) \
  if ((dtype) == ::mirage::DType::bf16) { using T = bf16; __VA_ARGS__; }
#else
#define MIRAGE_FOR_MAP_DTYPE MIRAGE_FOR_DTYPE
#endif

namespace mirage::cpu::MIRAGE_ISA {

template <class A> constexpr DType kDTypeOf = sizeof(A) == 8 ? DType::f64 : DType::f32;  // of an accumulator type

// A whole one-dimensional tensor in the accumulator type A, whatever it is stored as.
template <class A>
inline void load_all(const Tensor& t, A* out) {
  MIRAGE_FOR_DTYPE(t.dtype, T, {
    const T* p = static_cast<const T*>(t.data);
    for (int64_t i = 0; i < t.size[0]; ++i) out[i] = A(to_acc(p[i * t.stride[0]]));
  })
}

// The elements of a contiguous tensor in the accumulator type A: the tensor's own where it stores that, else a copy.
template <class A>
class InAccumulator {
 public:
  explicit InAccumulator(const Tensor& t) : room_(stores_it(t) ? 0 : t.numel()), data_(room_.get()) {
    if (stores_it(t)) {
      data_ = t.as<const A>();
      return;
    }
    MIRAGE_FOR_DTYPE(t.dtype, T, {
      if constexpr (std::is_same_v<Acc<T>, A>) {
        load_row(t.as<const T>(), 1, t.numel(), room_.get());
      } else {
        for (int64_t i = 0; i < t.numel(); ++i) room_[i] = A(to_acc(t.as<const T>()[i]));
      }
    })
  }
  MIRAGE_INLINE operator const A*() const { return data_; }
  MIRAGE_INLINE const A* get() const { return data_; }

 private:
  static bool stores_it(const Tensor& t) { return t.dtype == kDTypeOf<A>; }
  Buffer<A> room_;
  const A* data_;
};

// Numbers of the accumulator type A as a contiguous tensor.
template <class A>
inline Tensor matrix_of(A* data, int64_t rows, int64_t columns) {
  return {data, kDTypeOf<A>, 2, {rows, columns}, {columns, 1}};
}

// The reverse of load_all: sums held in double, rounded to the type that `t` stores.
inline void store_all(const double* in, const Tensor& t) {
  MIRAGE_FOR_DTYPE(t.dtype, T, {
    T* p = static_cast<T*>(t.data);
    for (int64_t i = 0; i < t.size[0]; ++i) p[i * t.stride[0]] = from_acc<T>(Acc<T>(in[i]));
  })
}

}  // namespace mirage::cpu::MIRAGE_ISA
