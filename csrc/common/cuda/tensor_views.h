// How kernels see the tensors of their caller. Which view is for what:
//
//   AnyVector           vectors whose dtype the kernel learns at run time: small weights, which then need no conversion
//   MapView, Pixels     activations, for kernels whose threads have four pixels each, in one aligned access if all
//                       tensors of the call are packed: channel_attention, tri_branch_fusion
//   Planes, Neighbours  activations, for kernels whose lanes walk along a plane with a pixel or a pair of pixels each:
//                       channel_layer_norm, spd_covariance
//
// The stages use none of these. They hold tiles of the image in shared memory, which tiles.h describes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "call_checks.h"
#include "device.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// ---- vectors of any dtype ------------------------------------------------------------------------------------------

struct AnyVector {
  void* data;
  DType dtype;

  MIRAGE_DEVICE float operator[](int64_t i) const {
    switch (dtype) {
      case DType::f16: return to_float(static_cast<const f16*>(data)[i]);
      case DType::bf16: return to_float(static_cast<const bf16*>(data)[i]);
      case DType::f64: return float(static_cast<const double*>(data)[i]);
      default: return static_cast<const float*>(data)[i];
    }
  }

  MIRAGE_DEVICE void set(int64_t i, float value) const {
    switch (dtype) {
      case DType::f16: static_cast<f16*>(data)[i] = from_float<f16>(value); return;
      case DType::bf16: static_cast<bf16*>(data)[i] = from_float<bf16>(value); return;
      case DType::f64: static_cast<double*>(data)[i] = value; return;
      default: static_cast<float*>(data)[i] = value;
    }
  }
};

inline AnyVector vector_of(const Tensor& t) { return {t.data, t.dtype}; }

// ---- activations, four pixels per thread ---------------------------------------------------------------------------

struct MapView {
  const void* data;
  int64_t s_batch, s_channel, s_row, s_column;

  // The plane of a channel.
  template <class T>
  MIRAGE_DEVICE const T* plane(int64_t sample, int64_t channel) const {
    return static_cast<const T*>(data) + sample * s_batch + channel * s_channel;
  }
};

// The layout of the pixels of a plane, common to all tensors of a call.
struct Pixels {
  int count, width;
  bool packed;  // four neighbours are one aligned access in every tensor; `count` is a multiple of four
};

// Pixel j of the four that each of `kThreads` threads has, counted from pixel `first` on: neighbours if pixels are
// packed, else kThreads apart, so that threads access neighbours.
template <int kThreads>
MIRAGE_DEVICE int pixel_of(const Pixels& pixels, int first, int thread, int j) {
  return pixels.packed ? first + 4 * thread + j : first + j * kThreads + thread;
}

// Loads the four pixels of a thread; zero beyond the last pixel.
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
    const bool in_bounds = n < pixels.count;
    const int64_t offset = n / pixels.width * map.s_row + n % pixels.width * map.s_column;
    value[j] = in_bounds ? to_float(plane[offset]) : 0.0f;
  }
}

// Stores the four pixels of a thread to a contiguous plane.
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

inline MapView map_of(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2], t.stride[3]}; }

// Whether each plane is a contiguous run of pixels, in which every group of four is aligned.
inline bool is_packed(const Tensor& t) {
  const int64_t pixels = t.size[2] * t.size[3];
  const auto neighbours = [&](int d, int64_t stride) { return t.size[d] == 1 || t.stride[d] == stride; };
  return pixels % 4 == 0 && neighbours(3, 1) && neighbours(2, t.size[3]) && (t.size[0] == 1 || t.stride[0] % 4 == 0) &&
         (t.size[1] == 1 || t.stride[1] % 4 == 0) &&
         reinterpret_cast<uintptr_t>(t.data) % uint64_t(4 * bytes_of(t.dtype)) == 0;
}

// The layout of tensors with the planes of `model`, inputs and results. Throws std::invalid_argument for more pixels
// than kernels can count.
inline Pixels pixels_of(const char* argument, const Tensor& model, std::initializer_list<const Tensor*> maps) {
  const int64_t count = model.size[2] * model.size[3];
  if (count > INT32_MAX / 2) fail(argument, "at most " + std::to_string(INT32_MAX / 2) + " pixels", shape_of(model));
  bool packed = is_packed(model);
  for (const Tensor* t : maps) packed = packed && is_packed(*t);
  return {int(count), int(model.size[3]), packed};
}

// Calls function(T()) with the storage type of a dtype.
template <class Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::f16: return function(f16());
    case DType::bf16: return function(bf16());
    default: return function(float());
  }
}

// ---- activations, a walk along the plane ---------------------------------------------------------------------------

struct Planes {
  const void* data;
  int64_t s_batch, s_channel, s_row, s_pixel;
  int width;
  bool is_flat_plane;  // pixels of a plane are equally spaced, as in one long row; `width` is then not used

  // The offset of pixel n in its plane.
  MIRAGE_DEVICE int64_t offset(int n) const {
    const int row = is_flat_plane ? 0 : n / width;
    return row * s_row + (n - row * width) * s_pixel;
  }

  // Pixel n of a sample's first channel.
  template <class T>
  MIRAGE_DEVICE const T* pixel(int sample, int n) const {
    return static_cast<const T*>(data) + sample * s_batch + offset(n);
  }
};

// Walks over every 32nd pixel of `plane` from n on; a step is one addition if the plane is flat.
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
    at = planes.is_flat_plane ? at + kLanes * planes.s_pixel : plane + planes.offset(n);
  }
};

inline Planes planes_of(const Tensor& x) {
  const int64_t height = x.size[2], width = x.size[3];
  Planes p{x.data, x.stride[0], x.stride[1], x.stride[2], x.stride[3], int(width), false};
  if (x.size[0] == 1) p.s_batch = 0;
  if (x.size[1] == 1) p.s_channel = 0;
  if (width == 1) p.s_pixel = p.s_row;
  p.is_flat_plane = height == 1 || width == 1 || p.s_row == width * p.s_pixel;
  return p;
}

// Whether pixels 2n and 2n + 1 of every plane are one aligned access. The number of pixels is even.
inline bool are_pairs(const Planes& p, DType dtype) {
  return p.s_pixel == 1 && (p.is_flat_plane || (p.width % 2 == 0 && p.s_row % 2 == 0)) && p.s_channel % 2 == 0 &&
         p.s_batch % 2 == 0 &&
         reinterpret_cast<uintptr_t>(p.data) % uintptr_t(2 * bytes_of(dtype)) == 0;
}

// Throws unless 32-bit integers can count the channels, the pixels of a plane and the tiles of 32 pixels.
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

// kPack neighbouring pixels in their storage format: what a thread holds of them until it needs their values.
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
