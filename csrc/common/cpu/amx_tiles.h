// Channel mixing of bfloat16 pairs in AMX tiles: 16 x 16 sums of 32 products each in one instruction, as many as 256 vector
// instructions of AVX-512 BF16.
//
// Packed rows (operands.h) are what a tile of the right operand holds, so nothing is copied but the finished sums. Tiles
// have the shape of what they hold: no row or column past the operands is read. Included by gemm.h.
#pragma once

#include <immintrin.h>

namespace mirage::cpu::MIRAGE_ISA {

// What ldtilecfg reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's intrinsics do not tell the compiler what memory they read.
MIRAGE_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Shapes of this thread's tiles for the rest of the scope. Tiles 0 to 3 are sums of `rows` x 16 pixels; 4 is a tile of A
// and 6 one of B, each of `deep` pairs; 5 and 7 are those for the last share of the depth, of `last` pairs.
class TilesInUse {
 public:
  TilesInUse(int64_t rows, int64_t deep, int64_t last) {
    TileShapes shapes;
    const auto set = [&](int tile, int64_t height, int64_t elements) {
      shapes.rows[tile] = uint8_t(height);
      shapes.row_bytes[tile] = uint16_t(4 * elements);
    };
    for (int tile = 0; tile < kMixVectors; ++tile) set(tile, rows, 16);
    set(4, rows, deep);
    set(5, rows, last);
    set(6, deep, 16);
    set(7, last, 16);
    finish_stores();
    _tile_loadconfig(&shapes);
  }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

template <int V>
MIRAGE_INLINE void clear_sums() {
  _tile_zero(0);
  if constexpr (V > 1) _tile_zero(1);
  if constexpr (V > 2) _tile_zero(2);
  if constexpr (V > 3) _tile_zero(3);
}

// The sums += a tile of A times V tiles of B side by side. Strides are in bytes.
#define MIRAGE_ADD_PRODUCTS(A, B)                \
  _tile_loadd(A, a, a_stride);                   \
  _tile_loadd(B, b, b_stride);                   \
  _tile_dpbf16ps(0, A, B);                       \
  if constexpr (V > 1) {                         \
    _tile_loadd(B, b + 16, b_stride);            \
    _tile_dpbf16ps(1, A, B);                     \
  }                                              \
  if constexpr (V > 2) {                         \
    _tile_loadd(B, b + 32, b_stride);            \
    _tile_dpbf16ps(2, A, B);                     \
  }                                              \
  if constexpr (V > 3) {                         \
    _tile_loadd(B, b + 48, b_stride);            \
    _tile_dpbf16ps(3, A, B);                     \
  }

template <int V>
MIRAGE_INLINE void add_product(const bf16x2* a, int64_t a_stride, const bf16x2* b, int64_t b_stride, int64_t depth,
                               int64_t deep) {
  for (; depth > deep; depth -= deep, a += deep, b += deep * b_stride / 4) {
    MIRAGE_ADD_PRODUCTS(4, 6)
  }
  MIRAGE_ADD_PRODUCTS(5, 7)
}
#undef MIRAGE_ADD_PRODUCTS

// Rows of V vectors from the sums.
template <int V>
MIRAGE_INLINE void store_sums(float* to) {
  _tile_stored(0, to, 64 * V);
  if constexpr (V > 1) _tile_stored(1, to + 16, 64 * V);
  if constexpr (V > 2) _tile_stored(2, to + 32, 64 * V);
  if constexpr (V > 3) _tile_stored(3, to + 48, 64 * V);
}

// V vectors of pixels of all rows, `high` rows of A at a time. The last ones may overlap those before, but each is
// finished once.
template <int V, class Rows, class Finish>
MIRAGE_INLINE void mix_columns(const Matrix<bf16x2>& a, int64_t rows, int64_t high, int64_t deep, const Rows& b, int64_t p,
                               Finish finish) {
  alignas(64) float sums[16 * 16 * V];
  for (int64_t next = 0; next < rows; next += high) {
    const int64_t first = next + high < rows ? next : rows - high;
    clear_sums<V>();
    b.for_each_product(p, [&](int64_t column, const bf16x2* row) {
      add_product<V>(a.data + first * a.stride + column, 4 * a.stride, row, 4 * b.stride, b.depth, deep);
    });
    store_sums<V>(sums);
    for (int64_t m = next; m < first + high; ++m) {
      Vec<float> v[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) v[j] = load(sums + ((m - first) * V + j) * 16);
      finish_row<float>(finish, m, p, v);
    }
    finish_stores();
  }
}

// mix() of gemm.h, where there is at least one row and one pair.
template <class Rows, class Finish>
inline void mix_in_tiles(const Matrix<bf16x2>& a, int64_t rows, const Rows& b, int64_t pixels, Finish finish) {
  const int64_t blocks = (rows + 15) / 16, high = (rows + blocks - 1) / blocks;
  const int64_t shares = (b.depth + 15) / 16, deep = (b.depth + shares - 1) / shares;
  const TilesInUse tiles(high, deep, b.depth - (shares - 1) * deep);
  int64_t p = 0;
  for (; p + 64 <= pixels; p += 64) mix_columns<4>(a, rows, high, deep, b, p, finish);
  switch ((pixels - p) / 16) {
    case 3: return mix_columns<3>(a, rows, high, deep, b, p, finish);
    case 2: return mix_columns<2>(a, rows, high, deep, b, p, finish);
    case 1: return mix_columns<1>(a, rows, high, deep, b, p, finish);
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
