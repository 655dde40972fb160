// Feature maps [B, C, H, W] with any strides, for kernels that take the pixels of a plane one after the other.
#pragma once

#include <type_traits>

#include "device.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

struct Planes {
  const void* data;
  int64_t s_batch, s_channel, s_row, s_pixel;
  int width;
  bool is_line;  // the pixels of a plane are equally spaced: it is taken as one line, and `width` has no meaning

  // Of pixel n in its plane.
  MIRAGE_DEVICE int64_t offset(int n) const {
    const int row = is_line ? 0 : n / width;
    return row * s_row + (n - row * width) * s_pixel;
  }

  // Pixel n of a sample's first channel.
  template <class T>
  MIRAGE_DEVICE const T* pixel(int sample, int n) const {
    return static_cast<const T*>(data) + sample * s_batch + offset(n);
  }
};

// Every 32nd pixel of a plane from n on, whose pixel 0 is `plane`: an addition each where it is a line.
template <class T>
struct PixelWalk {
  const Planes& planes;
  const T* plane;
  int n;
  const T* at;

  MIRAGE_DEVICE PixelWalk(const Planes& p, const T* plane, int n)
      : planes(p), plane(plane), n(n), at(plane + p.offset(n)) {}

  MIRAGE_DEVICE void advance() {
    n += kLanes;
    at = planes.is_line ? at + kLanes * planes.s_pixel : plane + planes.offset(n);
  }
};

inline Planes planes_of(const Tensor& x) {
  const int64_t height = x.size[2], width = x.size[3];
  Planes p{x.data, x.stride[0], x.stride[1], x.stride[2], x.stride[3], int(width), false};
  if (x.size[0] == 1) p.s_batch = 0;
  if (x.size[1] == 1) p.s_channel = 0;
  if (width == 1) p.s_pixel = p.s_row;
  p.is_line = height == 1 || width == 1 || p.s_row == width * p.s_pixel;
  return p;
}

// Whether pixels 2n and 2n + 1 of every plane lie together, where one load may take both. Of an even number of pixels.
inline bool are_pairs(const Planes& p, DType dtype) {
  return p.s_pixel == 1 && (p.is_line || (p.width % 2 == 0 && p.s_row % 2 == 0)) && p.s_channel % 2 == 0 &&
         p.s_batch % 2 == 0 &&
         reinterpret_cast<uintptr_t>(p.data) % uintptr_t(2 * bytes_of(dtype)) == 0;
}

// What 32-bit numbers of channels, pixels of a plane, and tiles of 32 pixels are enough for.
inline void check_planes(const Tensor& x) {
  if (x.dtype == DType::f64) fail("x", "float32, float16 or bfloat16", name_of(x.dtype));
  const int64_t most = INT32_MAX / 64, pixels = x.size[2] * x.size[3];
  if (x.size[0] > INT32_MAX || x.size[1] > most || x.size[2] > most || x.size[3] > most || pixels > INT32_MAX / 2 ||
      x.size[0] * ((pixels + 31) / 32) > INT32_MAX) {
    fail("x", "sizes up to " + std::to_string(most) + ", planes of up to " + std::to_string(INT32_MAX / 2) +
                  " pixels and up to " + std::to_string(INT32_MAX) + " tiles of 32",
         shape_of(x));
  }
}

// kPack pixels next to each other, as they lie in memory: what a thread holds of them until it wants their values.
template <class T, int kPack>
struct Neighbours {
  static constexpr bool kPair = kIsHalf<T> && kPack == 2;
  std::conditional_t<kPair, uint32_t, Packed<T, kPack>> bits;

  MIRAGE_DEVICE float operator[](int i) const {
    if constexpr (kPair) return i == 0 ? low_of<T>(bits) : high_of<T>(bits);
    else return to_float(bits.value[i]);
  }
};

template <int kPack, class T>
MIRAGE_DEVICE Neighbours<T, kPack> load_neighbours(const T* p) {
  return *reinterpret_cast<const Neighbours<T, kPack>*>(p);
}

template <int kPack, class T>
MIRAGE_DEVICE void store_neighbours(T* p, const float (&value)[kPack]) {
  if constexpr (kPack == 2) store_pair(p, value[0], value[1]);
  else *p = from_float<T>(value[0]);
}

}  // namespace mirage::cuda
