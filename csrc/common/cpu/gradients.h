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

// f(begin, end) for runs of [0, n), on several threads where there is enough to do: matrices of deep levels have millions of
// elements, for which the other threads would wait.
template <class F>
inline void parallel_runs(int64_t n, const F& f) {
  constexpr int64_t run = 16384;
  parallel_units<char>((n + run - 1) / run, 0, [&](int64_t unit, char*) { f(unit * run, smaller((unit + 1) * run, n)); });
}

inline void clear_sums(double* sums, int64_t n) {
  parallel_runs(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = 0;
  });
}

// Rounds sums to a gradient, unless it is absent.
template <class A>
inline void put_sums(const double* sums, const Tensor& out, double factor = 1) {
  if (!exists(out)) return;
  A* const to = out.as<A>();
  parallel_runs(out.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = A(sums[i] * factor);
  });
}

// The same of sums [columns, rows] to a matrix [rows, columns].
template <class A>
inline void put_transposed_sums(const double* sums, const Tensor& out) {
  const int64_t rows = out.size[0], columns = out.size[1];
  constexpr int64_t together = 64 / sizeof(double);
  const auto put = [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t m = begin; m < end; ++m) out.as<A>()[m * columns + j] = A(sums[j * rows + m]);
    }
  };
  parallel_units<char>((rows + together - 1) / together, 0, [&](int64_t unit, char*) {
    put(unit * together, smaller((unit + 1) * together, rows));
  });
}

// total [samples, size] += the sums [samples, chunks, size] of chunks, in their order.
template <class A>
inline void add_chunks(const A* sums, int64_t samples, int64_t chunks, int64_t size, double* total) {
  constexpr int64_t block = 4096;
  const int64_t blocks = (size + block - 1) / block;
  parallel_units<char>(samples * blocks, 0, [&](int64_t unit, char*) {
    const int64_t sample = unit / blocks, begin = unit % blocks * block, end = smaller(begin + block, size);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* const from = sums + (sample * chunks + chunk) * size;
      for (int64_t i = begin; i < end; ++i) total[sample * size + i] += from[i];
    }
  });
}

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
  add_chunks(partial.get(), 1, chunks.count, size, total);
}

// Puts a tile without its halo, line after line, with zeros behind the last pixel up to a whole vector.
template <class A>
inline void put_dense(const A* in, int64_t stride, const Tile& tile, const OuterOperand<A>& out) {
  if (tile.halo == 0) {
    out.put(in, stride, 0, tile.rows * tile.columns);
  } else {
    // The last vector of a line runs into the next, which is put later.
    for (int64_t r = 0; r < tile.rows; ++r) {
      out.put(in + (r + tile.halo) * tile.stride + tile.halo, stride, r * tile.columns, tile.columns);
    }
  }
  out.clear(tile.rows * tile.columns, dense_pixels<A>(tile));
}

// A copy of a matrix [rows, depth], transposed, its row m becoming column place(m).
template <class A>
struct Transposed {
  Buffer<A> data;
  int64_t columns;  // of the transposed matrix

  Transposed(const A* matrix, int64_t rows, int64_t depth) : Transposed(matrix, rows, depth, [](int64_t row) { return row; }) {}

  template <class Place>
  Transposed(const A* matrix, int64_t rows, int64_t depth, Place place) : data(rows * depth), columns(rows) {
    constexpr int64_t kLines = 8, kSmall = 16384;  // few lines of the result at a time: they may share a set
    const auto lines = [&](int64_t first, int64_t end) {
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t k = first, to = place(m); k < end; ++k) data[k * rows + to] = matrix[m * depth + k];
      }
    };
    const int64_t units = (depth + kLines - 1) / kLines, together = rows * depth > kSmall ? 1 : units;
    parallel_units<A>((units + together - 1) / together, 0, [&](int64_t unit, A*) {
      for (int64_t first = unit * together; first < smaller((unit + 1) * together, units); ++first) {
        lines(first * kLines, smaller((first + 1) * kLines, depth));
      }
    });
  }
  const A* get() const { return data.get(); }
  Matrix<A> from(int64_t column) const { return {data.get() + column, columns}; }
};

}  // namespace mirage::cpu::MIRAGE_ISA
