// Dense sweeps of vec_math.h against long double, and the special values.
#include <cmath>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "common/cpu/vec_math.h"

using namespace mirage::cpu::MIRAGE_ISA;

namespace {

const long double kSqrt2 = sqrtl(2.0L), kInverseSqrt2Pi = 0.398942280401432677939946059934L;

long double cdf(long double x) { return erfcl(-x / kSqrt2) / 2; }
long double slope(long double x) { return cdf(x) + x * expl(-x * x / 2) * kInverseSqrt2Pi; }

struct Worst {
  long double error = 0;
  double at = 0;
  void add(long double e, double x) {
    if (!(e <= error)) error = e, at = x;
  }
};

// Calls f(x, lane) for `count` points evenly spaced on [low, high].
template <class A, class F>
void sweep(double low, double high, int count, F f) {
  constexpr int L = kLanes<A>;
  for (int i = 0; i < count; i += L) {
    Vec<A> x;
    for (int k = 0; k < L; ++k) x[k] = A(low + (high - low) * (i + k) / (count - 1));
    f(x);
  }
}

template <class A>
void expect(const char* name, const Worst& worst, double bound) {
  std::printf("%-8s %-14s worst error %.3Lg at %.9g (bound %.3g)\n", sizeof(A) == 4 ? "float" : "double", name,
              worst.error, worst.at, bound);
  CHECK(worst.error <= bound, "%s", name);
}

template <class A>
void test_sweeps(const double (&bounds)[6]) {
  Worst exp, sigmoid, normal, gelu, value, derivative;
  const double end = sizeof(A) == 4 ? 87.0 : 708.0;  // normal numbers
  const int n = 1 << 19;
  sweep<A>(-end, end, n, [&](Vec<A> x) {
    const Vec<A> e = vexp<A>(x), s = vsigmoid<A>(x);
    for (int k = 0; k < kLanes<A>; ++k) {
      exp.add(fabsl(e[k] / expl(x[k]) - 1), x[k]);
      sigmoid.add(fabsl(s[k] * (1 + expl(-(long double)x[k])) - 1), x[k]);
    }
  });
  for (double range : {1.0, 14.0, 200.0}) {
    sweep<A>(-range, range, n, [&](Vec<A> x) {
      Vec<A> v, d;
      vgelu_with_grad<A>(x, v, d);
      const Vec<A> c = vnormal_cdf(x), g = vgelu<A>(x);
      for (int k = 0; k < kLanes<A>; ++k) {
        const long double t = x[k], scale = fmaxl(1, fabsl(t));
        normal.add(fabsl(c[k] - cdf(t)), x[k]);
        gelu.add(fabsl(g[k] - t * cdf(t)) / scale, x[k]);
        value.add(fabsl(v[k] - t * cdf(t)) / scale, x[k]);
        derivative.add(fabsl(d[k] - slope(t)), x[k]);
      }
    });
  }
  expect<A>("exp", exp, bounds[0]);
  expect<A>("sigmoid", sigmoid, bounds[1]);
  expect<A>("cdf", normal, bounds[2]);
  expect<A>("gelu", gelu, bounds[3]);
  expect<A>("gelu (pair)", value, bounds[4]);
  expect<A>("slope (pair)", derivative, bounds[5]);
}

template <class A>
void test_special_values() {
  const A inf = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  const A huge = std::numeric_limits<A>::max();
  auto exp = [](A x) { return vexp<A>(splat(x))[0]; };
  auto sigmoid = [](A x) { return vsigmoid<A>(splat(x))[0]; };
  auto gelu = [](A x) { return vgelu<A>(splat(x))[0]; };
  auto pair = [](A x, bool want_slope) {
    Vec<A> v, d;
    vgelu_with_grad<A>(splat(x), v, d);
    return want_slope ? d[0] : v[0];
  };
  CHECK(exp(inf) == inf && exp(huge) == inf && exp(A(1000)) == inf, "overflow of exp");
  CHECK(exp(-inf) == 0 && exp(-huge) == 0 && exp(A(-1000)) == 0, "underflow of exp");
  CHECK(exp(A(0)) == 1 && std::isnan(exp(nan)), "exp(0), exp(nan)");
  const A tiny = A(sizeof(A) == 4 ? -100 : -740);  // a subnormal result
  CHECK(std::fabs(exp(tiny) - A(expl(tiny))) <= 2 * std::numeric_limits<A>::denorm_min(), "subnormal exp");
  CHECK(sigmoid(inf) == 1 && sigmoid(-inf) == 0 && sigmoid(A(0)) == A(0.5) && std::isnan(sigmoid(nan)), "sigmoid");
  CHECK(gelu(inf) == inf && pair(inf, false) == inf, "gelu(inf)");
  CHECK(std::isnan(gelu(-inf)) && std::isnan(pair(-inf, false)), "gelu(-inf)");
  CHECK(std::isnan(gelu(nan)) && std::isnan(pair(nan, false)) && std::isnan(pair(nan, true)), "gelu(nan)");
  CHECK(gelu(A(0)) == 0 && pair(A(0), false) == 0, "gelu(0)");
  CHECK(std::fabs(pair(A(0), true) - A(0.5)) <= A(1e-7), "slope at 0: %.9g", double(pair(A(0), true)));
  for (A x : {A(40), A(200), A(1e30)}) {
    CHECK(gelu(x) == x && pair(x, false) == x && pair(x, true) == 1, "large %g", double(x));
    CHECK(gelu(-x) == 0 && std::signbit(gelu(-x)), "gelu(%g) = %g", double(-x), double(gelu(-x)));
    CHECK(pair(-x, false) == 0 && pair(-x, true) == 0, "pair(%g) = %g, %g", double(-x), double(pair(-x, false)),
          double(pair(-x, true)));
  }
}

#if defined(__AVX512BF16__)
void test_sigmoid_for_bf16() {
  auto sigmoid = [](Vec<float> x) {
    Vec<float> v[1] = {x};
    vsigmoid_for_bf16_each(v);
    return v[0];
  };
  Worst absolute;
  for (double range : {1.0, 20.0, 200.0}) {
    sweep<float>(-range, range, 1 << 19, [&](Vec<float> x) {
      const Vec<float> s = sigmoid(x);
      for (int k = 0; k < kLanes<float>; ++k) absolute.add(fabsl(s[k] - 1 / (1 + expl(-(long double)x[k]))), x[k]);
    });
  }
  expect<float>("sigmoid (bf16)", absolute, 3e-4);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  auto one = [&](float x) { return sigmoid(splat(x))[0]; };
  CHECK(one(inf) == 1 && one(-inf) == 0 && std::isnan(one(nan)), "special values of the sigmoid");
}

void test_gelu_for_bf16() {
  auto gelu = [](Vec<float> x) {
    Vec<float> v[1] = {x};
    vgelu_for_bf16_each(v);
    return v[0];
  };
  Worst absolute, relative;
  for (double range : {1.0, 14.0, 200.0}) {
    sweep<float>(-range, range, 1 << 19, [&](Vec<float> x) {
      const Vec<float> g = gelu(x);
      for (int k = 0; k < kLanes<float>; ++k) {
        const long double t = x[k], exact = t * cdf(t), error = fabsl(g[k] - exact);
        absolute.add(error / fmaxl(1, fabsl(t)), x[k]);
        if (t > -2 && t < 0) relative.add(error / fabsl(exact), x[k]);
      }
    });
  }
  expect<float>("gelu (bf16)", absolute, 3e-5);
  expect<float>("  relative", relative, 1e-3);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  auto one = [&](float x) { return gelu(splat(x))[0]; };
  CHECK(one(inf) == inf && std::isnan(one(-inf)) && std::isnan(one(nan)) && one(0) == 0, "special values");
  for (float x : {40.0f, 200.0f, 1e30f}) {
    CHECK(one(x) == x && one(-x) == 0 && std::signbit(one(-x)), "gelu(%g) = %g", double(-x), double(one(-x)));
  }
}
#endif

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  test_sweeps<float>({1.2e-7, 1.7e-7, 9e-8, 8e-8, 1e-7, 1.5e-7});
  test_sweeps<double>({3e-16, 4e-16, 3e-16, 3e-16, 3e-16, 4e-16});
  test_special_values<float>();
  test_special_values<double>();
#if defined(__AVX512BF16__)
  test_gelu_for_bf16();
  test_sigmoid_for_bf16();
#endif
  return mirage::test::finish();
}
