// Products over channels of every instruction set against the sums written out: rows that fill a block of registers and those
// that are left, one vector of pixels to several blocks, one tap and nine. What lies around the operands is NaN.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "common/cpu/dtypes.h"
#include "common/cpu/gemm.h"

using namespace mirage::cpu::MIRAGE_ISA;

namespace {

using mirage::test::value;

template <class A>
std::vector<A> values(int64_t n, int64_t behind) {
  std::vector<A> out(size_t(n + behind), std::numeric_limits<A>::quiet_NaN());
  for (int64_t i = 0; i < n; ++i) out[size_t(i)] = A(value());
  return out;
}

// Every row m and pixel is handed out once, with its sum; at(k, p) is what column k of the matrix is multiplied by.
template <class A, class Rows, class At>
void compare(const char* what, const std::vector<A>& a, int64_t rows, int64_t columns, const Rows& b, int64_t pixels, At at) {
  const A untouched = A(1e30);
  std::vector<A> found(size_t((rows + 6) * pixels), untouched);
  std::vector<int> times(size_t(rows), 0);
  mix(Matrix<A>{a.data(), columns}, rows, b, pixels, by_row([&](int64_t m, int64_t p, auto& v) {
        store_each(found.data() + m * pixels + p, v);
        if (m < rows) times[size_t(m)] += int(sizeof(v) / sizeof(v[0]));
      }));
  for (int64_t m = 0; m < rows; ++m) {
    CHECK(times[size_t(m)] * kLanes<A> == pixels, "%s, %d x %d, %d pixels: row %d has %d vectors", what, int(rows), int(columns),
          int(pixels), int(m), times[size_t(m)]);
    for (int64_t p = 0; p < pixels; ++p) {
      double expected = 0, size = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double product = double(a[size_t(m * columns + k)]) * double(at(k, p));
        expected += product;
        size += std::fabs(product);
      }
      const double error = std::fabs(double(found[size_t(m * pixels + p)]) - expected);
      CHECK(error <= double(columns) * double(std::numeric_limits<A>::epsilon()) * size, "%s, %d x %d, %d pixels: [%d, %d] is off by %g",
            what, int(rows), int(columns), int(pixels), int(m), int(p), error);
    }
  }
  for (size_t i = size_t(rows * pixels); i < found.size(); ++i) {
    CHECK(found[i] == untouched, "%s, %d x %d, %d pixels: written behind the last row", what, int(rows), int(columns), int(pixels));
  }
}

template <class A>
void run() {
  constexpr int64_t L = kLanes<A>;
  for (int64_t rows = 1; rows <= 14; ++rows) {
    for (int64_t depth : {1, 2, 7, 33, 70}) {
      const std::vector<A> a = values<A>(rows * depth, 64), taps = values<A>(rows * depth * 9, 64);
      for (int64_t vectors = 1; vectors <= 9; ++vectors) {
        const int64_t pixels = vectors * L, stride = pixels + 3 * L;
        const std::vector<A> b = values<A>(depth * stride, 64);
        compare("one tap", a, rows, depth, PixelRows<A>{b.data(), stride, depth}, pixels,
                [&](int64_t k, int64_t p) { return b[size_t(k * stride + p)]; });
        const int64_t line = pixels + 2, wide = 3 * line + L;
        const std::vector<A> around = values<A>(depth * wide, 64);
        compare("nine taps", taps, rows, 9 * depth, TapRows<3, A>{around.data(), wide, depth, line}, pixels,
                [&](int64_t k, int64_t p) { return around[size_t(k % depth * wide + k / depth / 3 * line + k / depth % 3 + p)]; });
      }
    }
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  run<float>();
  run<double>();
  return mirage::test::finish();
}
