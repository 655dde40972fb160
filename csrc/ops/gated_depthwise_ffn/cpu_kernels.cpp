// Kernels of gated_depthwise_ffn: one streaming pass over each pair of channels (c, c + M).
//
// A few rows of gelu(h) live in L1, between zeros at both ends; kRows output rows at a time are made from kRows + 2 of
// them, so that each shifted vector that is loaded serves up to three rows. No intermediate reaches memory.
#include "cpu_kernels.h"

#include "common/cpu/dtypes.h"
#include "common/cpu/inside_plane.h"
#include "common/cpu/parallel.h"
#include "common/cpu/vec_math.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace {

constexpr int kForwardRows = MIRAGE_VECTOR_BYTES == 64 ? 4 : 2, kBackwardRows = 2;

// ---- vectors at the end of a row ----------------------------------------------------------------------------------

template <class T>
MIRAGE_INLINE Vec<Acc<T>> load_tail(const T* p, int64_t n) {
  if (n >= kLanes<Acc<T>>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<Acc<T>>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#endif
  return load_n(p, int(n));
}

template <class T>
MIRAGE_INLINE void store_tail(T* p, Vec<Acc<T>> v, int64_t n) {
  if (n >= kLanes<Acc<T>>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#endif
  store_n(p, v, int(n));
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// Work and scratch: a plane of H x W cut into strips of rows. Strips depend on the shape only, never on the threads.
struct Shape {
  int64_t pairs, height, width, padded, stride, strips, strip;  // padded: width in whole vectors; stride: of a buffer

  template <class A>
  static Shape of(const Tensor& h, int64_t halo, A) {
    constexpr int64_t L = kLanes<A>;
    Shape s{h.size[1] / 2, h.size[2], h.size[3], round_up(h.size[3], L), 0, 0, 0};
    s.stride = (s.padded / L + 2) % 2 ? s.padded + 2 * L : s.padded + 3 * L;  // odd in vectors: no rows 4 KiB apart
    // Enough units for many threads, as long as the rows computed twice stay few.
    const int64_t units = h.size[0] * s.pairs, wanted = units ? (127 + units) / units : 1;
    const int64_t most = s.height / (16 * halo);
    s.strips = wanted < most ? wanted : most;
    if (s.strips < 1) s.strips = 1;
    s.strip = s.strips ? (s.height + s.strips - 1) / s.strips : s.height;
    if (s.strip) s.strips = (s.height + s.strip - 1) / s.strip;
    return s;
  }
};

struct Unit {
  int64_t sample, pair, begin, end;
  Unit(const Shape& s, int64_t index)
      : sample(index / (s.pairs * s.strips)), pair(index / s.strips % s.pairs), begin(index % s.strips * s.strip),
        end(begin + s.strip < s.height ? begin + s.strip : s.height) {}
};

// N row buffers, from the oldest to the newest. Element -1 and those from the width on are zero.
template <class A, int N>
struct Ring {
  A* row[N];

  MIRAGE_INLINE A* take(A* memory, const Shape& s) {
    for (int i = 0; i < N; ++i) {
      row[i] = memory + i * s.stride + kLanes<A>;
      store(row[i] - kLanes<A>, Vec<A>{});
      store(row[i] + s.padded - kLanes<A>, Vec<A>{});
      store(row[i] + s.padded, Vec<A>{});
    }
    return memory + N * s.stride;
  }
  // The two newest rows become the two oldest.
  MIRAGE_INLINE void advance() {
    for (int i = 0; i < 2; ++i) {
      A* const old = row[i];
      row[i] = row[N - 2 + i];
      row[N - 2 + i] = old;
    }
  }
};

template <class A>
MIRAGE_INLINE void zero_row(A* out, const Shape& s) {
  for (int64_t x = 0; x < s.padded; x += kLanes<A>) store(out + x, Vec<A>{});
}

// Calls f(x, vector) for each vector of a row of T, the last one filled up with zeros; `staging` serves strided rows.
template <class T, class F>
MIRAGE_INLINE void for_each_vector(const T* p, int64_t pixel, const Shape& s, Acc<T>* staging, F f) {
  constexpr int64_t L = kLanes<Acc<T>>;
  if (pixel == 1) {
    int64_t x = 0;
    for (; x + L <= s.width; x += L) f(x, load(p + x));
    if (x < s.width) f(x, load_tail(p + x, s.width - x));
  } else {
    load_row(p, pixel, s.width, staging);
    for (int64_t x = 0; x < s.padded; x += L) f(x, load(staging + x));
  }
}

template <class A>
MIRAGE_INLINE void splat_weights(const A* w, Vec<A> (&out)[9]) {
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) out[k] = splat(w[k]);
}

// Computes R rows of the depthwise convolution at column x from R + 2 rows.
template <class A, int R>
MIRAGE_INLINE void convolve(const Ring<A, R + 2>& a, int64_t x, const Vec<A> (&w)[9], Vec<A> (&d)[R]) {
#pragma GCC unroll 8
  for (int i = 0; i < R + 2; ++i) {
    const A* p = a.row[i] + x;
    const Vec<A> left = load(p - 1), centre = load(p), right = load(p + 1);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const int o = i - k;
      if (o < 0 || o >= R) continue;
      d[o] = k ? d[o] + left * w[3 * k] : left * w[0];
      d[o] += centre * w[3 * k + 1];
      d[o] += right * w[3 * k + 2];
    }
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Tensor& h, const Tensor& weight, const Tensor& y) {
  using A = Acc<T>;
  constexpr int R = kForwardRows;
  const Shape s = Shape::of(h, 1, A{});
  const int64_t M = s.pairs, plane = s.height * s.width;
  Buffer<A> weights(2 * M * 9);
  for (int64_t i = 0; i < 2 * M * 9; ++i) weights[i] = to_acc(static_cast<const T*>(weight.data)[i]);

  parallel_units<A>(h.size[0] * M * s.strips, 2 * (R + 2) * s.stride, [&](int64_t index, A* scratch) {
    const Unit u(s, index);
    const T* p[2];
    Ring<A, R + 2> a[2];
    Vec<A> w1[9], w2[9];
    splat_weights(weights.get() + u.pair * 9, w1);
    splat_weights(weights.get() + (M + u.pair) * 9, w2);
    for (int half = 0; half < 2; ++half) {
      p[half] = static_cast<const T*>(h.data) + u.sample * h.stride[0] + (u.pair + half * M) * h.stride[1];
      scratch = a[half].take(scratch, s);
    }
    const auto fill = [&](int slot, int64_t row) {
      for (int half = 0; half < 2; ++half) {
        A* out = a[half].row[slot];
        if (row < 0 || row >= s.height) {
          zero_row(out, s);
        } else {
          for_each_vector(p[half] + row * h.stride[2], h.stride[3], s, out,
                          [&](int64_t x, Vec<A> v) { store(out + x, vgelu<A>(v)); });
        }
      }
    };
    fill(0, u.begin - 1);
    fill(1, u.begin);
    T* py = static_cast<T*>(y.data) + (u.sample * M + u.pair) * plane;
    for (int64_t first = u.begin; first < u.end; first += R) {
      for (int i = 0; i < R; ++i) {
        if (first + i < u.end) fill(i + 2, first + i + 1);
      }
      const int rows = u.end - first < R ? int(u.end - first) : R;
      for (int64_t x = 0; x < s.padded; x += kLanes<A>) {
        Vec<A> d1[R], d2[R];
        convolve<A, R>(a[0], x, w1, d1);
        convolve<A, R>(a[1], x, w2, d2);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          if (i < rows) store_tail(py + (first + i) * s.width + x, vgelu<A>(d1[i]) * d2[i], s.width - x);
        }
      }
      for (auto& ring : a) ring.advance();
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

// Gradients of one channel for R rows: grad_h = (transposed convolution of grad_d) * slope, and nine sums for the
// weight. grad_d's rows begin one above those of a and slope. Only the first `rows` rows of grad_h are stored and
// counted.
template <class T, int R>
MIRAGE_INLINE void channel_gradients(const Ring<Acc<T>, R + 2>& grad_d, const Ring<Acc<T>, R + 2>& a,
                                     const Ring<Acc<T>, R + 2>& slope, const Vec<Acc<T>> (&w)[9], int rows,
                                     const Shape& s, T* grad_h, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> total[9] = {};
  for (int64_t x = 0; x < s.padded; x += L) {
    Vec<A> grad_a[R], centre[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) centre[i] = i < rows ? load(a.row[i] + x) : Vec<A>{};
#pragma GCC unroll 8
    for (int i = 0; i < R + 2; ++i) {
      const A* p = grad_d.row[i] + x;
      const Vec<A> g[3] = {load(p - 1), load(p), load(p + 1)};
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        const int o = i - k;  // row i of grad_d is row o - 1 + k: its kernel row is 2 - k
        if (o < 0 || o >= R) continue;
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const int tap = (2 - k) * 3 + 2 - j;
          grad_a[o] = k || j ? grad_a[o] + g[j] * w[tap] : g[j] * w[tap];
          total[tap] += g[j] * centre[o];
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      if (i < rows) store_tail(grad_h + i * s.width + x, grad_a[i] * load(slope.row[i] + x), s.width - x);
    }
  }
  for (int k = 0; k < 9; ++k) store(sums + k * L, load(sums + k * L) + total[k]);
}

// The nine sums of channel_gradients for `rows` rows from `first` on, over the plane alone: neither the zeros around a
// nor what the last vector holds behind grad_d count.
template <class A, int N>
__attribute__((noinline)) void sum_inside_plane(const Ring<A, N>& grad_d, const Ring<A, N>& a, int64_t first, int rows,
                                                const Shape& s, A* sums) {
  for (int tap = 0; tap < 9; ++tap) {
    const int ky = tap / 3, shift = tap % 3 - 1;
    const int64_t left = shift > 0 ? shift : 0, right = shift < 0 ? s.width + shift : s.width;
    for (int i = 0; i < rows && left < right; ++i) {
      const int64_t row = first + i + 1 - ky;  // of grad_d
      if (row < 0 || row >= s.height) continue;
      sums[tap] += dot(grad_d.row[i + 2 - ky] + left - shift, a.row[i] + left, right - left);
    }
  }
}

template <class T>
void backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
              const Tensor& grad_weight) {
  using A = Acc<T>;
  constexpr int R = kBackwardRows, L = kLanes<A>;
  const Shape s = Shape::of(h, 2, A{});
  const int64_t M = s.pairs, plane = s.height * s.width, units = h.size[0] * M * s.strips;
  Buffer<A> weights(2 * M * 9), partial(units * 18);
  for (int64_t i = 0; i < 2 * M * 9; ++i) weights[i] = to_acc(static_cast<const T*>(weight.data)[i]);

  parallel_units<A>(plane ? units : 0, (6 * (R + 2) + R) * s.stride + 18 * L, [&](int64_t index, A* scratch) {
    const Unit u(s, index);
    const T* p[2];
    T* out[2];
    Ring<A, R + 2> a[2], slope[2], grad_d[2];
    Ring<A, R> g;
    A* const sums = scratch;
    scratch = g.take(scratch + 18 * L, s);
    for (int64_t i = 0; i < 18 * L; ++i) sums[i] = A(0);
    Vec<A> w[2][9];
    for (int half = 0; half < 2; ++half) {
      const int64_t channel = u.pair + half * M;
      p[half] = static_cast<const T*>(h.data) + u.sample * h.stride[0] + channel * h.stride[1];
      out[half] = static_cast<T*>(grad_h.data) + (u.sample * 2 * M + channel) * plane;
      splat_weights(weights.get() + channel * 9, w[half]);
      scratch = a[half].take(scratch, s);
      scratch = slope[half].take(scratch, s);
      scratch = grad_d[half].take(scratch, s);
    }
    const T* pg = static_cast<const T*>(grad_y.data) + u.sample * grad_y.stride[0] + u.pair * grad_y.stride[1];
    const auto fill = [&](int slot, int64_t row) {
      for (int half = 0; half < 2; ++half) {
        A *value = a[half].row[slot], *gradient = slope[half].row[slot];
        if (row < 0 || row >= s.height) {
          zero_row(value, s);
        } else {
          for_each_vector(p[half] + row * h.stride[2], h.stride[3], s, value, [&](int64_t x, Vec<A> v) {
            Vec<A> y, dy;
            vgelu_with_grad<A>(v, y, dy);
            store(value + x, y);
            store(gradient + x, dy);
          });
        }
      }
    };
    const auto fill_g = [&](int slot, int64_t row) {
      A* const to = g.row[slot];
      if (row < 0 || row >= s.height) {
        zero_row(to, s);
      } else {
        for_each_vector(pg + row * grad_y.stride[2], grad_y.stride[3], s, to,
                        [&](int64_t x, Vec<A> v) { store(to + x, v); });
      }
    };

    // Step by step: rows first .. first + R - 1 of grad_h need one more row of grad_d on each side, and those one
    // more of a. The step before the first fills the buffers. Sums that are not finite are taken a second time.
    A* const found = partial.get() + index * 18;
    bool again = false;
    while (true) {
      fill(0, u.begin - R);
      fill(1, u.begin - R + 1);
      for (int64_t first = u.begin - R; first < u.end; first += R) {
        for (int i = 0; i < R; ++i) {
          fill(i + 2, first + i + 2);
          fill_g(i, first + i + 1);
        }
        for (int64_t x = 0; x < s.padded; x += L) {
          Vec<A> d1[R], d2[R];
          convolve<A, R>(a[0], x, w[0], d1);
          convolve<A, R>(a[1], x, w[1], d2);
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) {
            Vec<A> value, gradient;
            vgelu_with_grad<A>(d1[i], value, gradient);
            const Vec<A> gy = load(g.row[i] + x);
            store(grad_d[0].row[i + 2] + x, gy * d2[i] * gradient);
            store(grad_d[1].row[i + 2] + x, gy * value);
          }
        }
        if (first >= u.begin) {
          const int rows = u.end - first < R ? int(u.end - first) : R;
          for (int half = 0; half < 2; ++half) {
            channel_gradients<T, R>(grad_d[half], a[half], slope[half], w[half], rows, s,
                                    out[half] + first * s.width, sums + half * 9 * L);
            if (again) sum_inside_plane(grad_d[half], a[half], first, rows, s, found + half * 9);
          }
        }
        for (int half = 0; half < 2; ++half) {
          a[half].advance();
          slope[half].advance();
          grad_d[half].advance();
        }
      }
      if (again) break;
      for (int k = 0; k < 18; ++k) found[k] = sum<A>(load(sums + k * L));
      if (all_finite(found, 18)) break;
      for (int k = 0; k < 18; ++k) found[k] = A(0);
      again = true;
    }
  });

  T* const pw = static_cast<T*>(grad_weight.data);
  for (int64_t i = 0; i < 2 * M * 9; ++i) {
    const int64_t channel = i / 9, pair = channel % M, k = channel / M * 9 + i % 9;
    double total = 0;
    for (int64_t sample = 0; plane && sample < h.size[0]; ++sample) {
      for (int64_t strip = 0; strip < s.strips; ++strip) {
        total += double(partial[((sample * M + pair) * s.strips + strip) * 18 + k]);
      }
    }
    pw[i] = from_acc<T>(A(total));
  }
}

}  // namespace

void gated_depthwise_ffn_forward(const Tensor& h, const Tensor& weight, const Tensor& y) {
  MIRAGE_FOR_MAP_DTYPE(h.dtype, T, { forward<T>(h, weight, y); })
}

void gated_depthwise_ffn_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
                                  const Tensor& grad_weight) {
  MIRAGE_FOR_MAP_DTYPE(h.dtype, T, { backward<T>(grad_y, h, weight, grad_h, grad_weight); })
}

}  // namespace mirage::cpu::MIRAGE_ISA
