// dynamic_depthwise_conv2d of every instruction set against the sums written out, and its argument checks.
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "mirage/dynamic_depthwise_conv2d.h"
#include "ops/dynamic_depthwise_conv2d/cpu_kernels.h"

using mirage::DType;
using mirage::Tensor;

namespace {

template <class A>
struct Array {
  std::vector<A> values;
  Tensor view;

  explicit Array(std::initializer_list<int64_t> shape, double scale = 0) {
    view.dtype = sizeof(A) == 8 ? DType::f64 : DType::f32;
    for (int64_t n : shape) view.size[view.ndim++] = n;
    int64_t stride = 1;
    for (int d = view.ndim - 1; d >= 0; --d) view.stride[d] = stride, stride *= view.size[d];
    values.resize(size_t(stride));
    for (A& v : values) v = A(scale * mirage::test::value());
    view.data = values.data();
  }
};

struct Kernels {
  const char* name;
  void (*forward)(const Tensor&, const Tensor&, const Tensor&);
  void (*backward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
};

template <class A>
void test_shape(const Kernels& kernels, int64_t planes, int64_t height, int64_t width, int64_t k) {
  Array<A> x({1, planes, height, width}, 1), w({1, planes, k, k}, 1), g({1, planes, height, width}, 1);
  Array<A> y({1, planes, height, width}), gx({1, planes, height, width}), gw({1, planes, k, k});
  kernels.forward(x.view, w.view, y.view);
  kernels.backward(g.view, x.view, w.view, gx.view, gw.view);
  std::vector<double> ey(y.values.size()), egx(y.values.size()), egw(gw.values.size());
  for (int64_t c = 0; c < planes; ++c) {
    for (int64_t i = 0; i < height; ++i) for (int64_t j = 0; j < width; ++j) {
      for (int64_t p = 0; p < k; ++p) for (int64_t q = 0; q < k; ++q) {
        const int64_t row = i + p - k / 2, column = j + q - k / 2;
        if (row < 0 || row >= height || column < 0 || column >= width) continue;
        const size_t out = size_t((c * height + i) * width + j), in = size_t((c * height + row) * width + column);
        const size_t tap = size_t((c * k + p) * k + q);
        ey[out] += double(w.values[tap]) * double(x.values[in]);
        egx[in] += double(w.values[tap]) * double(g.values[out]);
        egw[tap] += double(g.values[out]) * double(x.values[in]);
      }
    }
  }
  const double eps = sizeof(A) == 8 ? 2.3e-16 : 1.2e-7;
  auto compare = [&](const char* name, const std::vector<A>& value, const std::vector<double>& exact, int64_t terms) {
    double worst = 0;
    for (size_t i = 0; i < exact.size(); ++i) worst = std::fmax(worst, std::fabs(double(value[i]) - exact[i]));
    const double bound = eps * double(terms);  // sqrt(terms) roundings, of partial sums that grow as sqrt(terms)
    CHECK(worst <= bound, "%s %s of %lld x %lld x %lld, kernel %lld, %d bytes: error %g, bound %g", kernels.name, name,
          (long long)planes, (long long)height, (long long)width, (long long)k, int(sizeof(A)), worst, bound);
  };
  compare("y", y.values, ey, k * k);
  compare("grad_x", gx.values, egx, k * k);
  compare("grad_weight", gw.values, egw, height * width);
}

void test_kernels(const Kernels& kernels) {
  for (int64_t k : {3, 5, 7, 9, 11}) {
    for (int64_t width : {1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 47, 64, 65, 97}) {
      test_shape<float>(kernels, 2, 13, width, k);
      test_shape<double>(kernels, 1, 10, width, k);
    }
    for (int64_t height : {1, 2, 4, 5, 8, 9, 63, 64, 65}) test_shape<float>(kernels, 1, height, 19, k);
  }
}

template <class F>
void expect_refusal(const char* what, F f) {
  bool refused = false;
  try {
    f();
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused, "%s", what);
}

void test_checks() {
  Array<float> x({1, 2, 4, 5}), w({1, 2, 7, 7}), other({1, 2, 4, 4}), even({1, 2, 6, 6}), batch({2, 2, 7, 7});
  Array<double> wide({1, 2, 7, 7});
  using mirage::dynamic_depthwise_conv2d_forward;
  expect_refusal("y of another shape", [&] { dynamic_depthwise_conv2d_forward(x.view, w.view, other.view); });
  expect_refusal("an even kernel", [&] { dynamic_depthwise_conv2d_forward(x.view, even.view, x.view); });
  expect_refusal("another batch", [&] { dynamic_depthwise_conv2d_forward(x.view, batch.view, x.view); });
  expect_refusal("another dtype", [&] { dynamic_depthwise_conv2d_forward(x.view, wide.view, x.view); });
  Tensor strided = x.view;
  strided.stride[3] = 2;
  expect_refusal("a strided output", [&] { dynamic_depthwise_conv2d_forward(x.view, w.view, strided); });
}

}  // namespace

#define MIRAGE_KERNELS_OF(isa)                                                                 \
  Kernels { #isa, mirage::cpu::isa::dynamic_depthwise_conv2d_forward,                          \
            mirage::cpu::isa::dynamic_depthwise_conv2d_backward }

int main() {
  using mirage::cpu::Isa;
  test_kernels(MIRAGE_KERNELS_OF(baseline));
#if defined(MIRAGE_HAVE_X86_ISAS)
  if (mirage::cpu::active_isa() >= Isa::avx2) test_kernels(MIRAGE_KERNELS_OF(avx2));
  if (mirage::cpu::active_isa() >= Isa::avx512) test_kernels(MIRAGE_KERNELS_OF(avx512));
#endif
  test_checks();
  return mirage::test::finish();
}
