// What the backward passes of the stages share: sums over all tiles whose bits do not depend on the thread count,
// matrix products for weight gradients, transposed weights.
#pragma once

#include "inner_tile.h"
#include "operands.h"
#include "outer.h"
#include "parallel.h"

namespace mirage::cpu::MIRAGE_ISA {

// Tiles in chunks, each with sums of its own: at most 16, cut by the number of tiles alone, so that the sums have the
// same bits at every thread count.
struct Chunks {
  int64_t units, count;
  explicit Chunks(int64_t n) : units(n), count(n < 16 ? n : 16) {}
  int64_t begin(int64_t chunk) const { return units * chunk / count; }
};

// f(unit, sums, scratch) for every unit; sums: [chunks, size], cleared first. total (double) += the sums, in order.
template <class A, class F>
inline void sum_over_units(int64_t units, int64_t size, int64_t scratch_size, double* total, const F& f) {
  const Chunks chunks(units);
  Buffer<A> partial(chunks.count * size);
  parallel_units<A>(chunks.count, scratch_size, [&](int64_t chunk, A* scratch) {
    A* const sums = partial.get() + chunk * size;
    for (int64_t i = 0; i < size; ++i) sums[i] = A(0);
    for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1); ++unit) f(unit, sums, scratch);
  });
  constexpr int64_t block = 4096;
  parallel_units<A>((size + block - 1) / block, 0, [&](int64_t part, A*) {
    const int64_t end = smaller((part + 1) * block, size);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      for (int64_t i = part * block; i < end; ++i) total[i] += partial[chunk * size + i];
    }
  });
}

// A copy of a matrix [rows, depth], transposed.
template <class A>
struct Transposed {
  Buffer<A> data;
  int64_t columns;  // of the transposed matrix

  Transposed(const A* matrix, int64_t rows, int64_t depth) : data(rows * depth), columns(rows) {
    for (int64_t first = 0; first < depth; first += 8) {  // few lines of the result at a time: they may share a set
      const int64_t end = smaller(first + 8, depth);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t k = first; k < end; ++k) data[k * rows + m] = matrix[m * depth + k];
      }
    }
  }
  const A* get() const { return data.get(); }
  Matrix<A> from(int64_t column) const { return {data.get() + column, columns}; }
};

}  // namespace mirage::cpu::MIRAGE_ISA
