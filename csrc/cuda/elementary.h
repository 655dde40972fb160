// The exact GELU on a GPU, in some ten instructions.
#pragma once

#include "device.h"

namespace mirage::cuda {

// log2 cdf(-a) of the normal distribution, lowest coefficient first: fits of tools/fit_vec_math.py. The GPU has 2^p as an
// instruction, so that the tail costs a polynomial, one minimum and that.
struct LogTail {
  static constexpr float kEnd = 12.0f;  // from here on 2^p is 0
  MIRAGE_DEVICE static float at(float a) {
    float p = -2.77212052e-06f;
    p = fmaf(p, a, 3.86214888e-05f);
    p = fmaf(p, a, -0.000182550604f);
    p = fmaf(p, a, -0.000145864004f);
    p = fmaf(p, a, 0.00707546528f);
    p = fmaf(p, a, -0.0525050238f);
    p = fmaf(p, a, -0.459204912f);
    p = fmaf(p, a, -1.15110576f);
    return fmaf(p, a, -1.0f);
  }
};

// For results that are rounded to bfloat16: absolute error below 3e-5, and 3e-4 relative for -4 < x < 0.
struct LogTailForBf16 {
  static constexpr float kEnd = 16.0f;
  MIRAGE_DEVICE static float at(float a) {
    float p = -0.000333440631f;
    p = fmaf(p, a, 0.00595631844f);
    p = fmaf(p, a, -0.0486793971f);
    p = fmaf(p, a, -0.463515825f);
    p = fmaf(p, a, -1.14945858f);
    return fmaf(p, a, -1.0001001f);
  }
};

template <class T> struct TailOf { using Type = LogTail; };
template <> struct TailOf<bf16> { using Type = LogTailForBf16; };

// x cdf(x) as max(x, 0) - |x| cdf(-|x|), good to the precision of T. gelu(inf) = inf, gelu(-inf) = NaN as in PyTorch.
template <class T>
MIRAGE_DEVICE float gelu(float x) {
  using Tail = typename TailOf<T>::Type;
  const float b = fabsf(at_most(Tail::kEnd, x));  // infinite for -inf only, where the product below is NaN
  const float tail = exp2_of(Tail::at(at_most(Tail::kEnd, b)));
  return fmaf(-b, tail, at_least(0.0f, x));
}

}  // namespace mirage::cuda
