// Stages in two passes, with a small matrix of each sample between them: sums of each sample over its tiles, and the pass that
// multiplies a map by that matrix and adds the residual.
#pragma once

#include "ahead.h"
#include "gemm.h"
#include "gradients.h"

namespace mirage::cpu::MIRAGE_ISA {

// f(unit, sums, scratch) for the tiles of all samples, one after the other; total [samples, size] (double) = the sums of each
// sample. As with sum_over_units the sums have the same bits at every thread count: a sample's tiles are cut into chunks by
// their number and that of the samples alone.
template <class A, class F>
inline void sum_by_sample(int64_t samples, int64_t tiles, int64_t most_chunks, int64_t size, int64_t scratch,
                          double* total, const F& f) {
  const int64_t wanted = (most_chunks + samples - 1) / samples, chunks = smaller(tiles, wanted);
  Buffer<A> partial(samples * chunks * size);
  parallel_units<A>(samples * chunks, scratch, [&](WorkUnit chunk, A* room) {
    const int64_t sample = chunk / chunks, part = chunk % chunks;
    A* const sums = partial.get() + chunk * size;
    for (int64_t i = 0; i < size; ++i) sums[i] = A(0);
    const int64_t begin = tiles * part / chunks, end = tiles * (part + 1) / chunks;
    for (int64_t t = begin; t < end; ++t) f(WorkUnit{sample * tiles + t, t > begin || chunk.follows}, sums, room);
  });
  clear_sums(total, samples * size);
  add_chunks(partial.get(), samples, chunks, size, total);
}

// y = x + scale * (matrix * v + bias), tile by tile. matrix: [C, channels of v] for each sample, one below the other; v:
// contiguous, may be y itself; scale: a number for each channel, or null for ones.
template <class T>
inline void apply_by_sample(const Tensor& x, const Matrix<Operand<T>>& matrix, const Tensor& v, const Acc<T>* bias,
                            const Tensor& y, const Acc<T>* scale = nullptr) {
  using A = Acc<T>;
  using P = Operand<T>;
  const int64_t C = x.size[1], M = v.size[1], room = C > M ? C : M;
  const Tiling tiling = choose_pointwise<A>(x.size[2], x.size[3], room + C);
  const int64_t I = tiling.outer_capacity<A>(), tiles = tiling.count();
  const auto tile_of = [&](int64_t i) { return tiling.tile<A>(i); };
  parallel_units<A>(x.size[0] * tiles, (room + C) * I, [&](int64_t unit, A* scratch) {
    A *const rows = scratch, *const out = rows + room * I;
    const int64_t sample = unit / tiles;
    const Tile tile = tile_of(unit % tiles);
    // y is written where x or v was read, or prefetched as it is.
    Ahead ahead{TileLines::after<T>(unit, v, tiles, 0, tile_of), TileLines::of<T>(x, sample, tile)};
    load_tile(v.as<const T>() + sample * v.stride[0], v, tile, M, I, rows);
    const P* const in = operand_rows<P>(rows, M, I, tile.outer_pixels, rows);
    mix(matrix.at(sample * C), C, M, in, I, tile.outer_pixels,
        by_row([&](int64_t m, int64_t p, auto& values) {
          add_to_each(values, bias[m]);
          store_each(out + m * I + p, values);
          ahead.step<A, sizeof(values) / sizeof(values[0])>(1);
        }));
    add_dense(x.as<const T>() + sample * x.stride[0], x, tile, C, I, out, y.as<T>() + sample * y.stride[0], y, rows,
              scale);
  });
}

}  // namespace mirage::cpu::MIRAGE_ISA
