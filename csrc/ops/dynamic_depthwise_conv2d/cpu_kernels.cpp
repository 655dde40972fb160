// Kernels of dynamic_depthwise_conv2d: a strip of a plane at a time, copied into zero-padded rows that stay in cache.
#include "cpu_kernels.h"

#include "common/cpu/dtypes.h"
#include "common/cpu/inside_plane.h"
#include "common/cpu/parallel.h"
#include "common/cpu/pixels.h"
#include "cpu_blocks.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

// Rows per strip are a multiple of this, so that only the last strip of a plane has incomplete blocks.
constexpr int64_t kStripRows = 8;
constexpr int64_t kCacheBytes = 40 * 1024;

MIRAGE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MIRAGE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Padded rows: `margin` zeros, the row, zeros up to whole vectors; the margin of the next row serves as padding on the
// right.
struct Rows {
  int64_t margin, stride, strip;  // strip: output rows held at a time

  template <class A>
  static Rows of(int64_t width, int64_t kernel, int64_t buffers) {
    const int64_t margin = round_up(kernel / 2, kLanes<A>), stride = margin + round_up(width, kLanes<A>);
    const int64_t rows = kCacheBytes / (buffers * stride * int64_t(sizeof(A))) - kernel + 1;
    return {margin, stride, larger(kStripRows, rows / kStripRows * kStripRows)};
  }
  // Blocks may read (and ignore) up to kRows - 1 rows after the last: a tall one begins only where more are left.
  int64_t count(int64_t kernel) const { return strip + kernel - 1 + kRows - 1; }
  int64_t elements(int64_t kernel) const { return count(kernel) * stride + 2 * margin; }
};

// The units of work: segments of planes, the same at every thread count.
struct Work {
  int64_t batch, channels, height, width, kernel, segment, segments, units;

  Work(const Tensor& x, const Tensor& weight)
      : batch(x.size[0]), channels(x.size[1]), height(x.size[2]), width(x.size[3]), kernel(weight.size[2]) {
    const int64_t planes = batch * channels, wanted = planes ? (63 + planes) / planes : 1;
    segment = larger(kStripRows, round_up((height + wanted - 1) / wanted, kStripRows));
    segments = (height + segment - 1) / segment;
    units = planes * segments;
  }
};

// One unit: a plane and the rows [first, last) of it.
struct Unit {
  int64_t sample, channel, plane, first, last;

  Unit(const Work& work, int64_t index) {
    plane = index / work.segments;
    sample = plane / work.channels;
    channel = plane % work.channels;
    first = index % work.segments * work.segment;
    last = smaller(first + work.segment, work.height);
  }
  template <class T>
  const T* of(const Tensor& t) const {
    return static_cast<const T*>(t.data) + sample * t.stride[0] + channel * t.stride[1];
  }
};

template <class T>
MIRAGE_INLINE void load_line(const T* p, int64_t pixel, int64_t n, Acc<T>* out) {
  constexpr int64_t L = kLanes<Acc<T>>;
  if (pixel != 1 || n < L) return load_row(p, pixel, n, out);
  for (int64_t i = 0; i + L < n; i += L) store(out + i, load(p + i));
  store(out + n - L, load(p + n - L));
}

// Loads rows [first, first + count) of the plane at p, with zeros outside it.
template <class T>
void load_padded(const T* p, const Tensor& t, const Rows& rows, int64_t first, int64_t count, Acc<T>* out) {
  using A = Acc<T>;
  const int64_t height = t.size[2], width = t.size[3];
  for (int64_t i = 0; i < count; ++i, out += rows.stride) {
    const int64_t y = first + i;
    if (y < 0 || y >= height) {
      for (int64_t c = 0; c < rows.stride; ++c) out[c] = A(0);
      continue;
    }
    for (int64_t c = 0; c < rows.margin; ++c) out[c] = A(0);
    for (int64_t c = rows.margin + width; c < rows.stride; ++c) out[c] = A(0);
    load_line(p + y * t.stride[2], t.stride[3], width, out + rows.margin);
  }
  for (int64_t c = 0; c < 2 * rows.margin; ++c) out[c] = A(0);
}

// Loads the kernel of a unit's plane, column by column; rotated by 180 degrees for the gradient of x.
template <class T>
void load_kernel(const Tensor& weight, const Unit& unit, bool turned, Acc<T>* out) {
  const T* p = unit.of<T>(weight);
  const int64_t k = weight.size[2];
  for (int64_t ky = 0; ky < k; ++ky) {
    for (int64_t kx = 0; kx < k; ++kx) {
      const int64_t i = kx * k + ky;
      out[turned ? k * k - 1 - i : i] = to_acc(p[ky * weight.stride[2] + kx * weight.stride[3]]);
    }
  }
}

// Computes V vectors of `count` output rows.
template <int K, int V, class T>
void convolve_vectors(const Acc<T>* x, int64_t stride, int64_t last, const Acc<T>* weight, T* y, int64_t width,
                      int64_t count) {
  int64_t row = 0;
  if constexpr (V <= kTallVectors) {
    for (; row + kRows < count; row += kTallRows) {
      const int n = int(smaller(kTallRows, count - row));
      convolve_block<K, kTallRows, V>(x + row * stride, stride, last, weight, y + row * width, width, n);
    }
  }
  for (; row < count; row += kRows) {
    const int n = int(smaller(kRows, count - row));
    convolve_block<K, kRows, V>(x + row * stride, stride, last, weight, y + row * width, width, n);
  }
}

// Computes `count` output rows of a strip. x: the padded row K/2 above the first.
template <int K, class T>
void convolve_strip(const Acc<T>* x, const Rows& rows, const Acc<T>* weight, T* y, int64_t width, int64_t count) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const int64_t vectors = (width + L - 1) / L, blocks = (vectors + kMaxVectors - 1) / kMaxVectors;
  x += rows.margin - K / 2;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = vectors * block / blocks, end = vectors * (block + 1) / blocks, c = begin * L;
    const int64_t last = larger(0, smaller((end - 1) * L, width - L)) - c;
    unrolled<kMaxVectors>(MIRAGE_UNROLLED(v) {
      constexpr int V = decltype(v)::value + 1;
      if (end - begin == V) convolve_vectors<K, V>(x + c, rows.stride, last, weight, y + c, width, count);
    });
  }
}

template <int K, class T>
void forward(const Tensor& x, const Tensor& weight, const Tensor& y) {
  using A = Acc<T>;
  const Work work(x, weight);
  const Rows rows = Rows::of<A>(work.width, K, 1);
  parallel_units<A>(work.units, rows.elements(K) + round_up(K * K, kLanes<A>), [&](int64_t index, A* scratch) {
    const Unit unit(work, index);
    A *const kernel = scratch, *const padded = scratch + round_up(K * K, kLanes<A>);
    load_kernel<T>(weight, unit, false, kernel);
    T* const out = static_cast<T*>(y.data) + unit.plane * work.height * work.width;
    for (int64_t first = unit.first; first < unit.last; first += rows.strip) {
      const int64_t count = smaller(rows.strip, unit.last - first);
      load_padded(unit.of<T>(x), x, rows, first - K / 2, count + K - 1, padded);
      convolve_strip<K>(padded, rows, kernel, out + first * work.width, work.width, count);
    }
  });
}

// Adds up the lanes of each of K * K vectors.
template <int K, class A>
void reduce_lanes(const A* total, double* partial) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < K * K; ++i) partial[i] = double(sum<A>(load(total + i * L)));
}

// A unit's sums of the weight's gradient over the plane alone: `partial` again where it is not finite, because a
// gradient of y that is not has met the zeros around x. padded_g, padded_x: scratch.
template <class T>
void sum_inside_plane(const Work& work, const Unit& unit, const Rows& rows, const Tensor& grad_y, const Tensor& x,
                      Acc<T>* padded_g, Acc<T>* padded_x, double* partial) {
  const int64_t K = work.kernel, halo = K / 2;
  bool wrong[11 * 11];
  for (int64_t i = 0; i < K * K; ++i) {
    wrong[i] = !is_finite(partial[i]);
    if (wrong[i]) partial[i] = 0;
  }
  for (int64_t first = unit.first; first < unit.last; first += rows.strip) {
    const int64_t count = smaller(rows.strip, unit.last - first);
    load_padded(unit.of<T>(grad_y), grad_y, rows, first, count, padded_g);
    load_padded(unit.of<T>(x), x, rows, first - halo, count + K - 1, padded_x);
    const Outside out = outside(first, 0, count, work.width, work.height, work.width, halo);
    for (int64_t i = 0; i < K * K; ++i) {
      if (wrong[i]) {
        partial[i] += tap_sum(padded_x + rows.margin - halo, rows.stride, padded_g + rows.margin, rows.stride, count,
                              work.width, out, K, i / K, i % K);
      }
    }
  }
}

template <class T>
void sum_segments(const Work& work, const double* partial, const Tensor& grad_weight) {
  const int64_t taps = work.kernel * work.kernel, planes = work.batch * work.channels;
  T* out = static_cast<T*>(grad_weight.data);
  for (int64_t plane = 0; plane < planes; ++plane, out += taps) {
    for (int64_t i = 0; i < taps; ++i) {
      double value = 0;
      for (int64_t s = 0; s < work.segments; ++s) value += partial[(plane * work.segments + s) * taps + i];
      out[i] = from_acc<T>(Acc<T>(value));
    }
  }
}

template <int K, class T>
void backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
              const Tensor& grad_weight) {
  using A = Acc<T>;
  const Work work(x, weight);
  const bool want_x = grad_x.ndim == 4, want_weight = grad_weight.ndim == 4;
  const Rows rows = Rows::of<A>(work.width, K, 2);
  const int64_t kernel_size = round_up(K * K, kLanes<A>), total_size = K * K * kLanes<A>;
  const int64_t padded_size = round_up(rows.elements(K), kLanes<A>);
  Buffer<double> partial(want_weight ? work.units * K * K : 0);

  parallel_units<A>(work.units, kernel_size + total_size + 2 * padded_size, [&](int64_t index, A* scratch) {
    const Unit unit(work, index);
    A *const kernel = scratch, *const total = kernel + kernel_size;
    A *const padded_g = total + total_size, *const padded_x = padded_g + padded_size;
    load_kernel<T>(weight, unit, true, kernel);
    for (int64_t i = 0; i < total_size; ++i) total[i] = A(0);
    for (int64_t first = unit.first; first < unit.last; first += rows.strip) {
      const int64_t count = smaller(rows.strip, unit.last - first), offset = first * work.width;
      load_padded(unit.of<T>(grad_y), grad_y, rows, first - K / 2, count + K - 1, padded_g);
      if (want_x) {
        T* const out = static_cast<T*>(grad_x.data) + unit.plane * work.height * work.width + offset;
        convolve_strip<K>(padded_g, rows, kernel, out, work.width, count);
      }
      if (want_weight) {
        load_padded(unit.of<T>(x), x, rows, first - K / 2, count + K - 1, padded_x);
        const A* const g = padded_g + K / 2 * rows.stride + rows.margin;
        correlate_from<K, 0>(padded_x + rows.margin - K / 2, g, rows.stride, work.width, count, total);
      }
    }
    if (!want_weight) return;
    double* const sums = partial.get() + index * K * K;
    reduce_lanes<K>(total, sums);
    if (!all_finite(sums, K * K)) sum_inside_plane<T>(work, unit, rows, grad_y, x, padded_g, padded_x, sums);
  });
  if (want_weight) sum_segments<T>(work, partial.get(), grad_weight);
}

}  // namespace

#define MIRAGE_FOR_KERNEL_SIZE(dtype, size, call, ...)                    \
  MIRAGE_FOR_DTYPE(dtype, T, {                                            \
    switch (size) {                                                       \
      case 3: call<3, T>(__VA_ARGS__); break;                             \
      case 5: call<5, T>(__VA_ARGS__); break;                             \
      case 7: call<7, T>(__VA_ARGS__); break;                             \
      case 9: call<9, T>(__VA_ARGS__); break;                             \
      case 11: call<11, T>(__VA_ARGS__); break;                           \
    }                                                                     \
  })

void dynamic_depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const Tensor& y) {
  MIRAGE_FOR_KERNEL_SIZE(x.dtype, weight.size[2], forward, x, weight, y)
}

void dynamic_depthwise_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& grad_x, const Tensor& grad_weight) {
  MIRAGE_FOR_KERNEL_SIZE(x.dtype, weight.size[2], backward, grad_y, x, weight, grad_x, grad_weight)
}

}  // namespace mirage::cpu::MIRAGE_ISA
