// Exact (erf) GELU in about ten instructions, its derivative, and the sigmoid.
#pragma once

#include "device.h"

namespace mirage::cuda {

// log2 of cdf(-a), cdf being that of the normal distribution. The polynomials are fits by tools/fit_vec_math.py; beyond
// their interval they fall to -infinity, so that 2^p is 0 there. A GPU has 2^p as one instruction.
MIRAGE_DEVICE float log_tail(float a) {
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

// The fit for results that are rounded to 16 bits: the absolute error of gelu(x) is below 2.6e-6, and for -4 < x < 0
// its relative error below 2.7e-4, half the rounding error of float16.
MIRAGE_DEVICE float log_tail_for_half(float a) {
  float p = -0.000397222844f;
  p = fmaf(p, a, 0.00656028045f);
  p = fmaf(p, a, -0.0506270304f);
  p = fmaf(p, a, -0.461046696f);
  p = fmaf(p, a, -1.15050852f);
  return fmaf(p, a, -1.00002849f);
}

// Computes x cdf(x) as max(x, 0) - |x| cdf(-|x|), to the precision of T. gelu(inf) = inf and gelu(-inf) = NaN, as in
// PyTorch.
template <class T>
MIRAGE_DEVICE float gelu(float x) {
  const float a = fabsf(at_most(16.0f, x));  // infinite only for x = -inf, where the product below is NaN
  const float tail = exp2_of(kIsHalf<T> ? log_tail_for_half(a) : log_tail(a));
  return fmaf(-a, tail, at_least(0.0f, x));
}

// Returns gelu(x), and its derivative cdf(x) + x density(x) in `slope`, with an error below 1.6e-7 (1.1e-5 for 16-bit
// results). The slope of infinite x is NaN, as in PyTorch.
template <class T>
MIRAGE_DEVICE float gelu_with_slope(float x, float& slope) {
  const float a = fabsf(at_most(16.0f, x));
  const float tail = exp2_of(kIsHalf<T> ? log_tail_for_half(a) : log_tail(a));
  const float density = exp2_of(fmaf(x * x, -0.721347520f, -1.32574806f));  // e^(-x^2/2) / sqrt(2 pi)
  slope = fmaf(x, density, x > 0.0f ? 1.0f - tail : tail);
  return fmaf(-a, tail, at_least(0.0f, x));
}

MIRAGE_DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_of(-1.44269504f * x)); }

}  // namespace mirage::cuda
