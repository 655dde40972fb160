// The layer norm of a pixel, by one thread: for stages that have its channels in reach of each.
#pragma once

#include "device.h"

namespace mirage::cuda {

// Of a pixel: mean and reciprocal deviation.
struct alignas(8) NormMoments {
  float mean, rstd;
};

// Of `channels` elements `stride` apart.
template <class T, class Stride>
MIRAGE_DEVICE NormMoments norm_moments(const T* pixel, Stride stride, int channels, float eps) {
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 8
  for (int c = 0; c < channels; ++c) sum += to_float(pixel[c * stride]);
  const float mean = sum / float(channels);
#pragma unroll 8
  for (int c = 0; c < channels; ++c) {
    const float centred = to_float(pixel[c * stride]) - mean;
    squares = fmaf(centred, centred, squares);
  }
  return {mean, 1.0f / sqrtf(squares / float(channels) + eps)};
}

// In place, with the norm's own weight and bias [channels].
template <class T>
MIRAGE_DEVICE void normalise_pixel(T* pixel, int stride, int channels, float eps, const float* weight,
                                   const float* bias) {
  const NormMoments moments = norm_moments(pixel, stride, channels, eps);
#pragma unroll 8
  for (int c = 0; c < channels; ++c) {
    const float scaled = (to_float(pixel[c * stride]) - moments.mean) * moments.rstd;
    pixel[c * stride] = from_float<T>(fmaf(scaled, weight[c], bias[c]));
  }
}

}  // namespace mirage::cuda
