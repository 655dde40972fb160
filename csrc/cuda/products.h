// Products over channels: weights times a tile of pixels, on tensor cores or with float multiply-adds.
//
// A warp multiplies [16 MT, K] by [K, 8 NT]. The left factor lies in shared memory in the order in which lanes want it
// ("panel"), the right one in rows of pixels. Results stay in registers: acc[m][n] is a fragment (device.h).
#pragma once

#include "device.h"

namespace mirage::cuda {

// ---- weights in global memory --------------------------------------------------------------------------------------

// All weights of a call have one type: that of the activations, or float.
struct Weight {
  const void* data;
  bool wide;  // float, whatever the activations are

  // N neighbours from `index` on.
  template <class T, int N>
  MIRAGE_DEVICE void load(int64_t index, float (&out)[N]) const {
    if (wide) {
      const float* p = static_cast<const float*>(data) + index;
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = p[i];
    } else {
      const T* p = static_cast<const T*>(data) + index;
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = to_float(p[i]);
    }
  }

  template <class T>
  MIRAGE_DEVICE float at(int64_t index) const {
    float value[1];
    load<T>(index, value);
    return value[0];
  }
};

// ---- how the factors of a product lie in shared memory -------------------------------------------------------------

// A kind of product: Element is what activations are stored as; kStep, of K, is what one turn of its loop takes.
// `place(row, k, depth)`: where element (row, k) of a panel of `depth` columns lies.

template <class T>
struct TensorCores16 {
  using Element = T;
  static constexpr int kStep = 16;

  // A unit is two neighbours in k, as one 32-bit register.
  static constexpr int kUnit = 2;
  MIRAGE_DEVICE static int place(int row, int k, int depth) {
    const int tile = row / 16 * (depth / 16) + k / 16, lane = row % 8 * 4 + k % 8 / 2;
    return (tile * kLanes + lane) * 8 + (row % 16 / 8 + k % 16 / 8 * 2) * 2 + k % 2;
  }
};

struct TensorCoresTf32 {
  using Element = float;
  static constexpr int kStep = 8;
  static constexpr int kUnit = 1;
  MIRAGE_DEVICE static int place(int row, int k, int depth) {
    const int tile = row / 16 * (depth / 8) + k / 8, lane = row % 8 * 4 + k % 4;
    return (tile * kLanes + lane) * 4 + row % 16 / 8 + k % 8 / 4 * 2;
  }
};

struct ExactFloat {
  using Element = float;
  static constexpr int kStep = 1;
  static constexpr int kUnit = 1;
  MIRAGE_DEVICE static int place(int row, int k, int depth) {
    return (row / 16 * depth + k) * 16 + row % 8 * 2 + row % 16 / 8;
  }
};

// Writes `rows` x `depth` values into a panel, all threads of the block together. `source(row, k, pair)` gives the values
// at k and k + 1 (k + 1 is not used where kUnit is 1).
template <class Kind, int kThreads, class Source>
MIRAGE_DEVICE void store_panel(typename Kind::Element* panel, int rows, int depth, Source source) {
  using T = typename Kind::Element;
  const int units = depth / Kind::kUnit;
  for (int i = thread_index(); i < rows * units; i += kThreads) {
    const int row = i / units, k = i % units * Kind::kUnit;
    float pair[2];
    source(row, k, pair);
    T* p = panel + Kind::place(row, k, depth);
    if constexpr (kIsHalf<T>) *reinterpret_cast<uint32_t*>(p) = pack<T>(pair[0], pair[1]);
    else *p = pair[0];
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

// acc += panel [16 MT, kDepth] x pixels [kDepth, 8 NT]; `pixels` points at the warp's first column, rows are `pitch` apart.
template <int kDepth, class T, int MT, int NT>
MIRAGE_DEVICE void multiply(TensorCores16<T>, const T* panel, const T* pixels, int pitch, float (&acc)[MT][NT][4]) {
  const int lane = lane_index();
  const T* row = pixels + lane % 16 * pitch + lane / 16 * 8;
#pragma unroll 2
  for (int k = 0; k < kDepth / 16; ++k, row += 16 * pitch) {
    uint32_t b[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      if (n + 1 < NT) {
        uint32_t four[4];
        load_transposed(four, row + 8 * n);
        b[n][0] = four[0], b[n][1] = four[1], b[n + 1][0] = four[2], b[n + 1][1] = four[3];
      } else {
        load_transposed(b[n], row + 8 * n - lane / 16 * 8);
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const auto packed = reinterpret_cast<const Packed<uint32_t, 4>*>(panel)[(m * (kDepth / 16) + k) * kLanes + lane];
      const uint32_t a[4] = {packed.value[0], packed.value[1], packed.value[2], packed.value[3]};
#pragma unroll
      for (int n = 0; n < NT; ++n) multiply_add<T>(acc[m][n], a, b[n]);
    }
  }
}

template <int kDepth, int MT, int NT>
MIRAGE_DEVICE void multiply(TensorCoresTf32, const float* panel, const float* pixels, int pitch,
                            float (&acc)[MT][NT][4]) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll 2
  for (int k = 0; k < kDepth / 8; ++k, pixels += 8 * pitch) {
    uint32_t b[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      b[n][0] = to_tf32(pixels[t * pitch + 8 * n + g]);
      b[n][1] = to_tf32(pixels[(t + 4) * pitch + 8 * n + g]);
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const auto packed = reinterpret_cast<const Packed<float, 4>*>(panel)[(m * (kDepth / 8) + k) * kLanes + lane];
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = to_tf32(packed.value[i]);
#pragma unroll
      for (int n = 0; n < NT; ++n) multiply_add<float>(acc[m][n], a, b[n]);
    }
  }
}

template <int kDepth, int MT, int NT>
MIRAGE_DEVICE void multiply(ExactFloat, const float* panel, const float* pixels, int pitch, float (&acc)[MT][NT][4]) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k, pixels += pitch) {
    Packed<float, 2> b[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) b[n] = *reinterpret_cast<const Packed<float, 2>*>(pixels + 8 * n + 2 * t);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const auto a = *reinterpret_cast<const Packed<float, 2>*>(panel + (m * kDepth + k) * 16 + 2 * g);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = fmaf(a.value[i / 2], b[n].value[i % 2], acc[m][n][i]);
      }
    }
  }
}

}  // namespace mirage::cuda
