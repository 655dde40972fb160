// Feature maps [B, C, H, W] of any strides, read a run of pixels at a time.
#pragma once

#include "device.h"

namespace mirage::cuda {

struct MapView {
  const void* data;
  int64_t s_batch, s_channel, s_row, s_column;

  // Of the plane of a channel.
  template <class T>
  MIRAGE_DEVICE const T* plane(int64_t sample, int64_t channel) const {
    return static_cast<const T*>(data) + sample * s_batch + channel * s_channel;
  }
};

// How the pixels of a plane lie, in all maps of a call.
struct Pixels {
  int count, width;
  bool packed;  // four neighbours are one aligned load or store, everywhere; `count` is a multiple of four
};

// Four pixels of each of `kThreads` threads, from pixel `first` on: neighbours where they are packed, else those that the
// threads have next to each other.
template <int kThreads>
MIRAGE_DEVICE int pixel_of(const Pixels& pixels, int first, int thread, int j) {
  return pixels.packed ? first + 4 * thread + j : first + j * kThreads + thread;
}

// Zero beyond the last pixel.
template <int kThreads, class T>
MIRAGE_DEVICE void load_pixels(const MapView& map, const T* plane, const Pixels& pixels, int first, int thread,
                               float (&value)[4]) {
  if (pixels.packed) {
    const int n = first + 4 * thread;
    if (n < pixels.count) load_packed<4>(plane + n, value);
    else value[0] = value[1] = value[2] = value[3] = 0.0f;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int n = pixel_of<kThreads>(pixels, first, thread, j);
    const bool known = n < pixels.count;
    const int64_t offset = n / pixels.width * map.s_row + n % pixels.width * map.s_column;
    value[j] = known ? to_float(plane[offset]) : 0.0f;
  }
}

// To a plane that is contiguous.
template <int kThreads, class T>
MIRAGE_DEVICE void store_pixels(T* plane, const Pixels& pixels, int first, int thread, const float (&value)[4]) {
  if (pixels.packed) {
    const int n = first + 4 * thread;
    if (n < pixels.count) store_four(plane + n, value);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int n = pixel_of<kThreads>(pixels, first, thread, j);
    if (n < pixels.count) plane[n] = from_float<T>(value[j]);
  }
}

}  // namespace mirage::cuda
