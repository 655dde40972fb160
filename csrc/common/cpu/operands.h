// Operands of a GEMM over channels: rows of the accumulator type or, where the processor multiplies bfloat16, rows of
// pairs of channels that are rounded to it.
//
// A stage on bfloat16 tensors rounds a product's two operands as PyTorch does when it stores them; sums stay in float.
// Channels 2k and 2k + 1 of a pixel share one element of row k, so that packed rows need no memory of their own.
#pragma once

#include <type_traits>

#include "dtypes.h"
#include "vec_math.h"

namespace mirage::cpu::MIRAGE_ISA {

template <class T> struct OperandOf { using type = Acc<T>; };
#if defined(__AVX512BF16__)
struct bf16x2 { uint32_t bits; };  // the even channel in the low half
template <> struct OperandOf<bf16> { using type = bf16x2; };
#endif
template <class T> using Operand = typename OperandOf<T>::type;

// The numbers that an element of P is made of.
template <class P> struct StoredIn { using type = P; };
#if defined(__AVX512BF16__)
template <> struct StoredIn<bf16x2> { using type = bf16; };
#endif
template <class P> using Stored = typename StoredIn<P>::type;

// GELU in place between two matrix products with operands P, as exact as these need it.
template <class P, int N>
MIRAGE_INLINE void gelu_between(Vec<Acc<P>> (&v)[N]) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<P, bf16x2>) return vgelu_for_bf16_each(v);
#endif
  vgelu_each(v);
}

// The same of the sigmoid that scales what the next product multiplies.
template <class P, int N>
MIRAGE_INLINE void sigmoid_between(Vec<Acc<P>> (&v)[N]) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<P, bf16x2>) return vsigmoid_for_bf16_each(v);
#endif
  vsigmoid_each<Acc<P>>(v);
}

MIRAGE_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
MIRAGE_INLINE Vec<double> multiply_add(Vec<double> sum, Vec<double> a, Vec<double> b) { return sum + a * b; }

// The number of elements of P that hold `channels` channels.
template <class P>
MIRAGE_INLINE int64_t packed(int64_t channels) { return channels; }

// A matrix in row-major order as the left operand of products.
template <class P>
struct Matrix {
  const P* data;
  int64_t stride;

  // The submatrix from (row, column) on. The column is even if elements are pairs.
  MIRAGE_INLINE Matrix at(int64_t row, int64_t column = 0) const {
    return {data + row * stride + packed<P>(column), stride};
  }
};

// A matrix [rows, depth], contiguous, as an operand: itself, or a copy where it is a tensor of another type.
template <class P>
struct OperandMatrix : Matrix<P> {
  explicit OperandMatrix(const Tensor& t) : Matrix<P>{nullptr, t.size[1]}, elements(t) { this->data = elements; }

  InAccumulator<P> elements;
};

// Rows of a buffer as the right operand of products: themselves. `room` is where packed rows go; it may be `rows`.
template <class P>
inline const P* operand_rows(const Acc<P>* rows, int64_t, int64_t, int64_t, Acc<P>*) { return rows; }

#if defined(__AVX512BF16__)

struct Bf16Pairs { __m512bh v; };
MIRAGE_INLINE Bf16Pairs load(const bf16x2* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
MIRAGE_INLINE Bf16Pairs splat(bf16x2 v) { return {(__m512bh)_mm512_set1_epi32(int(v.bits))}; }
MIRAGE_INLINE Vec<float> multiply_add(Vec<float> sum, Bf16Pairs a, Bf16Pairs b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a.v, b.v);
}

template <>
MIRAGE_INLINE int64_t packed<bf16x2>(int64_t channels) { return (channels + 1) / 2; }

// A bfloat16 row with an even number of channels is a row of pairs already.
template <>
struct OperandMatrix<bf16x2> : Matrix<bf16x2> {
  explicit OperandMatrix(const Tensor& t)
      : Matrix<bf16x2>{t.as<const bf16x2>(), packed<bf16x2>(t.size[1])}, room(is_paired(t) ? 0 : t.size[0] * stride) {
    if (is_paired(t)) return;
    const InAccumulator<float> elements(t);
    for (int64_t m = 0; m < t.size[0]; ++m) {
      bf16* const row = reinterpret_cast<bf16*>(room.get() + m * stride);
      store_row(row, elements + m * t.size[1], t.size[1]);
      if (t.size[1] % 2) row[t.size[1]] = bf16{0};
    }
    data = room.get();
  }

  static bool is_paired(const Tensor& t) { return t.dtype == DType::bf16 && t.size[1] % 2 == 0; }
  Buffer<bf16x2> room;
};

template <>
inline const bf16x2* operand_rows<bf16x2>(const float* rows, int64_t channels, int64_t stride, int64_t pixels,
                                          float* room) {
  static_assert(sizeof(bf16x2) == sizeof(float), "packed rows take the place of the rows they come from");
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; ++i) {
    order[2 * i] = uint16_t(i);
    order[2 * i + 1] = uint16_t(16 + i);
  }
  const __m512i interleave = _mm512_load_si512(order);
  for (int64_t k = 0; k < packed<bf16x2>(channels); ++k) {
    const float *even = rows + 2 * k * stride, *odd = 2 * k + 1 < channels ? even + stride : nullptr;
    for (int64_t p = 0; p < pixels; p += 16) {
      const __m512 low = (__m512)load(even + p), high = odd ? (__m512)load(odd + p) : _mm512_setzero_ps();
      const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(room + k * stride + p, _mm512_permutexvar_epi16(interleave, halves));
    }
  }
  return reinterpret_cast<const bf16x2*>(room);
}

#endif

}  // namespace mirage::cpu::MIRAGE_ISA
