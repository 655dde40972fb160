// A call on a part of a feature map: what it is given of the map, and which part of the result it makes.
#pragma once

#include <string>

#include "mirage/tensor.h"

namespace mirage {

// The tensor of a call is a window into a map of height x width pixels, whose pixel (0, 0) is the map's (row, column).
struct Window {
  int64_t height, width, row, column;
};

// A stretch of rows or columns of the map, cut into pieces: positions at[0] < ... < at[count].
struct Cuts {
  const int64_t* at;
  int64_t count;

  int64_t first() const { return at[0]; }
  int64_t stop() const { return at[count]; }
  int64_t length() const { return stop() - first(); }
};

// Zeros stand for what lies outside the map, so the window has to hold `halo` pixels around the result, or as many as the
// map has there.
inline void check_cuts(const char* argument, const Cuts& cuts, int64_t map, int64_t begin, int64_t size, int64_t halo) {
  if (cuts.count < 1) fail(argument, "at least two positions", std::to_string(cuts.count + 1));
  for (int64_t i = 0; i < cuts.count; ++i) {
    if (cuts.at[i] >= cuts.at[i + 1]) {
      fail(argument, "ascending positions", std::to_string(cuts.at[i]) + " before " + std::to_string(cuts.at[i + 1]));
    }
  }
  if (cuts.first() < 0 || cuts.stop() > map) {
    fail(argument, "positions from 0 to " + std::to_string(map),
         std::to_string(cuts.first()) + " to " + std::to_string(cuts.stop()));
  }
  const int64_t low = cuts.first() < halo ? 0 : cuts.first() - halo;
  const int64_t high = map - cuts.stop() < halo ? map : cuts.stop() + halo;
  if (begin > low || begin + size < high) {
    fail(argument, "positions whose halo of " + std::to_string(halo) + " pixels x holds",
         std::to_string(cuts.first()) + " to " + std::to_string(cuts.stop()) + " of x from " + std::to_string(begin) +
             " to " + std::to_string(begin + size));
  }
}

inline void check_window(const Tensor& x, const Window& window) {
  if (window.row < 0 || window.column < 0 || window.row + x.size[2] > window.height ||
      window.column + x.size[3] > window.width) {
    fail("x", "a window into a map of " + std::to_string(window.height) + "x" + std::to_string(window.width) + " pixels",
         shape_of(x) + " from row " + std::to_string(window.row) + " and column " + std::to_string(window.column));
  }
}

// A map of any strides but the last, which is that of lines without gaps.
inline void check_lines(const char* argument, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) {
  check_dtype(argument, t, dtype);
  check_shape(argument, t, shape);
  if (t.size[3] > 1 && t.stride[3] != 1) fail(argument, "lines without gaps", "other strides");
}

// A window's tensor as if it were the whole map. Only what the window holds may be touched.
inline Tensor whole_map(Tensor t, const Window& window) {
  t.data = static_cast<char*>(t.data) -
           (window.row * t.stride[2] + window.column * t.stride[3]) * bytes_of(t.dtype);
  t.size[2] = window.height;
  t.size[3] = window.width;
  return t;
}

}  // namespace mirage
