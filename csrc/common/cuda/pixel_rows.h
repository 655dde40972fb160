// Tiles of pixels as rows of channels, and products with them: what convolutions between all channels are made of.
//
// A tap of a 3x3 convolution is a product with pixels shifted by one. With a row of pixels for each channel (tiles.h)
// that is a shift by one element, where ldmatrix wants its rows at multiples of 16 bytes. With a row of channels for each
// pixel it is a shift by one row, and every row begins at such a multiple: one copy of a tile serves all nine taps, as
// the right factor of a product over channels and, read transposed, of one over pixels.
#pragma once

#include <type_traits>

#include "products.h"
#include "tiles.h"

namespace mirage::cuda {

// A tensor [B, C, H, W].
struct PixelMap {
  const void* data;
  int64_t s_batch, s_row, s_column;
  int64_t channel_bytes;  // from one channel to the next
  int batch, channels, height, width;
};

// Lines of `length` pixels, up to 256. Which one pixel n is in, of so few that 2^16 holds n times the length, is found
// without a division: factor is the next integer above 2^16 / length.
struct Lines {
  int length, factor;

  explicit Lines(int length = 1) : length(length), factor((1 << 16) / length + 1) {}

  MIRAGE_DEVICE int row(int n) const { return n * factor >> 16; }
  MIRAGE_DEVICE int column(int n) const { return n - row(n) * length; }
};

// Channels that are stored together: 16 bytes of a row.
template <class T> constexpr int kChannelGroup = 16 / int(sizeof(T));

// Pixel n of a window from `at` on, of channel 0; none outside the image.
template <class T>
MIRAGE_DEVICE const T* pixel_of(const PixelMap& map, const Corner& at, const Lines& lines, int n) {
  const int row = at.row + lines.row(n), column = at.column + lines.column(n);
  if (row < 0 || row >= map.height || column < 0 || column >= map.width) return nullptr;
  return static_cast<const T*>(map.data) + at.sample * map.s_batch + row * map.s_row + column * map.s_column;
}

// Channels `first` and following of a pixel, below `last`; zero where there is none.
template <class T>
MIRAGE_DEVICE void load_group(const PixelMap& map, const T* pixel, int first, int last, T (&value)[kChannelGroup<T>]) {
  const char* from = reinterpret_cast<const char*>(pixel) + first * map.channel_bytes;
  const int known = pixel ? last - first : 0;
  if (known >= kChannelGroup<T>) {
#pragma unroll
    for (int i = 0; i < kChannelGroup<T>; ++i, from += map.channel_bytes) value[i] = *reinterpret_cast<const T*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kChannelGroup<T>; ++i, from += map.channel_bytes) {
      value[i] = i < known ? *reinterpret_cast<const T*>(from) : from_float<T>(0.0f);
    }
  }
}

// As products of `Kind` take them: the tensor cores' TF32 is rounded once, here.
template <class Kind>
MIRAGE_DEVICE typename Kind::Element as_factor(typename Kind::Element x) {
  if constexpr (std::is_same_v<Kind, TensorCoresTf32>) return bit_cast<float>(to_tf32(x));
  else return x;
}

template <class Kind, class T = typename Kind::Element>
MIRAGE_DEVICE void store_group(T* place, const T (&value)[kChannelGroup<T>]) {
  Packed<uint32_t, 4> words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIsHalf<T>) words.value[i] = value[2 * i].bits | uint32_t(value[2 * i + 1].bits) << 16;
    else words.value[i] = bit_cast<uint32_t>(as_factor<Kind>(value[i]));
  }
  *reinterpret_cast<Packed<uint32_t, 4>*>(place) = words;
}

// ---- products over channels ----------------------------------------------------------------------------------------

// Where in a run of 16 pixels, whose rows are `pitch` apart, this lane reads its part of a right factor.
template <class Kind>
MIRAGE_DEVICE int lane_in_run(int pitch) {
  using T = typename Kind::Element;
  const int lane = lane_index();
  if (std::is_same_v<Kind, ExactFloat>) return lane % 4 * 2 * pitch;
  return (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * kChannelGroup<T>;
}

// acc += panel [16 MT, kDepth] x pixels [kDepth, 32]: two runs of 16 pixels. `panel`: see store_panel in products.h, of
// factors. A row of ldmatrix is 16 bytes, four floats of TF32 or eight of 16 bits: the same lane, and the same address.
template <int kDepth, class Kind, class T, int MT>
MIRAGE_DEVICE void multiply_pixels(Kind, const T* panel, const T* const (&run)[2], int, float (&acc)[MT][4][4]) {
  constexpr int kStep = 2 * kChannelGroup<T>;
#pragma unroll
  for (int k = 0; k < kDepth / kStep; ++k) {
    uint32_t b[4][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t four[4];
      load_rows(four, run[j] + k * kStep);
      b[2 * j][0] = four[0], b[2 * j][1] = four[1], b[2 * j + 1][0] = four[2], b[2 * j + 1][1] = four[3];
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const auto packed =
          reinterpret_cast<const Packed<uint32_t, 4>*>(panel)[(m * (kDepth / kStep) + k) * kLanes + lane_index()];
      const uint32_t a[4] = {packed.value[0], packed.value[1], packed.value[2], packed.value[3]};
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply_add<T>(acc[m][n], a, b[n]);
    }
  }
}

template <int kDepth, int MT>
MIRAGE_DEVICE void multiply_pixels(ExactFloat, const float* panel, const float* const (&run)[2], int pitch,
                                   float (&acc)[MT][4][4]) {
  const int g = lane_index() / 4;
#pragma unroll 2
  for (int k = 0; k < kDepth; k += 2) {
    float b[4][2][2];  // [fragment][column][k]
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) load_packed<2>(run[n / 2] + (n % 2 * 8 + i) * pitch + k, b[n][i]);
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float a[2];
        load_packed<2>(panel + (m * kDepth + k + j) * 16 + 2 * g, a);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] = fmaf(a[i / 2], b[n][i % 2][j], acc[m][n][i]);
        }
      }
    }
  }
}

// ---- products over pixels ------------------------------------------------------------------------------------------

// In a window of lines of `line` pixels.
template <int kTaps>
MIRAGE_DEVICE int tap_offset(int tap, int line) { return kTaps == 1 ? 0 : tap / 3 * line + tap % 3; }

// acc[tap] += left^T right for each tap, over a run of 16 pixels of which `count` are in the image: 16 MT channels of
// `left` and 8 NT of `right`, a window, from where the run's own begins. Left has zeros behind `count`; right has pixels
// there, which may be infinite, and are left out.
template <class T, int kTaps, int MT, int NT>
MIRAGE_DEVICE void multiply_over_pixels(TensorCores16<T>, const T* left, int left_pitch, const T* right,
                                        int right_pitch, int line, int count, float (&acc)[kTaps][MT][NT][4]) {
  const int lane = lane_index(), t = lane % 4;
  uint32_t a[MT][4], known[2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    load_transposed(a[m], left + (lane / 16 * 8 + lane % 8) * left_pitch + 16 * m + lane / 8 % 2 * 8);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = 8 * i + 2 * t;
    known[i] = (n < count ? 0xffffu : 0u) | (n + 1 < count ? 0xffff0000u : 0u);
  }
  right += lane % 16 * right_pitch;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const T* row = right + tap_offset<kTaps>(tap, line) * right_pitch;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t b[2];
      load_transposed(b, row + 8 * n);
      b[0] &= known[0], b[1] &= known[1];
#pragma unroll
      for (int m = 0; m < MT; ++m) multiply_add<T>(acc[tap][m][n], a[m], b);
    }
  }
}

template <int kTaps, int MT, int NT>
MIRAGE_DEVICE void multiply_over_pixels(TensorCoresTf32, const float* left, int left_pitch, const float* right,
                                        int right_pitch, int line, int count, float (&acc)[kTaps][MT][NT][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[m][i] = bit_cast<uint32_t>(left[(8 * half + t + i / 2 * 4) * left_pitch + 16 * m + g + i % 2 * 8]);
      }
    }
    const bool known[2] = {8 * half + t < count, 8 * half + t + 4 < count};
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const float* row = right + (tap_offset<kTaps>(tap, line) + 8 * half + t) * right_pitch + g;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) b[i] = known[i] ? bit_cast<uint32_t>(row[4 * i * right_pitch + 8 * n]) : 0u;
#pragma unroll
        for (int m = 0; m < MT; ++m) multiply_add<float>(acc[tap][m][n], a[m], b);
      }
    }
  }
}

template <int kTaps, int MT, int NT>
MIRAGE_DEVICE void multiply_over_pixels(ExactFloat, const float* left, int left_pitch, const float* right,
                                        int right_pitch, int line, int count, float (&acc)[kTaps][MT][NT][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4, last = count < 16 ? count : 16;
#pragma unroll 1
  for (int k = 0; k < last; ++k) {
    float a[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) a[m][i] = left[k * left_pitch + 16 * m + g + 8 * i];
    }
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const float* row = right + (tap_offset<kTaps>(tap, line) + k) * right_pitch + 2 * t;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float b[2];
        load_packed<2>(row + 8 * n, b);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[tap][m][n][i] = fmaf(a[m][i / 2], b[i % 2], acc[tap][m][n][i]);
        }
      }
    }
  }
}

}  // namespace mirage::cuda
