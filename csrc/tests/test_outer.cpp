// Weight gradients of every instruction set against the sums written out: few channels and many, pixels that fill no vector,
// tiles with a halo. What lies around the operands is NaN, and has to stay out of the sums.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "common/cpu/gradients.h"

using namespace mirage::cpu::MIRAGE_ISA;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

using mirage::test::value;

// Rows of the dense pixels of a tile, with zeros up to a whole vector and NaN behind.
template <class A>
std::vector<A> dense_rows(int64_t rows, int64_t pixels, int64_t stride) {
  std::vector<A> out(size_t(rows * stride), A(kNaN));
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t p = 0; p < whole_vectors<A>(pixels); ++p) out[size_t(m * stride + p)] = p < pixels ? A(value()) : A(0);
  }
  return out;
}

// sums [rows, channels + 1] of a tile against a [rows, stride] times b, whose pixel (r, i) is at(k, r, i).
template <class A, class At>
void compare(const char* what, const std::vector<A>& sums, const std::vector<A>& a, int64_t stride, int64_t rows,
             int64_t channels, const Tile& tile, At at) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < channels; ++k) {
      double expected = 1, size = 1;
      for (int64_t p = 0; p < tile.rows * tile.columns; ++p) {
        const double product = double(a[size_t(m * stride + p)]) * double(at(k, p / tile.columns, p % tile.columns));
        expected += product;
        size += std::fabs(product);
      }
      const double found = double(sums[size_t(m * (channels + 1) + k)]), error = std::fabs(found - expected);
      CHECK(error <= 16 * double(std::numeric_limits<A>::epsilon()) * size, "%s, %d x %d, %d x %d pixels, halo %d: [%d, %d] is %g, not %g",
            what, int(rows), int(channels), int(tile.rows), int(tile.columns), int(tile.halo), int(m), int(k), found, expected);
    }
    CHECK(sums[size_t(m * (channels + 1) + channels)] == A(1), "%s, %d x %d writes behind its row %d", what, int(rows),
          int(channels), int(m));
  }
}

template <class A>
void tile_sums(int64_t rows, int64_t channels, int64_t height, int64_t width, int64_t halo) {
  const Tiling tiling{height, width, halo, height, width};
  const Tile tile = tiling.tile<A>(0);
  const int64_t outer = tiling.outer_capacity<A>(), inner = dense_capacity<A>(tiling);
  std::vector<A> in(size_t(channels * outer), A(kNaN));
  const auto at = [&](int64_t k, int64_t r, int64_t i) -> A& {
    return in[size_t(k * outer + (r + halo) * tile.stride + halo + i)];
  };
  for (int64_t k = 0; k < channels; ++k) {
    for (int64_t p = 0; p < height * width; ++p) at(k, p / width, p % width) = A(value());
  }
  const std::vector<A> a = dense_rows<A>(rows, height * width, inner);
  std::vector<A> sums(size_t(rows * (channels + 1)), A(1)), room(size_t(OuterOperand<A>::size(channels, inner)), A(kNaN));
  const OuterOperand<A> b{room.data(), channels, inner};
  put_dense(in.data(), outer, tile, b);
  add_outer(a.data(), inner, rows, b, dense_pixels<A>(tile), sums.data(), channels + 1);
  compare("operand of several", sums, a, inner, rows, channels, tile, at);

  std::vector<A> once(size_t(rows * (channels + 1)), A(1)), dense(size_t(channels * inner), A(kNaN));
  copy_dense(in.data(), outer, tile, channels, dense.data(), inner);
  add_outer(a.data(), inner, rows, dense.data(), inner, channels, dense_pixels<A>(tile), once.data(), channels + 1);
  compare("operand of one", once, a, inner, rows, channels, tile, at);
}

// A matrix of so many elements that several threads transpose it, and sums that are put as one.
template <class A>
void matrices(int64_t rows, int64_t columns) {
  std::vector<A> matrix(size_t(rows * columns));
  std::vector<double> sums(size_t(rows * columns));
  for (size_t i = 0; i < matrix.size(); ++i) {
    matrix[i] = A(value());
    sums[i] = value();
  }
  const auto last_first = [&](int64_t row) { return rows - 1 - row; };
  const Transposed<A> plain(matrix.data(), rows, columns), turned(matrix.data(), rows, columns, last_first);
  std::vector<A> out(matrix.size());
  const mirage::Tensor view{out.data(), kDTypeOf<A>, 2, {rows, columns}, {columns, 1}};
  put_transposed_sums<A>(sums.data(), view);
  int wrong = 0;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < columns; ++k) {
      const A element = matrix[size_t(m * columns + k)];
      wrong += plain.get()[k * rows + m] != element || turned.get()[k * rows + rows - 1 - m] != element;
      wrong += out[size_t(m * columns + k)] != A(sums[size_t(k * rows + m)]);
    }
  }
  CHECK(wrong == 0, "%d elements of %d x %d", wrong, int(rows), int(columns));
  put_sums<A>(sums.data(), view, 0.5);
  for (size_t i = 0; i < out.size(); ++i) wrong += out[i] != A(sums[i] * 0.5);
  clear_sums(sums.data(), int64_t(sums.size()));
  for (const double sum : sums) wrong += sum != 0;
  CHECK(wrong == 0, "%d sums of %d x %d put or cleared", wrong, int(rows), int(columns));
}

template <class A>
void run() {
  for (int64_t rows : {1, 6, 13, 48, 50}) {
    for (int64_t channels : {1, 3, 15, 16, 31, 33, 48, 65, 100}) {
      tile_sums<A>(rows, channels, 1, 1, 1);
      tile_sums<A>(rows, channels, 3, 7, 2);
      tile_sums<A>(rows, channels, 5, 33, 1);
      tile_sums<A>(rows, channels, 6, 16, 0);
      tile_sums<A>(rows, channels, 7, 19, 0);
    }
  }
  for (int64_t rows : {1, 7, 130, 513}) {
    for (int64_t columns : {1, 9, 300}) matrices<A>(rows, columns);
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  run<float>();
  run<double>();
  return mirage::test::finish();
}
