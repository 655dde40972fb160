// Kernels of spd_covariance: one pass over memory. A chunk of pixels is centred by its own mean and multiplied with
// itself while it is in cache; chunks are merged in double precision, always in the same order (Chan, Golub and
// LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
#include "common/cpu/dtypes.h"
#include "common/cpu/parallel.h"
#include "common/cpu/pixels.h"
#include "cpu_kernels.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

// Side of the square of channel pairs whose sums stay in registers: 32 registers hold 4 x 4 sums, 16 hold 3 x 3.
constexpr int kTile = MIRAGE_VECTOR_BYTES == 64 ? 4 : 3;
constexpr int64_t kChunkElements = 32 * 1024;  // in a chunk of all channels, which stays in the second-level cache
constexpr int64_t kUnitsPerSample = 16;        // at most, because the sums of each have to be merged

Plane plane_of(const Tensor& t) { return {t.size[3], t.stride[2], t.stride[3]}; }

// How the work is cut up. It depends on the shape alone, so results do not depend on the number of threads.
struct Work {
  int64_t batch, channels, pixels;
  int64_t rows;                         // channels rounded up to whole tiles
  int64_t chunk, chunks, unit_chunks;   // pixels per chunk; chunks per sample and per unit
  int64_t units, samples;               // units per sample; samples per unit where a sample is little work
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
Work work_of(const Tensor& x, int64_t tile, int64_t chunk_elements) {
  Work w{};
  w.batch = x.size[0];
  w.channels = x.size[1];
  w.pixels = x.size[2] * x.size[3];
  w.rows = round_up(w.channels, tile);
  int64_t most = chunk_elements / w.rows;
  if (most < 16 * kLanes<A>) most = 16 * kLanes<A>;
  w.chunk = round_up(ceil_div(w.pixels, ceil_div(w.pixels, most)), kLanes<A>);
  w.chunks = ceil_div(w.pixels, w.chunk);
  w.unit_chunks = ceil_div(w.chunks, kUnitsPerSample);
  w.units = ceil_div(w.chunks, w.unit_chunks);
  // Waking a thread costs microseconds: a unit is worth about a million multiplications.
  const int64_t multiplications = w.pixels * w.rows * (w.rows + 8);
  w.samples = w.units == 1 ? ceil_div(int64_t(1) << 20, multiplications) : 1;
  return w;
}

// ---- forward ----------------------------------------------------------------------------------------------------

// Writes n elements minus their mean, then zeros up to n rounded up to whole vectors. The mean is rounded, so what is
// left sums to `rest` instead of zero; the merge accounts for it.
template <class S>
MIRAGE_INLINE void centre_row(const S* in, int64_t n, Acc<S>* out, Acc<S>& shift, Acc<S>& rest) {
  using A = Acc<S>;
  constexpr int L = kLanes<A>;
  const int64_t whole = n / L * L;
  const int left = int(n - whole);
  Vec<A> total[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int k = 0; k < 4; ++k) total[k] += load(in + i + k * L);
  }
  for (; i < whole; i += L) total[0] += load(in + i);
  if (left) total[1] += load_n(in + whole, left);
  shift = sum<A>((total[0] + total[1]) + (total[2] + total[3])) / A(n);

  Vec<A> remainder[2] = {};
  for (i = 0; i + 2 * L <= n; i += 2 * L) {
    for (int k = 0; k < 2; ++k) {
      const Vec<A> v = load(in + i + k * L) - shift;
      store(out + i + k * L, v);
      remainder[k] += v;
    }
  }
  for (; i < whole; i += L) {
    const Vec<A> v = load(in + i) - shift;
    store(out + i, v);
    remainder[0] += v;
  }
  rest = sum<A>(remainder[0] + remainder[1]);
  if (left) {
    A tail[L] = {};
    for (int k = 0; k < left; ++k) rest += tail[k] = to_acc(in[whole + k]) - shift;
    store(out + whole, load(tail));
  }
}

// Loads and centres pixels [begin, begin + n) of every channel into `buffer` [rows, chunk]. Rows past the last channel
// are zero.
template <class T>
void centre_chunk(const T* x, int64_t channel_stride, const Plane& plane, const Work& w, int64_t begin, int64_t n,
                  Acc<T>* buffer, Acc<T>* shift, Acc<T>* rest) {
  for (int64_t c = 0; c < w.channels; ++c) {
    const T* p = x + c * channel_stride;
    Acc<T>* row = buffer + c * w.chunk;
    if (plane.is_dense()) {
      centre_row<T>(p + begin, n, row, shift[c], rest[c]);
    } else {
      load_pixels(p, plane, begin, n, row);
      centre_row<Acc<T>>(row, n, row, shift[c], rest[c]);
    }
  }
  for (int64_t i = w.channels * w.chunk; i < w.rows * w.chunk; ++i) buffer[i] = 0;
}

// Adds neighbouring lanes: the sums of a are in the lower half of the result, those of b in the upper.
#if defined(__clang__)
constexpr bool kCanFold = false;
template <class A> MIRAGE_INLINE Vec<A> fold(Vec<A> a, Vec<A>) { return a; }
#else
constexpr bool kCanFold = true;
template <class A>
MIRAGE_INLINE Vec<A> fold(Vec<A> a, Vec<A> b) {
  IVec<A> even{};
  for (int i = 0; i < kLanes<A>; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}
#endif

// Adds up the lanes of each of n vectors. Folding them as a tree costs less than summing each by itself.
template <class A, int n>
MIRAGE_INLINE void lane_sums(Vec<A>* v, A* out) {
  constexpr int L = kLanes<A>;
  if constexpr (kCanFold && n % L == 0) {
    for (int group = 0; group < n; group += L) {
      for (int width = L; width > 1; width /= 2) {
        for (int i = 0; i < width / 2; ++i) v[group + i] = fold<A>(v[group + 2 * i], v[group + 2 * i + 1]);
      }
      store(out + group, v[group]);
    }
  } else {
    for (int i = 0; i < n; ++i) out[i] = sum<A>(v[i]);
  }
}

// The products of rows i.. and j.. of a tile, summed over n pixels (a multiple of the lanes), to gram [rows, rows].
template <class A>
MIRAGE_INLINE void gram_tile(const A* a, const A* b, int64_t stride, int64_t n, A* gram, int64_t rows) {
  constexpr int L = kLanes<A>;
  Vec<A> total[kTile * kTile] = {};
  for (int64_t p = 0; p < n; p += L) {
    Vec<A> va[kTile], vb[kTile];
    for (int k = 0; k < kTile; ++k) va[k] = load(a + k * stride + p);
    for (int k = 0; k < kTile; ++k) vb[k] = load(b + k * stride + p);
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) total[i * kTile + j] += va[i] * vb[j];
    }
  }
  A sums[kTile * kTile];
  lane_sums<A, kTile * kTile>(total, sums);
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; ++j) gram[i * rows + j] = sums[i * kTile + j];
  }
}

// Count, means and centred products (upper triangle) of the pixels so far.
struct Moments {
  int64_t count;
  double* mean;      // [C]
  double* products;  // [C, C]

  void clear(int64_t channels) {
    count = 0;
    for (int64_t i = 0; i < channels; ++i) mean[i] = 0;
    for (int64_t i = 0; i < channels * channels; ++i) products[i] = 0;
  }

  // Adds n pixels of mean[c] + step[c], whose products about that mean are product(i, j). Overwrites nothing but
  // itself.
  template <class F>
  MIRAGE_INLINE void merge(int64_t channels, int64_t n, const double* step, F product) {
    const double weight = double(count) * double(n) / double(count + n), share = double(n) / double(count + n);
    for (int64_t i = 0; i < channels; ++i) {
      const double scaled = step[i] * weight;
      for (int64_t j = i; j < channels; ++j) products[i * channels + j] += product(i, j) + scaled * step[j];
    }
    for (int64_t i = 0; i < channels; ++i) mean[i] += step[i] * share;
    count += n;
  }
};

// Scratch memory of one thread, for one chunk.
template <class A>
struct Scratch {
  double *step, *left;  // [C]
  A *shift, *rest;      // [C]
  A *buffer, *gram;     // [rows, chunk], [rows, rows]

  static int64_t size(const Work& w) {
    return 2 * w.channels * int64_t(sizeof(double) / sizeof(A)) + 2 * round_up(w.channels, 16) + w.rows * w.chunk +
           w.rows * w.rows;
  }
  Scratch(A* memory, const Work& w) {
    buffer = memory;
    gram = buffer + w.rows * w.chunk;
    shift = gram + w.rows * w.rows;
    rest = shift + round_up(w.channels, 16);
    step = reinterpret_cast<double*>(buffer + round_up(rest + w.channels - buffer, 2));
    left = step + w.channels;
  }
};

template <class T>
void add_chunk(const Tensor& x, const Work& w, int64_t sample, int64_t chunk, const Scratch<Acc<T>>& s, Moments& m) {
  using A = Acc<T>;
  const int64_t begin = chunk * w.chunk, n = begin + w.chunk < w.pixels ? w.chunk : w.pixels - begin;
  const int64_t padded = round_up(n, kLanes<A>), C = w.channels;
  const T* px = static_cast<const T*>(x.data) + sample * x.stride[0];
  centre_chunk(px, x.stride[1], plane_of(x), w, begin, n, s.buffer, s.shift, s.rest);
  for (int64_t i = 0; i < w.rows; i += kTile) {
    for (int64_t j = i; j < w.rows; j += kTile) {
      gram_tile(s.buffer + i * w.chunk, s.buffer + j * w.chunk, w.chunk, padded, s.gram + i * w.rows + j, w.rows);
    }
  }
  for (int64_t c = 0; c < C; ++c) {
    s.left[c] = double(s.rest[c]) / double(n);
    s.step[c] = double(s.shift[c]) + s.left[c] - m.mean[c];
  }
  m.merge(C, n, s.step, [&](int64_t i, int64_t j) {
    return double(s.gram[i * w.rows + j]) - double(s.rest[i]) * s.left[j];
  });
}

template <class T>
void finish(const Work& w, const Moments& m, double eps, T* y, Acc<T>* mean) {
  using A = Acc<T>;
  const int64_t C = w.channels;
  const double scale = 1.0 / double(w.pixels - 1);
  for (int64_t i = 0; i < C; ++i) {
    mean[i] = A(m.mean[i]);
    mean[C + i] = A(m.mean[i] - double(mean[i]));
    for (int64_t j = i; j < C; ++j) {
      const double value = m.products[i * C + j] * scale + (i == j ? eps : 0.0);
      y[i * C + j] = y[j * C + i] = from_acc<T>(A(value));
    }
  }
}

template <class T>
void forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean) {
  using A = Acc<T>;
  const Work w = work_of<A>(x, kTile, kChunkElements);
  const int64_t C = w.channels, moments = C * C + C;
  Buffer<double> sums(w.batch * w.units * moments);
  Buffer<int64_t> counts(w.batch * w.units);
  const auto moments_of = [&](int64_t sample, int64_t unit) {
    const int64_t index = sample * w.units + unit;
    return Moments{counts[index], &sums[index * moments], &sums[index * moments + C]};
  };
  const auto finish_sample = [&](int64_t sample) {
    Moments all = moments_of(sample, 0);
    for (int64_t unit = 1; unit < w.units; ++unit) {
      const Moments next = moments_of(sample, unit);
      for (int64_t c = 0; c < C; ++c) next.mean[c] -= all.mean[c];
      all.merge(C, next.count, next.mean, [&](int64_t i, int64_t j) { return next.products[i * C + j]; });
    }
    finish(w, all, eps, y.as<T>() + sample * C * C, mean.as<A>() + sample * 2 * C);
  };

  const int64_t groups = ceil_div(w.batch, w.samples);
  parallel_units<A>(groups * w.units, Scratch<A>::size(w), [&](int64_t index, A* memory) {
    const Scratch<A> scratch(memory, w);
    const int64_t first = index / w.units * w.samples, unit = index % w.units;
    const int64_t last = first + w.samples < w.batch ? first + w.samples : w.batch;
    const int64_t end = (unit + 1) * w.unit_chunks < w.chunks ? (unit + 1) * w.unit_chunks : w.chunks;
    for (int64_t sample = first; sample < last; ++sample) {
      Moments m = moments_of(sample, unit);
      m.clear(C);
      for (int64_t chunk = unit * w.unit_chunks; chunk < end; ++chunk) add_chunk<T>(x, w, sample, chunk, scratch, m);
      counts[sample * w.units + unit] = m.count;
      if (w.units == 1) finish_sample(sample);
    }
  });
  if (w.units > 1) parallel_units<A>(w.batch, 0, [&](int64_t sample, A*) { finish_sample(sample); });
}

// ---- backward ---------------------------------------------------------------------------------------------------

constexpr int kRows = MIRAGE_VECTOR_BYTES == 64 ? 6 : 3;  // channels and vectors of pixels of grad_x in registers
constexpr int kVectors = MIRAGE_VECTOR_BYTES == 64 ? 4 : 3;

// (G + G^T) / (N - 1), [rows, C], with rows of zeros below.
template <class T>
void symmetrise(const Tensor& grad_y, const Work& w, int64_t sample, Acc<T>* out) {
  using A = Acc<T>;
  const T* g = static_cast<const T*>(grad_y.data) + sample * grad_y.stride[0];
  const A scale = A(1) / A(w.pixels - 1);
  for (int64_t i = 0; i < w.rows; ++i) {
    for (int64_t j = 0; j < w.channels; ++j) {
      A value = 0;
      if (i < w.channels) {
        value = to_acc(g[i * grad_y.stride[1] + j * grad_y.stride[2]]) +
                to_acc(g[j * grad_y.stride[1] + i * grad_y.stride[2]]);
      }
      out[i * w.channels + j] = value * scale;
    }
  }
}

// Rows [0, kRows) of matrix [.., C] times a block of pixels of buffer [C, chunk].
template <class A>
MIRAGE_INLINE void product_tile(const A* matrix, const A* buffer, const Work& w, A* out, int64_t out_stride) {
  constexpr int L = kLanes<A>;
  Vec<A> total[kRows][kVectors] = {};
  for (int64_t j = 0; j < w.channels; ++j) {
    Vec<A> v[kVectors];
    for (int k = 0; k < kVectors; ++k) v[k] = load(buffer + j * w.chunk + k * L);
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kVectors; ++k) total[r][k] += v[k] * matrix[r * w.channels + j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kVectors; ++k) store(out + r * out_stride + k * L, total[r][k]);
  }
}

template <class T>
void backward_chunk(const Tensor& x, const Tensor& mean, const Tensor& grad_x, const Work& w, int64_t sample,
                    int64_t chunk, const Acc<T>* matrix, Acc<T>* buffer) {
  using A = Acc<T>;
  constexpr int64_t G = kVectors * kLanes<A>;
  const int64_t begin = chunk * w.chunk, C = w.channels;
  const int64_t n = begin + w.chunk < w.pixels ? w.chunk : w.pixels - begin;
  const T* px = static_cast<const T*>(x.data) + sample * x.stride[0];
  const A* mu = static_cast<const A*>(mean.data) + sample * 2 * C;
  T* out = static_cast<T*>(grad_x.data) + sample * C * w.pixels + begin;
  const Plane plane = plane_of(x);
  for (int64_t c = 0; c < C; ++c) {
    A* row = buffer + c * w.chunk;
    load_pixels(px + c * x.stride[1], plane, begin, n, row);
    for (int64_t p = 0; p < n; ++p) row[p] = (row[p] - mu[c]) - mu[C + c];
    for (int64_t p = n; p < w.chunk; ++p) row[p] = 0;
  }
  alignas(64) A tile[kRows * G];
  for (int64_t p = 0; p < n; p += G) {
    const int64_t width = n - p < G ? n - p : G;
    for (int64_t c = 0; c < C; c += kRows) {
      const int64_t rows = C - c < kRows ? C - c : kRows;
      product_tile(matrix + c * C, buffer + p, w, tile, G);
      for (int64_t r = 0; r < rows; ++r) store_row(out + (c + r) * w.pixels + p, tile + r * G, width);
    }
  }
}

template <class T>
void backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x) {
  using A = Acc<T>;
  constexpr int64_t G = kVectors * kLanes<A>;
  Work w = work_of<A>(x, kRows, kChunkElements / 4);
  w.chunk = round_up(w.chunk, G);
  w.chunks = ceil_div(w.pixels, w.chunk);
  w.unit_chunks = ceil_div(w.chunks, kUnitsPerSample);
  w.units = ceil_div(w.chunks, w.unit_chunks);
  if (w.units > 1) w.samples = 1;
  const int64_t C = w.channels, groups = ceil_div(w.batch, w.samples);
  parallel_units<A>(groups * w.units, w.rows * C + C * w.chunk, [&](int64_t index, A* memory) {
    A *buffer = memory, *matrix = memory + C * w.chunk;
    const int64_t first = index / w.units * w.samples, unit = index % w.units;
    const int64_t last = first + w.samples < w.batch ? first + w.samples : w.batch;
    const int64_t end = (unit + 1) * w.unit_chunks < w.chunks ? (unit + 1) * w.unit_chunks : w.chunks;
    for (int64_t sample = first; sample < last; ++sample) {
      symmetrise<T>(grad_y, w, sample, matrix);
      for (int64_t chunk = unit * w.unit_chunks; chunk < end; ++chunk) {
        backward_chunk<T>(x, mean, grad_x, w, sample, chunk, matrix, buffer);
      }
    }
  });
}

}  // namespace

void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean) {
  MIRAGE_FOR_DTYPE(x.dtype, T, { forward<T>(x, eps, y, mean); })
}

void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x) {
  MIRAGE_FOR_DTYPE(x.dtype, T, { backward<T>(grad_y, x, mean, grad_x); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
