// The pixels of one plane (one sample, one channel) as a line of H * W elements, whatever the strides.
#pragma once

#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {

// Strides of a plane of H rows of `width` elements.
struct Plane {
  int64_t width;
  int64_t row;    // stride between rows
  int64_t pixel;  // stride between neighbours of a row

  // True when all pixels are equally spaced, so that the plane is one long row.
  MIRAGE_INLINE bool is_line() const { return row == width * pixel; }
  MIRAGE_INLINE bool is_dense() const { return is_line() && pixel == 1; }
};

// Pixels [begin, begin + n) of the plane at p, converted to the accumulator type.
template <class T>
inline void load_pixels(const T* p, const Plane& plane, int64_t begin, int64_t n, Acc<T>* out) {
  if (plane.is_line()) return load_row(p + begin * plane.pixel, plane.pixel, n, out);
  int64_t row = begin / plane.width, column = begin % plane.width;
  while (n > 0) {
    const int64_t run = n < plane.width - column ? n : plane.width - column;
    load_row(p + row * plane.row + column * plane.pixel, plane.pixel, run, out);
    out += run;
    n -= run;
    column = 0;
    ++row;
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
