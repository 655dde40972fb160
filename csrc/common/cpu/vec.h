// Vectors of floats or doubles as wide as the instruction set, loaded from and stored to any element type.
//
// Written with the vector extensions of GCC and Clang, so that one source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef MIRAGE_ISA
#error "vec.h belongs in kernel files, which are compiled once per instruction set (see isa.h)"
#endif

#if defined(__AVX512F__)
#define MIRAGE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MIRAGE_VECTOR_BYTES 32
#else
#define MIRAGE_VECTOR_BYTES 16
#endif

#define MIRAGE_INLINE inline __attribute__((always_inline))

namespace mirage::cpu::MIRAGE_ISA {

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

template <class A> struct VecTraits;
template <> struct VecTraits<float> {
  typedef float V __attribute__((vector_size(MIRAGE_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(MIRAGE_VECTOR_BYTES)));
};
template <> struct VecTraits<double> {
  typedef double V __attribute__((vector_size(MIRAGE_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(MIRAGE_VECTOR_BYTES)));
};
template <class A> using Vec = typename VecTraits<A>::V;   // values
template <class A> using IVec = typename VecTraits<A>::I;  // integers of the same width: masks, exponents
template <class A> constexpr int kLanes = MIRAGE_VECTOR_BYTES / sizeof(A);

// The accumulator of a stored type.
template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using Acc = typename AccOf<T>::type;

template <class To, class From>
MIRAGE_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy between types of different size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- one element ------------------------------------------------------------------------------------------------

MIRAGE_INLINE float to_acc(float v) { return v; }
MIRAGE_INLINE double to_acc(double v) { return v; }
MIRAGE_INLINE float to_acc(bf16 v) { return bit_copy<float>(uint32_t(v.bits) << 16); }
MIRAGE_INLINE float to_acc(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_copy<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifting the exponent into place and scaling by 2^112 serves normal and subnormal numbers alike.
  const float value = bit_copy<float>(magnitude << 13) * bit_copy<float>(uint32_t(239) << 23);
  return bit_copy<float>(bit_copy<uint32_t>(value) | sign);
}

template <class T> MIRAGE_INLINE T from_acc(Acc<T> v);
template <> MIRAGE_INLINE float from_acc<float>(float v) { return v; }
template <> MIRAGE_INLINE double from_acc<double>(double v) { return v; }
template <> MIRAGE_INLINE bf16 from_acc<bf16>(float v) {
  const uint32_t u = bit_copy<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(u >> 16 | 0x40u)};  // NaN stays a (quiet) NaN
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};                  // round to nearest even
}
template <> MIRAGE_INLINE f16 from_acc<f16>(float v) {
  const uint32_t u = bit_copy<uint32_t>(v), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds past the largest finite value
  if (magnitude < 0x38800000u) {                                    // subnormal: let the adder do the rounding
    const float shifted = bit_copy<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_copy<uint32_t>(shifted) - 0x3f000000u))};
  }
  return {uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

// ---- whole vectors ----------------------------------------------------------------------------------------------

template <class A> MIRAGE_INLINE Vec<A> splat(A v) { return v - Vec<A>{}; }  // v + 0 would lose the sign of -0

MIRAGE_INLINE Vec<float> load(const float* p) { Vec<float> v; __builtin_memcpy(&v, p, sizeof(v)); return v; }
MIRAGE_INLINE Vec<double> load(const double* p) { Vec<double> v; __builtin_memcpy(&v, p, sizeof(v)); return v; }
MIRAGE_INLINE Vec<float> load(const bf16* p) {
  typedef uint16_t Half __attribute__((vector_size(MIRAGE_VECTOR_BYTES / 2)));
  typedef uint32_t Full __attribute__((vector_size(MIRAGE_VECTOR_BYTES)));
  Half h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bit_copy<Vec<float>>(__builtin_convertvector(h, Full) << 16);
}
MIRAGE_INLINE Vec<float> load(const f16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

// Loads a vector into a register that stays one: where several products take the vector, compilers read it again for
// each, which costs twice where it spans two cache lines.
template <class A>
MIRAGE_INLINE Vec<A> load_once(const A* p) {
  Vec<A> v = load(p);
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

MIRAGE_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
MIRAGE_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }
MIRAGE_INLINE void store(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  typedef uint16_t Half __attribute__((vector_size(MIRAGE_VECTOR_BYTES / 2)));
  typedef uint32_t Full __attribute__((vector_size(MIRAGE_VECTOR_BYTES)));
  const Full u = bit_copy<Full>(v);
  const Full rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, quiet = u >> 16 | 0x40u;
  const Full is_nan = (Full)(v != v);
  const Half h = __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), Half);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
}
MIRAGE_INLINE void store(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_acc<f16>(v[i]);
#endif
}

// The first n lanes only (0 <= n <= lanes); load_n fills the rest with zero.
template <class T>
MIRAGE_INLINE Vec<Acc<T>> load_n(const T* p, int n) {
#if defined(__AVX512F__)
  const uint32_t lanes = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(T) == 8) {
    return (Vec<Acc<T>>)_mm512_maskz_loadu_pd(__mmask8(lanes), p);
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<Acc<T>>)_mm512_maskz_loadu_ps(__mmask16(lanes), p);
  } else {
    T buffer[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(__mmask16(lanes), p));
    return load(buffer);
  }
#else
  T buffer[kLanes<Acc<T>>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
template <class T>
MIRAGE_INLINE void store_n(T* p, Vec<Acc<T>> v, int n) {
#if defined(__AVX512F__)
  const uint32_t lanes = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, __mmask8(lanes), (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(lanes), (__m512)v);
  } else {
    T buffer[16];
    store(buffer, v);
    _mm256_mask_storeu_epi16(p, __mmask16(lanes), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
  }
#else
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// The sum of N lanes, halves added until one is left, in registers.
template <class A, int N>
struct Lanes {
  typedef A V __attribute__((vector_size(N * sizeof(A))));
};
template <class A, int N>
MIRAGE_INLINE A add_lanes(typename Lanes<A, N>::V v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<A, N / 2>::V half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    return add_lanes<A, N / 2>(half[0] + half[1]);
  }
}
template <class A> MIRAGE_INLINE A sum(Vec<A> v) { return add_lanes<A, kLanes<A>>(v); }

// mask lanes are all ones or all zeros, as comparisons yield them
template <class A>
MIRAGE_INLINE Vec<A> select(IVec<A> mask, Vec<A> yes, Vec<A> no) { return mask ? yes : no; }
template <class A> MIRAGE_INLINE Vec<A> vmax(Vec<A> a, Vec<A> b) { return a > b ? a : b; }
template <class A> MIRAGE_INLINE Vec<A> vmin(Vec<A> a, Vec<A> b) { return a < b ? a : b; }

template <class A>
inline A dot(const A* a, const A* b, int64_t n) {
  constexpr int L = kLanes<A>;
  Vec<A> lanes = {};
  A rest = 0;
  int64_t i = 0;
  for (; i + L <= n; i += L) lanes += load(a + i) * load(b + i);
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum<A>(lanes) + rest;
}

// n elements, `stride` apart, converted to the accumulator type.
template <class T>
inline void load_row(const T* p, int64_t stride, int64_t n, Acc<T>* out) {
  constexpr int L = kLanes<Acc<T>>;
  if (stride == 1) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store(out + i, load(p + i));
    if (i < n) store_n(out + i, load_n(p + i, int(n - i)), int(n - i));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_acc(p[i * stride]);
  }
}

// n consecutive elements, rounded from the accumulator type.
template <class T>
inline void store_row(T* p, const Acc<T>* in, int64_t n) {
  constexpr int L = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(p + i, load(in + i));
  if (i < n) store_n(p + i, load_n(in + i, int(n - i)), int(n - i));
}

}  // namespace mirage::cpu::MIRAGE_ISA
