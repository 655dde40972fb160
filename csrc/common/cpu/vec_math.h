// Elementary functions on vectors: exp, the logistic sigmoid, the normal distribution function and the exact GELU.
//
// Coefficients are fits of our own (tools/fit_vec_math.py). Largest errors against double precision, measured by
// csrc/tests/test_vec_math.cpp, stand beside each function. NaN stays NaN; exp and sigmoid saturate; gelu(inf) = inf,
// gelu(-inf) = NaN as in PyTorch (-inf * 0), and gelu of a large negative number is -0.
//
// A function named ..._each takes N vectors together. Each one's instructions form a chain, and what a processor holds
// back waiting on chains is limited: side by side they take up to a third less time than one after the other.
#pragma once

#include "vec.h"
#if defined(__AVX512F__)
#include "piecewise.h"
#endif

namespace mirage::cpu::MIRAGE_ISA {
namespace vec_math {

template <class A> struct Constants;
template <> struct Constants<float> {
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;  // beyond: 0 and inf
  static constexpr float gauss_end = MIRAGE_VECTOR_BYTES == 64 ? 14.6f : 13.26f;  // exp(-a^2 / 2) is made 0 here
};
template <> struct Constants<double> {
  static constexpr double magic = 6755399441055744.0;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double log2e = 1.4426950408889634, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double exp_low = -746.0, exp_high = 710.0;
  static constexpr double gauss_end = MIRAGE_VECTOR_BYTES == 64 ? 39.0 : 37.65;
};

// Horner's rule, lowest coefficient first.
template <class A, int N>
MIRAGE_INLINE Vec<A> horner(Vec<A> x, const A (&c)[N]) {
  Vec<A> p = splat(c[N - 1]);
#pragma GCC unroll 32
  for (int i = N - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

template <class A, int N, int M>
MIRAGE_INLINE void horner_each(const Vec<A> (&x)[N], const A (&c)[M], Vec<A> (&p)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = splat(c[M - 1]);
#pragma GCC unroll 32
  for (int k = M - 2; k >= 0; --k) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + c[k];
  }
}

// An integer n, as n + magic (`shifted`), and v: v * 2^n. Without AVX-512 only for results above the subnormal range,
// and exactly 0 for n = -bias.
template <class A>
MIRAGE_INLINE Vec<A> scale(Vec<A> v, Vec<A> shifted) {
#if defined(__AVX512F__)
  const Vec<A> n = shifted - Constants<A>::magic;
  if constexpr (sizeof(A) == 4) {
    return (Vec<A>)_mm512_scalef_ps((__m512)v, (__m512)n);
  } else {
    return (Vec<A>)_mm512_scalef_pd((__m512d)v, (__m512d)n);
  }
#else
  const IVec<A> power = (((IVec<A>)shifted - (IVec<A>)splat<A>(Constants<A>::magic)) + Constants<A>::bias)
                        << Constants<A>::mantissa;
  return v * (Vec<A>)power;
#endif
}

// The same for every n that exp meets, subnormal results and overflow included.
template <class A>
MIRAGE_INLINE Vec<A> scale_any(Vec<A> v, Vec<A> shifted) {
#if defined(__AVX512F__)
  return scale<A>(v, shifted);
#else
  const IVec<A> n = (IVec<A>)shifted - (IVec<A>)splat<A>(Constants<A>::magic), half = n >> 1;
  return v * (Vec<A>)((half + Constants<A>::bias) << Constants<A>::mantissa) *
         (Vec<A>)((n - half + Constants<A>::bias) << Constants<A>::mantissa);
#endif
}

// exp(r) for |r| <= ln(2) / 2, in place
template <int N>
MIRAGE_INLINE void exp_reduced_each(Vec<float> (&r)[N]) {
  constexpr float c[] = {1.0f, 1.0f, 0.49999994f, 0.166664317f, 0.0416680016f, 0.00837415643f, 0.00138436514f};
  Vec<float> p[N];
  horner_each<float>(r, c, p);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) r[i] = p[i];
}
MIRAGE_INLINE Vec<double> exp_reduced(Vec<double> r) {
  constexpr double c[] = {1.0, 1.0, 0x1.0000000000011p-1, 0x1.555555555555ap-3, 0x1.555555554f0cbp-5,
                          0x1.111111110f224p-7, 0x1.6c16c187fcab2p-10, 0x1.a01a01b143f5dp-13, 0x1.a01991aa67f6ap-16,
                          0x1.71ddf5734ee36p-19, 0x1.28b40775c769dp-22, 0x1.af631f6a9fc7bp-26};
  return horner<double>(r, c);
}
template <int N>
MIRAGE_INLINE void exp_reduced_each(Vec<double> (&r)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) r[i] = exp_reduced(r[i]);
}

// q = p + kExp2Offset becomes 2^p, for p <= 0; without AVX-512 p must be at least -127.5. The polynomials kExp2 are good
// to 2e-9.
#if defined(__AVX512F__)
// One instruction takes the fraction above floor(q), and scalef uses the floor by itself.
constexpr float kExp2Offset = 0.5f;
constexpr float kExp2[] = {0.707106769f, 0.490128934f, 0.169868141f, 0.0392326489f,
                           0.00684397388f, 0.000879618747f, 0.000153458124f};
template <int N, int M>
MIRAGE_INLINE void exp2_offset_each(Vec<float> (&q)[N], const float (&c)[M]) {
  constexpr int kFloor = 1;
  Vec<float> fraction[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) fraction[i] = (Vec<float>)_mm512_reduce_ps((__m512)q[i], kFloor);
  horner_each<float>(fraction, c, p);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) q[i] = (Vec<float>)_mm512_scalef_ps((__m512)p[i], (__m512)q[i]);
}
#else
constexpr float kExp2Offset = 0.0f;
constexpr float kExp2[] = {1.0f,           0.693147182f,   0.240226477f, 0.0555033237f,
                           0.00961843692f, 0.00133988739f, 0.00015353362f};
template <int N, int M>
MIRAGE_INLINE void exp2_offset_each(Vec<float> (&q)[N], const float (&c)[M]) {
  Vec<float> shifted[N], fraction[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    shifted[i] = q[i] + Constants<float>::magic;
    fraction[i] = q[i] - (shifted[i] - Constants<float>::magic);
  }
  horner_each<float>(fraction, c, p);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) q[i] = scale<float>(p[i], shifted[i]);
}
#endif

// exp(-a^2 / 2) for 0 <= a <= gauss_end
MIRAGE_INLINE Vec<double> gauss(Vec<double> a) {
  using C = Constants<double>;
  const Vec<double> t = a * a * -0.5, shifted = t * C::log2e + C::magic, n = shifted - C::magic;
  return scale<double>(exp_reduced(t - n * C::ln2_high - n * C::ln2_low), shifted);
}

// cdf(-a) * exp(a^2 / 2): what turns the density into the tail
constexpr float kMills[] = {0.5f, -0.398941964f, 0.249992698f, -0.132924139f, 0.0622804016f,
                            -0.0260962881f, 0.0096859308f, -0.00307195308f, 0.000786684162f, -0.000151732223f,
                            2.0230751e-05f, -1.63706318e-06f, 5.99618062e-08f};
MIRAGE_INLINE Vec<double> mills(Vec<double> a) {
  constexpr double c[] = {
      0x1.e361ea6fba141p-2,   -0x1.8c18f2086e361p-4,  0x1.cabd72a60f88bp-7,   0x1.d4969f10e2582p-6,
      -0x1.07c3c2582b774p-5,  0x1.25dd7205b9c01p-6,   -0x1.47d5fc74e1b39p-8,  -0x1.2b7f5d0a8fd91p-12,
      0x1.6c538343fe77dp-11,  -0x1.8c11cecd65ca0p-14, -0x1.707bc2b876f33p-14, 0x1.6486058376783p-16,
      0x1.c94242724399ap-17,  -0x1.ccd2c1fbeb602p-19, -0x1.5ee4d3a268fe3p-19, 0x1.b4c31aaa42dd1p-22,
      0x1.29d5bab677ce7p-21,  -0x1.6321763e73d93p-30, -0x1.eb50933aab9a1p-24, -0x1.3369710593536p-26,
      0x1.5b2dc949385dep-26,  0x1.772a515ad88dcp-28,  -0x1.6548052479106p-29, -0x1.7259b3f479ea4p-31,
      0x1.825d1c11a3a63p-33};
  return horner<double>((a - 4.0) / (a + 4.0), c) / (a + 1.0);
}

template <class A> MIRAGE_INLINE Vec<A> vabs(Vec<A> x) { return x < 0 ? -x : x; }
template <> MIRAGE_INLINE Vec<float> vabs<float>(Vec<float> x) { return (Vec<float>)((IVec<float>)x & 0x7fffffff); }

// min(bound, x), NaN where x is
MIRAGE_INLINE Vec<double> at_most(double bound, Vec<double> x) { return vmin<double>(splat(bound), x); }
MIRAGE_INLINE Vec<float> at_most(float bound, Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)splat(bound), (__m512)x);
#else
  return vmin<float>(splat(bound), x);
#endif
}

// max(bound, x), NaN where x is, and x itself where the two are equal
MIRAGE_INLINE Vec<float> at_least(float bound, Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)splat(bound), (__m512)x);
#else
  return vmax<float>(splat(bound), x);
#endif
}

// cdf(x), given the tail cdf(-|x|)
template <class A>
MIRAGE_INLINE Vec<A> from_tail(Vec<A> x, Vec<A> tail) { return x > 0 ? A(1) - tail : tail; }

constexpr double kInverseSqrt2Pi = 0.39894228040143267794;

// log2 cdf(-a) + kExp2Offset: smooth enough for a polynomial, which falls faster than the function where that is below
// 1e-9. It is cut off where 2^p is 0, which without AVX-512 means that p rounds to -127.
constexpr float kLogTail[] = {-1.0f + kExp2Offset, -1.15110576f, -0.459204912f,
                              -0.0525050238f, 0.00707546528f, -0.000145864004f,
                              -0.000182550604f, 3.86214888e-05f, -2.77212052e-06f};
constexpr float kTailEnd = MIRAGE_VECTOR_BYTES == 64 ? 12.0f : 9.98f;

}  // namespace vec_math

// e^x, in place. Relative error below 1.1e-7 (float), 1.8e-16 (double); absolute in the subnormal range.
template <class A, int N>
MIRAGE_INLINE void vexp_each(Vec<A> (&x)[N]) {
  using C = vec_math::Constants<A>;
  Vec<A> shifted[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    x[i] = vmin<A>(splat<A>(C::exp_high), vmax<A>(splat<A>(C::exp_low), x[i]));  // in this order NaN comes through
    shifted[i] = x[i] * C::log2e + C::magic;
    const Vec<A> n = shifted[i] - C::magic;
    x[i] = x[i] - n * C::ln2_high - n * C::ln2_low;
  }
  vec_math::exp_reduced_each(x);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = vec_math::scale_any<A>(x[i], shifted[i]);
}
template <class A>
MIRAGE_INLINE Vec<A> vexp(Vec<A> x) {
  Vec<A> v[1] = {x};
  vexp_each<A>(v);
  return v[0];
}

// 1 / (1 + e^-x), in place. Relative error below 1.5e-7, 2.6e-16 where the result is above the subnormal range.
template <class A, int N>
MIRAGE_INLINE void vsigmoid_each(Vec<A> (&x)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = -x[i];
  vexp_each<A>(x);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = A(1) / (A(1) + x[i]);
}
template <class A>
MIRAGE_INLINE Vec<A> vsigmoid(Vec<A> x) {
  Vec<A> v[1] = {x};
  vsigmoid_each<A>(v);
  return v[0];
}

// The normal distribution function (1 + erf(x / sqrt 2)) / 2. Absolute error below 8.5e-8, 2.3e-16.
MIRAGE_INLINE Vec<float> vnormal_cdf(Vec<float> x) {
  const Vec<float> a[1] = {vec_math::at_most(vec_math::kTailEnd, vec_math::vabs<float>(x))};
  Vec<float> tail[1];
  vec_math::horner_each<float>(a, vec_math::kLogTail, tail);
  vec_math::exp2_offset_each(tail, vec_math::kExp2);
  return vec_math::from_tail<float>(x, tail[0]);
}
MIRAGE_INLINE Vec<double> vnormal_cdf(Vec<double> x) {
  using C = vec_math::Constants<double>;
  const Vec<double> a = vec_math::at_most(C::gauss_end, vec_math::vabs<double>(x));
  return vec_math::from_tail<double>(x, vec_math::gauss(a) * vec_math::mills(a));
}

// gelu(x) = x cdf(x), in place. Absolute error below 8e-8 * max(1, |x|) and 1.7e-16 * max(1, |x|).
template <int N>
MIRAGE_INLINE void vgelu_each(Vec<float> (&x)[N]) {
#if defined(__AVX512F__)
  piecewise::gelu_each(x);
#else
  // max(x, 0) - |x| cdf(-|x|). |x| is infinite for -inf only, where the product is NaN; -0 keeps its sign.
  using namespace vec_math;
  Vec<float> b[N], a[N], tail[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    b[i] = vabs<float>(at_most(kTailEnd, x[i]));
    a[i] = at_most(kTailEnd, b[i]);
  }
  horner_each<float>(a, kLogTail, tail);
  exp2_offset_each(tail, kExp2);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = at_least(-0.0f, x[i]) - b[i] * tail[i];
#endif
}
template <int N>
MIRAGE_INLINE void vgelu_each(Vec<double> (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] *= vnormal_cdf(x[i]);
}
template <class A>
MIRAGE_INLINE Vec<A> vgelu(Vec<A> x) {
  Vec<A> v[1] = {x};
  vgelu_each(v);
  return v[0];
}

#if defined(__AVX512BF16__)
// For values that will be rounded to bfloat16, which is 4e-3 apart: gelu(x) with an absolute error below
// 3e-5 * max(1, |x|), and below 1e-3 relative to the result for -2 < x < 0. The special values are those of vgelu_each.
template <int N>
MIRAGE_INLINE void vgelu_for_bf16_each(Vec<float> (&x)[N]) {
  piecewise::coarse_gelu_each(x);
}

// The same of the sigmoid: absolute error below 3e-4.
template <int N>
MIRAGE_INLINE void vsigmoid_for_bf16_each(Vec<float> (&x)[N]) {
  piecewise::coarse_sigmoid_each(x);
}
#endif

// x becomes gelu(x), and slope its derivative cdf(x) + x density(x). Errors below 1e-7 * max(1, |x|) and 1.5e-7 in
// float, 1.7e-16 * max(1, |x|) and 2.8e-16 in double. Infinite x has slope NaN, as in PyTorch.
template <int N>
MIRAGE_INLINE void vgelu_with_grad_each(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
  using C = vec_math::Constants<float>;
  Vec<float> a[N], e[N], tail[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    a[i] = vec_math::at_most(C::gauss_end, vec_math::vabs<float>(x[i]));
    e[i] = a[i] * a[i] * (-0.5f * C::log2e) + vec_math::kExp2Offset;
  }
  vec_math::exp2_offset_each(e, vec_math::kExp2);
  vec_math::horner_each<float>(a, vec_math::kMills, tail);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Vec<float> cdf = vec_math::from_tail<float>(x[i], e[i] * tail[i]);
    slope[i] = x[i] * e[i] * float(vec_math::kInverseSqrt2Pi) + cdf;
    x[i] *= cdf;
  }
}
template <int N>
MIRAGE_INLINE void vgelu_with_grad_each(Vec<double> (&x)[N], Vec<double> (&slope)[N]) {
  using C = vec_math::Constants<double>;
  for (int i = 0; i < N; ++i) {
    const Vec<double> a = vec_math::at_most(C::gauss_end, vec_math::vabs<double>(x[i]));
    const Vec<double> e = vec_math::gauss(a), cdf = vec_math::from_tail<double>(x[i], e * vec_math::mills(a));
    slope[i] = x[i] * e * vec_math::kInverseSqrt2Pi + cdf;
    x[i] *= cdf;
  }
}
template <class A>
MIRAGE_INLINE void vgelu_with_grad(Vec<A> x, Vec<A>& value, Vec<A>& slope) {
  Vec<A> v[1] = {x}, d[1];
  vgelu_with_grad_each(v, d);
  value = v[0];
  slope = d[0];
}

}  // namespace mirage::cpu::MIRAGE_ISA
