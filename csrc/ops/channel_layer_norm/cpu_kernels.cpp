// Kernels of channel_layer_norm: a group of neighbouring pixels at a time, all channels of the group held in cache.
#include "common/cpu/dtypes.h"
#include "common/cpu/layer_norm_tile.h"
#include "common/cpu/parallel.h"
#include "common/cpu/pixels.h"
#include "cpu_kernels.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

// K, the vectors of pixels per group: as many as leave registers for the sums where there are few channels; half of
// them for many channels, so that a group of all channels stays in the first-level cache or near it.
constexpr int kMostVectors = MIRAGE_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t kManyChannels = 96;
template <class A, int K> constexpr int64_t kGroup = K * kLanes<A>;

MIRAGE_INLINE Vec<float> vsqrt(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
MIRAGE_INLINE Vec<double> vsqrt(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// Pixels per unit of work: a multiple of the group, small enough for every thread to get some, and the same at every
// thread count (each unit yields one partial sum of the weight's gradient).
template <class A, int K>
int64_t unit_pixels(int64_t pixels) {
  const int64_t wanted = round_up((pixels + 15) / 16, kGroup<A, K>), most = 32 * kGroup<A, K>;
  return wanted < most ? wanted : most;
}

// One group of n <= kGroup pixels of all channels into buffer [C, kGroup]; missing pixels are zero.
template <int K, class T>
MIRAGE_INLINE void load_group(const T* x, int64_t channels, int64_t channel_stride, const Plane& plane, int64_t begin,
                              int64_t n, Acc<T>* buffer) {
  using A = Acc<T>;
  for (int64_t c = 0; c < channels; ++c) {
    A* row = buffer + c * kGroup<A, K>;
    const T* p = x + c * channel_stride;
    if (n == kGroup<A, K> && plane.is_dense()) {
      for (int k = 0; k < K; ++k) store(row + k * kLanes<A>, load(p + begin + k * kLanes<A>));
    } else {
      load_pixels(p, plane, begin, n, row);
      for (int64_t i = n; i < kGroup<A, K>; ++i) row[i] = A(0);
    }
  }
}

template <int K, class T>
MIRAGE_INLINE void store_group_row(T* p, const Vec<Acc<T>>* v, int64_t n) {
  using A = Acc<T>;
  if (n == kGroup<A, K>) {
    for (int k = 0; k < K; ++k) store(p + k * kLanes<A>, v[k]);
  } else {
    A row[kGroup<A, K>];
    for (int k = 0; k < K; ++k) store(row + k * kLanes<A>, v[k]);
    store_row(p, row, n);
  }
}

struct Shape {
  int64_t batch, channels, pixels, unit, units;  // units per sample
};

template <class A, int K>
Shape shape_of_work(const Tensor& x) {
  Shape s{x.size[0], x.size[1], x.size[2] * x.size[3], 0, 0};
  s.unit = unit_pixels<A, K>(s.pixels);
  s.units = s.unit ? (s.pixels + s.unit - 1) / s.unit : 0;
  return s;
}

Plane plane_of(const Tensor& t) { return {t.size[3], t.stride[2], t.stride[3]}; }

template <class TX, class TY, int K>
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y,
             const Tensor& mean, const Tensor& rstd) {
  using A = Acc<TY>;
  constexpr int L = kLanes<A>;
  const Shape s = shape_of_work<A, K>(x);
  const Plane plane = plane_of(x);
  const int64_t C = s.channels, N = s.pixels;
  Buffer<A> affine(2 * C);
  A *w = affine.get(), *b = w + C;
  load_all(weight, w);
  load_all(bias, b);
  const A inverse = A(1) / A(C);

  parallel_units<A>(s.batch * s.units, C * kGroup<A, K>, [&](int64_t unit, A* buffer) {
    const int64_t sample = unit / s.units, first = unit % s.units * s.unit;
    const int64_t last = first + s.unit < N ? first + s.unit : N;
    const TX* px = static_cast<const TX*>(x.data) + sample * x.stride[0];
    TY* py = static_cast<TY*>(y.data) + sample * C * N;
    A* pm = static_cast<A*>(mean.data) + sample * N;
    A* pr = static_cast<A*>(rstd.data) + sample * N;
    for (int64_t begin = first; begin < last; begin += kGroup<A, K>) {
      const int64_t n = last - begin < kGroup<A, K> ? last - begin : kGroup<A, K>;
      load_group<K>(px, C, x.stride[1], plane, begin, n, buffer);
      Vec<A> m[K] = {}, rest[K] = {}, q[K] = {};
      for (int64_t c = 0; c < C; ++c) {
        for (int k = 0; k < K; ++k) m[k] += load(buffer + c * kGroup<A, K> + k * L);
      }
      for (int k = 0; k < K; ++k) m[k] *= inverse;
      for (int64_t c = 0; c < C; ++c) {
        for (int k = 0; k < K; ++k) {
          const Vec<A> d = load(buffer + c * kGroup<A, K> + k * L) - m[k];
          rest[k] += d;
          q[k] += d * d;
        }
      }
      for (int k = 0; k < K; ++k) {
        q[k] = A(1) / vsqrt(correct_mean<A>(m[k], rest[k] * inverse, q[k] * inverse) + A(eps));
      }
      store_group_row<K>(pm + begin, m, n);
      store_group_row<K>(pr + begin, q, n);
      for (int64_t c = 0; c < C; ++c) {
        Vec<A> out[K];
        for (int k = 0; k < K; ++k) {
          out[k] = (load(buffer + c * kGroup<A, K> + k * L) - m[k]) * q[k] * w[c] + b[c];
        }
        store_group_row<K>(py + c * N + begin, out, n);
      }
    }
  });
}

template <class TX, class TY, int K>
void backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
              const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad_bias) {
  using A = Acc<TY>;
  constexpr int L = kLanes<A>;
  const Shape s = shape_of_work<A, K>(x);
  const Plane plane_x = plane_of(x), plane_g = plane_of(grad_y);
  const int64_t C = s.channels, N = s.pixels, units = s.batch * s.units, G = kGroup<A, K>;
  Buffer<A> w(C);
  load_all(weight, w.get());
  Buffer<A> partial(units * 2 * C);  // per unit: sums for the weight, then for the bias
  const A inverse = A(1) / A(C);

  // scratch: normalised x, grad_y, and the running sums of both gradients, a vector per channel
  parallel_units<A>(units, 2 * C * G + 2 * C * L, [&](int64_t unit, A* scratch) {
    A *hat = scratch, *g = hat + C * G, *sums = g + C * G;
    for (int64_t i = 0; i < 2 * C * L; ++i) sums[i] = A(0);
    const int64_t sample = unit / s.units, first = unit % s.units * s.unit;
    const int64_t last = first + s.unit < N ? first + s.unit : N;
    const TX* px = static_cast<const TX*>(x.data) + sample * x.stride[0];
    const TY* pg = static_cast<const TY*>(grad_y.data) + sample * grad_y.stride[0];
    TX* pgx = static_cast<TX*>(grad_x.data) + sample * C * N;
    for (int64_t begin = first; begin < last; begin += G) {
      const int64_t n = last - begin < G ? last - begin : G;
      load_group<K>(px, C, x.stride[1], plane_x, begin, n, hat);
      load_group<K>(pg, C, grad_y.stride[1], plane_g, begin, n, g);
      Vec<A> m[K], r[K], m1[K] = {}, m2[K] = {};
      const A* pm = static_cast<const A*>(mean.data) + sample * N + begin;
      const A* pr = static_cast<const A*>(rstd.data) + sample * N + begin;
      for (int k = 0; k < K; ++k) {
        const int64_t left = n - k * L;
        m[k] = left >= L ? load(pm + k * L) : load_n(pm + k * L, left > 0 ? int(left) : 0);
        r[k] = left >= L ? load(pr + k * L) : load_n(pr + k * L, left > 0 ? int(left) : 0);
      }
      for (int64_t c = 0; c < C; ++c) {
        Vec<A> sum_w = {}, sum_b = {};
        for (int k = 0; k < K; ++k) {
          const Vec<A> h = (load(hat + c * G + k * L) - m[k]) * r[k], gy = load(g + c * G + k * L);
          store(hat + c * G + k * L, h);
          sum_w += gy * h;
          sum_b += gy;
          m1[k] += gy * w[c];
          m2[k] += gy * w[c] * h;
        }
        store(sums + c * L, load(sums + c * L) + sum_w);
        store(sums + (C + c) * L, load(sums + (C + c) * L) + sum_b);
      }
      for (int k = 0; k < K; ++k) {
        m1[k] *= inverse;
        m2[k] *= inverse;
      }
      for (int64_t c = 0; c < C; ++c) {
        Vec<A> out[K];
        for (int k = 0; k < K; ++k) {
          out[k] = (load(g + c * G + k * L) * w[c] - m1[k] - load(hat + c * G + k * L) * m2[k]) * r[k];
        }
        Vec<Acc<TX>> rounded[K];
        for (int k = 0; k < K; ++k) rounded[k] = out[k];
        store_group_row<K>(pgx + c * N + begin, rounded, n);
      }
    }
    for (int64_t c = 0; c < 2 * C; ++c) partial[unit * 2 * C + c] = sum<A>(load(sums + c * L));
  });

  Buffer<double> total(2 * C);
  for (int64_t c = 0; c < 2 * C; ++c) total[c] = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t c = 0; c < 2 * C; ++c) total[c] += partial[unit * 2 * C + c];
  }
  store_all(total.get(), grad_weight);
  store_all(total.get() + C, grad_bias);
}

}  // namespace

#define MIRAGE_FOR_CHANNELS(x, call, TX, TY, ...)                                            \
  if ((x).size[1] >= kManyChannels) call<TX, TY, kMostVectors / 2>(__VA_ARGS__);           \
  else call<TX, TY, kMostVectors>(__VA_ARGS__);

// Element types of (x, y): the same, or a 16-bit x whose result 32-bit weights promote to float.
#define MIRAGE_FOR_PAIR(x, y, call, ...)                                                   \
  if ((x).dtype == (y).dtype) {                                                            \
    MIRAGE_FOR_MAP_DTYPE((x).dtype, T, { MIRAGE_FOR_CHANNELS(x, call, T, T, __VA_ARGS__) }) \
  } else if ((x).dtype == DType::f16) {                                                    \
    MIRAGE_FOR_CHANNELS(x, call, f16, float, __VA_ARGS__)                                  \
  } else {                                                                                 \
    MIRAGE_FOR_CHANNELS(x, call, bf16, float, __VA_ARGS__)                                 \
  }

void channel_layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  MIRAGE_FOR_PAIR(x, y, forward, x, weight, bias, eps, y, mean, rstd)
}

void channel_layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                 const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight,
                                 const Tensor& grad_bias) {
  MIRAGE_FOR_PAIR(x, grad_y, backward, grad_y, x, weight, mean, rstd, grad_x, grad_weight, grad_bias)
}

}  // namespace mirage::cpu::MIRAGE_ISA
