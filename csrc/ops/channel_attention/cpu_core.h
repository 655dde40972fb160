// What the channel attention kernels share: how the work is cut, rows of pixels in cache, and the two products
// (a small matrix of inner products over pixels; a small matrix applied to rows of pixels).
#pragma once

#include "common/cpu/dtypes.h"
#include "common/cpu/parallel.h"
#include "common/cpu/pixels.h"

namespace mirage::cpu::MIRAGE_ISA {

// Units of work: (sample, head, run of pixels). A unit is processed in tiles that stay in the first-level cache. How
// the work is divided depends on the shapes alone, so that sums have the same bits at every thread count.
struct HeadWork {
  int64_t batch, heads, d, pixels;
  int64_t tile;   // pixels per tile, a multiple of every vector's lanes
  int64_t unit;   // pixels per unit, a multiple of the tile
  int64_t units;  // units per (sample, head)

  int64_t all_heads() const { return batch * heads; }
  int64_t all_units() const { return batch * heads * units; }
};

template <class A>
HeadWork head_work(const Tensor& x, int64_t heads) {
  HeadWork w{x.size[0], heads, x.size[1] / heads, x.size[2] * x.size[3], 0, 0, 0};
  w.tile = 16384 / int64_t(sizeof(A)) / (w.d > 0 ? w.d : 1) / 64 * 64;
  if (w.tile > 32 * kLanes<A>) w.tile = 32 * kLanes<A>;  // short sums in every lane
  if (w.tile < 64) w.tile = 64;
  w.unit = round_up((w.pixels + 31) / 32, w.tile);
  if (w.unit > 16 * w.tile) w.unit = 16 * w.tile;
  w.units = w.unit ? (w.pixels + w.unit - 1) / w.unit : 0;
  return w;
}

// The pixels of a unit of work.
struct UnitRange {
  int64_t sample, head, channel;  // channel: the first of the head
  int64_t begin, end;             // pixels

  UnitRange(const HeadWork& w, int64_t unit) {
    const int64_t index = unit / w.units;
    sample = index / w.heads;
    head = index % w.heads;
    channel = head * w.d;
    begin = unit % w.units * w.unit;
    end = begin + w.unit < w.pixels ? begin + w.unit : w.pixels;
  }
};

// The matrices of one (sample, head) that forward stores for backward, see mirage/channel_attention.h.
template <class A>
struct Kept {
  A *attn, *gram, *norms;

  Kept(const Tensor& matrices, int64_t index) {
    const int64_t rows = matrices.size[2], d = matrices.size[3];
    attn = static_cast<A*>(matrices.data) + index * rows * d;
    gram = attn + d * d;
    norms = gram + d * d;
  }
};

// Rows of the accumulator type, `ld` apart.
template <class A>
struct Rows {
  const A* data;
  int64_t ld;
};

// A [B, C, H, W] tensor of any strides as rows of pixels.
template <class T>
struct Source {
  const T* data;
  int64_t sample, channel;
  Plane plane;

  explicit Source(const Tensor& t)
      : data(static_cast<const T*>(t.data)), sample(t.stride[0]), channel(t.stride[1]),
        plane{t.size[3], t.stride[2], t.stride[3]} {}

  // Pixels [begin, begin + n) of `count` channels: in place where the memory allows it, else converted into `buffer`
  // [count, tile] and filled with zeros up to a whole vector.
  MIRAGE_INLINE Rows<Acc<T>> rows(int64_t b, int64_t c, int64_t count, int64_t begin, int64_t n, int64_t tile,
                                  Acc<T>* buffer) const {
    using A = Acc<T>;
    const T* first = data + b * sample + c * channel;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (n % kLanes<A> == 0 && plane.is_dense()) return {first + begin, channel};
    }
    const int64_t whole = round_up(n, kLanes<A>);
    for (int64_t i = 0; i < count; ++i) {
      load_pixels(first + i * channel, plane, begin, n, buffer + i * tile);
      for (int64_t p = n; p < whole; ++p) buffer[i * tile + p] = A(0);
    }
    return {buffer, tile};
  }
};

// A contiguous [B, C, N] result as rows: kernels write to `at` where the type and the run allow it, and otherwise to
// a buffer that `put` then stores.
template <class T>
struct Sink {
  T* data;
  int64_t channels, pixels;

  explicit Sink(const Tensor& t) : data(static_cast<T*>(t.data)), channels(t.size[1]), pixels(t.size[2] * t.size[3]) {}

  MIRAGE_INLINE T* at(int64_t b, int64_t c, int64_t p) const { return data + (b * channels + c) * pixels + p; }

  static MIRAGE_INLINE bool direct(int64_t n) { return sizeof(T) == sizeof(Acc<T>) && n % kLanes<Acc<T>> == 0; }

  MIRAGE_INLINE void put(int64_t b, int64_t c, int64_t count, int64_t p, int64_t n, const Acc<T>* in,
                         int64_t ld) const {
    for (int64_t i = 0; i < count; ++i) store_row(at(b, c + i, p), in + i * ld, n);
  }
};

// ---- products -----------------------------------------------------------------------------------------------------

// Rows of a register block, chosen so that registers are left for its operands.
constexpr int kBlockRows = MIRAGE_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kBlockColumns = 4;
constexpr int kMixVectors = MIRAGE_VECTOR_BYTES == 64 ? 4 : 2;

// sums[i, j] += x_i * y_j over n pixels, a vector of partial sums each; n is a multiple of the lanes.
template <class A, int R, int C>
inline void gram_block(Rows<A> x, Rows<A> y, int64_t n, A* sums, int64_t columns) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[R][C];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < C; ++j) acc[i][j] = load(sums + (i * columns + j) * L);
  }
  for (int64_t p = 0; p < n; p += L) {
    Vec<A> b[C];
    for (int j = 0; j < C; ++j) b[j] = load(y.data + j * y.ld + p);
    for (int i = 0; i < R; ++i) {
      const Vec<A> a = load(x.data + i * x.ld + p);
      for (int j = 0; j < C; ++j) acc[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < C; ++j) store(sums + (i * columns + j) * L, acc[i][j]);
  }
}

template <class A, int R>
inline void gram_row(Rows<A> x, Rows<A> y, int64_t n, A* sums, int64_t d) {
  for (int64_t j = 0; j < d; j += kBlockColumns) {
    const Rows<A> yj{y.data + j * y.ld, y.ld};
    A* out = sums + j * kLanes<A>;
    switch (d - j < kBlockColumns ? d - j : kBlockColumns) {
      case 1: gram_block<A, R, 1>(x, yj, n, out, d); break;
      case 2: gram_block<A, R, 2>(x, yj, n, out, d); break;
      case 3: gram_block<A, R, 3>(x, yj, n, out, d); break;
      default: gram_block<A, R, 4>(x, yj, n, out, d); break;
    }
  }
}

// sums [d, d, lanes] += x y^T over n pixels (a multiple of the lanes) of d rows each.
template <class A>
inline void gram(Rows<A> x, Rows<A> y, int64_t d, int64_t n, A* sums) {
  int64_t i = 0;
  for (; i + kBlockRows <= d; i += kBlockRows) {
    gram_row<A, kBlockRows>({x.data + i * x.ld, x.ld}, y, n, sums + i * d * kLanes<A>, d);
  }
  if (i + 2 <= d) {
    gram_row<A, 2>({x.data + i * x.ld, x.ld}, y, n, sums + i * d * kLanes<A>, d);
    i += 2;
  }
  if (i < d) gram_row<A, 1>({x.data + i * x.ld, x.ld}, y, n, sums + i * d * kLanes<A>, d);
}

// sums [d, lanes] += x_i^2 over n pixels (a multiple of the lanes).
template <class A>
inline void squares(Rows<A> x, int64_t d, int64_t n, A* sums) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + 4 <= d; i += 4) {
    const A* r = x.data + i * x.ld;
    Vec<A> acc[4];
    for (int k = 0; k < 4; ++k) acc[k] = load(sums + (i + k) * L);
    for (int64_t p = 0; p < n; p += L) {
      for (int k = 0; k < 4; ++k) {
        const Vec<A> v = load(r + k * x.ld + p);
        acc[k] += v * v;
      }
    }
    for (int k = 0; k < 4; ++k) store(sums + (i + k) * L, acc[k]);
  }
  for (; i < d; ++i) {
    Vec<A> acc = load(sums + i * L);
    for (int64_t p = 0; p < n; p += L) {
      const Vec<A> v = load(x.data + i * x.ld + p);
      acc += v * v;
    }
    store(sums + i * L, acc);
  }
}

// A d x d matrix in either orientation: element (i, j) is data[i * row + j * column].
template <class A>
struct OrientedMatrix {
  const A* data;
  int64_t row, column;
};

// One block of mix(): R rows of out at U vectors of pixels.
template <class A, int R, int U>
MIRAGE_INLINE void mix_block(OrientedMatrix<A> m, const A* x, int64_t ld, int64_t d, const A* scale, const A* z,
                             int64_t z_ld, A* out, int64_t out_ld) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[R][U];
  for (int i = 0; i < R; ++i) {
    for (int u = 0; u < U; ++u) acc[i][u] = scale ? load(z + i * z_ld + u * L) * scale[i] : Vec<A>{};
  }
  for (int64_t j = 0; j < d; ++j) {
    Vec<A> b[U];
    for (int u = 0; u < U; ++u) b[u] = load(x + j * ld + u * L);
    for (int i = 0; i < R; ++i) {
      const A w = m.data[i * m.row + j * m.column];
      for (int u = 0; u < U; ++u) acc[i][u] += b[u] * w;
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int u = 0; u < U; ++u) store(out + i * out_ld + u * L, acc[i][u]);
  }
}

template <class A, int R>
inline void mix_rows(OrientedMatrix<A> m, Rows<A> x, int64_t d, int64_t n, const A* scale, Rows<A> z, A* out, int64_t ld) {
  constexpr int L = kLanes<A>;
  int64_t p = 0;
  for (; p + kMixVectors * L <= n; p += kMixVectors * L) {
    mix_block<A, R, kMixVectors>(m, x.data + p, x.ld, d, scale, z.data + p, z.ld, out + p, ld);
  }
  for (; p < n; p += L) mix_block<A, R, 1>(m, x.data + p, x.ld, d, scale, z.data + p, z.ld, out + p, ld);
}

// out_i = sum_j m_ij x_j (+ scale_i z_i where scale is given), d rows of n pixels (a multiple of the lanes).
template <class A>
inline void mix(OrientedMatrix<A> m, Rows<A> x, int64_t d, int64_t n, A* out, int64_t ld, const A* scale = nullptr,
                Rows<A> z = {nullptr, 0}) {
  if (!scale) z = x;  // a valid address, never read
  for (int64_t i = 0; i < d;) {
    const OrientedMatrix<A> mi{m.data + i * m.row, m.row, m.column};
    const Rows<A> zi{z.data + i * z.ld, z.ld};
    const A* si = scale ? scale + i : nullptr;
    if (d - i >= 4) {
      mix_rows<A, 4>(mi, x, d, n, si, zi, out + i * ld, ld);
      i += 4;
    } else if (d - i >= 2) {
      mix_rows<A, 2>(mi, x, d, n, si, zi, out + i * ld, ld);
      i += 2;
    } else {
      mix_rows<A, 1>(mi, x, d, n, si, zi, out + i * ld, ld);
      i += 1;
    }
  }
}

template <class A>
inline void clear(A* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = A(0);
}

// out[i] = the lanes of sums[i, lanes], added up.
template <class A>
inline void reduce_lanes(const A* sums, int64_t count, A* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = sum<A>(load(sums + i * kLanes<A>));
}

// Adds up the partial sums of all units of a (sample, head), in the order of the units.
template <class A>
inline void add_partials(const A* partial, int64_t units, int64_t count, double* total) {
  for (int64_t i = 0; i < count; ++i) total[i] = 0;
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t i = 0; i < count; ++i) total[i] += partial[u * count + i];
  }
}

}  // namespace mirage::cpu::MIRAGE_ISA
