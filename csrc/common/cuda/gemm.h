// Matrix products (GEMM) of one thread block: weights times a tile of pixels, on tensor cores or with float FMAs.
//
// Each warp multiplies [16 MT, K] by [K, 8 NT]. The left operand is a panel: a matrix stored in shared memory fragment
// by fragment, so that a lane loads what the MMA wants of it as one vector. The right operand is stored as rows of
// pixels. Accumulators stay in registers: acc[m][n] is a fragment (device.h).
#pragma once

#include "device.h"

namespace mirage::cuda {

// ---- weights in global memory --------------------------------------------------------------------------------------

// A weight tensor of type W. All weights of a call have the same type, that of the activations or float.
template <class W>
struct Weights {
  const W* data;

  MIRAGE_DEVICE float operator[](int64_t index) const { return to_float(data[index]); }
};

// ---- math modes, and the panels of their left operands -------------------------------------------------------------

// A math mode, which kernels take as template parameter `Kind`: TensorCores16, TensorCoresTf32 or ExactFloat. `Element`
// is the storage type of the activations. Panels are written kUnit neighbours in k at a time. `place(row, k, depth)` is
// the index of element (row, k) in a panel of `depth` columns.

template <class T>
struct TensorCores16 {
  using Element = T;
  static constexpr int kUnit = 2;
  MIRAGE_DEVICE static int place(int row, int k, int depth) {
    const int tile = row / 16 * (depth / 16) + k / 16, lane = row % 8 * 4 + k % 8 / 2;
    return (tile * kLanes + lane) * 8 + (row % 16 / 8 + k % 16 / 8 * 2) * 2 + k % 2;
  }
};

struct TensorCoresTf32 {
  using Element = float;
  static constexpr int kUnit = 1;
  MIRAGE_DEVICE static int place(int row, int k, int depth) {
    const int tile = row / 16 * (depth / 8) + k / 8, lane = row % 8 * 4 + k % 4;
    return (tile * kLanes + lane) * 4 + row % 16 / 8 + k % 8 / 4 * 2;
  }
};

struct ExactFloat {
  using Element = float;
  static constexpr int kUnit = 1;
  MIRAGE_DEVICE static int place(int row, int k, int depth) {
    return (row / 16 * depth + k) * 16 + row % 8 * 2 + row % 16 / 8;
  }
};

// Writes a panel of kRows x kDepth; all threads of the block take part. `source(row, k, pair)` provides the elements at
// k and k + 1 (k + 1 is ignored if kUnit is 1).
template <class Kind, int kRows, int kDepth, int kThreads, class Source>
MIRAGE_DEVICE void store_panel(typename Kind::Element* panel, Source source) {
  using T = typename Kind::Element;
  constexpr int kUnits = kDepth / Kind::kUnit, kTurns = (kRows * kUnits + kThreads - 1) / kThreads;
  constexpr int kTogether = kTurns < 2 ? kTurns : 2;  // loads in flight per thread, in units of kUnit
#pragma unroll 1
  for (int first = 0; first < kTurns; first += kTogether) {
    float pair[kTogether][2] = {};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = (first + j) * kThreads + thread_index();
      if (i < kRows * kUnits) source(i / kUnits, i % kUnits * Kind::kUnit, pair[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = (first + j) * kThreads + thread_index();
      if (i >= kRows * kUnits) continue;
      T* p = panel + Kind::place(i / kUnits, i % kUnits * Kind::kUnit, kDepth);
      if constexpr (kIsHalf<T>) *reinterpret_cast<uint32_t*>(p) = pack<T>(pair[j][0], pair[j][1]);
      else *p = pair[j][0];
    }
  }
}

// ---- products with a panel -----------------------------------------------------------------------------------------

// acc += panel [16 MT, kDepth] times pixels [kDepth, 8 NT]. `pixels` points to the warp's first column, rows are
// `pitch` apart.
template <int kDepth, class T, int MT, int NT>
MIRAGE_DEVICE void multiply(TensorCores16<T>, const T* panel, const T* pixels, int pitch, float (&acc)[MT][NT][4]) {
  const int lane = lane_index();
  const T* row = pixels + lane % 16 * pitch + lane / 16 * 8;
#pragma unroll 1
  for (int k = 0; k < kDepth / 16; ++k, row += 16 * pitch) {  // unrolling by two spills on sm_80
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

// ---- products over pixels ------------------------------------------------------------------------------------------

// acc += left right^T, the sum running over kPixels pixels: 16 rows of `left` and 8 of `right`, both in shared memory.
template <int kPixels, class T>
MIRAGE_DEVICE void multiply_rows(TensorCores16<T>, const T* left, int left_pitch, const T* right, int right_pitch,
                                 float (&acc)[4]) {
  const int lane = lane_index();
  left += lane % 16 * left_pitch + lane / 16 * 8;
  right += lane % 8 * right_pitch + lane / 8 % 2 * 8;
#pragma unroll 2
  for (int n = 0; n < kPixels; n += 16) {
    uint32_t a[4], b[2];
    load_rows(a, left + n);
    load_rows(b, right + n);
    multiply_add<T>(acc, a, b);
  }
}

template <int kPixels>
MIRAGE_DEVICE void multiply_rows(TensorCoresTf32, const float* left, int left_pitch, const float* right,
                                 int right_pitch, float (&acc)[4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 2
  for (int n = t; n < kPixels; n += 8) {
    const float *upper = left + g * left_pitch + n, *lower = upper + 8 * left_pitch, *row = right + g * right_pitch + n;
    const uint32_t a[4] = {to_tf32(upper[0]), to_tf32(lower[0]), to_tf32(upper[4]), to_tf32(lower[4])};
    const uint32_t b[2] = {to_tf32(row[0]), to_tf32(row[4])};
    multiply_add<float>(acc, a, b);
  }
}

template <int kPixels>
MIRAGE_DEVICE void multiply_rows(ExactFloat, const float* left, int left_pitch, const float* right,
                                 int right_pitch, float (&acc)[4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 2
  for (int n = 0; n < kPixels; n += 4) {
    float a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_packed<4>(left + (g + 8 * i) * left_pitch + n, a[i]);
      load_packed<4>(right + (2 * t + i) * right_pitch + n, b[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i] = fmaf(a[i / 2][j], b[i % 2][j], acc[i]);
    }
  }
}

// ---- panels of a matrix in global memory ---------------------------------------------------------------------------

// Writes a panel whose sizes, multiples of 16, are run-time values; kThreads threads take part, each with kTogether
// loads in flight. For weights that are packed into global memory once, instead of for each tile.
template <class Kind, int kThreads, int kTogether, class Source>
MIRAGE_DEVICE void pack_panel(typename Kind::Element* panel, int rows, int depth, Source source) {
#pragma unroll 1
  for (int first = thread_index(); first < rows * depth; first += kTogether * kThreads) {
    float value[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = first + j * kThreads;
      value[j] = i < rows * depth ? source(i / depth, i % depth) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = first + j * kThreads;
      if (i < rows * depth)
        panel[Kind::place(i / depth, i % depth, depth)] = from_float<typename Kind::Element>(value[j]);
    }
  }
}

// A block of a matrix whose rows are `stride` apart: `rows` x `columns` elements from (row, column) on. What lies
// beyond reads as zero.
template <class W>
struct Block {
  const W* data;
  int stride, row, column, rows, columns;
};

template <class Kind, int kRows, int kDepth, int kThreads, class W>
MIRAGE_DEVICE void store_matrix(typename Kind::Element* panel, const Block<W>& block) {
  store_panel<Kind, kRows, kDepth, kThreads>(panel, [&](int row, int k, float (&pair)[2]) {
    const W* p = block.data + int64_t(block.row + row) * block.stride + block.column + k;
#pragma unroll
    for (int j = 0; j < Kind::kUnit; ++j) {
      pair[j] = row < block.rows && k + j < block.columns ? to_float(p[j]) : 0.0f;
    }
  });
}

}  // namespace mirage::cuda
