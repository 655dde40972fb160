// Tests of the GPU emulation: conversions, warps and barriers, and that it detects missing barriers.
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "common/cuda/elementary.h"
#include "common/cuda/launch.h"
#include "common/cuda/gemm.h"

using namespace mirage::cuda;

namespace {

// Every 16-bit number survives the conversion to float and back; numbers in between round to nearest, ties to even.
template <class T>
void test_conversions(uint16_t infinity) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T x{uint16_t(bits)};
    const float value = to_float(x);
    if ((bits & 0x7fff) > infinity) {
      CHECK(std::isnan(value), "%04x", bits);
      continue;
    }
    CHECK(from_float<T>(value).bits == bits, "%04x becomes %04x", bits, from_float<T>(value).bits);
    if ((bits & 0x7fff) >= infinity) continue;
    const T next{uint16_t(bits + 1)};
    if ((next.bits & 0x7fff) >= infinity) continue;
    const double middle = (double(value) + double(to_float(next))) / 2;
    const uint16_t even = bits % 2 ? next.bits : x.bits;
    CHECK(from_float<T>(float(middle)).bits == even, "between %04x and the next", bits);
  }
  CHECK(std::isnan(to_float(from_float<T>(NAN))), "NaN");
}

void test_gelu() {
  double worst = 0, worst_half = 0, worst_slope = 0, worst_slope_half = 0;
  for (double x = -16; x < 16; x += 1e-3) {
    const float at = float(x);
    const double exact = double(at) * 0.5 * std::erfc(-double(at) / std::sqrt(2.0)), scale = std::max(1.0, std::fabs(x));
    worst = std::max(worst, std::fabs(gelu<float>(at) - exact) / scale);
    worst_half = std::max(worst_half, std::fabs(gelu<f16>(at) - exact) / scale);
    float slope, slope_half;
    CHECK(gelu_with_slope<float>(at, slope) == gelu<float>(at), "%g", x);
    CHECK(gelu_with_slope<f16>(at, slope_half) == gelu<f16>(at), "%g", x);
    const double cdf = 0.5 * std::erfc(-double(at) / std::sqrt(2.0));
    const double exact_slope = cdf + at * 0.39894228040143268 * std::exp(-0.5 * double(at) * at);
    worst_slope = std::max(worst_slope, std::fabs(slope - exact_slope));
    worst_slope_half = std::max(worst_slope_half, std::fabs(slope_half - exact_slope));
  }
  CHECK(worst < 1e-7, "%.2e", worst);
  CHECK(worst_half < 2.6e-6, "%.2e", worst_half);
  CHECK(worst_slope < 1.6e-7, "%.2e", worst_slope);
  CHECK(worst_slope_half < 1.1e-5, "%.2e", worst_slope_half);
  CHECK(std::isnan(gelu<float>(NAN)) && std::isnan(gelu<float>(-INFINITY)), "NaN");
  CHECK(std::isinf(gelu<float>(INFINITY)), "infinity");
  for (const float x : {NAN, INFINITY, -INFINITY}) {
    float slope = 0;
    const float value = gelu_with_slope<float>(x, slope);
    CHECK(std::isnan(slope) && std::isinf(value) == (x > 0), "%g", double(x));
  }
  float slope = 0;
  gelu_with_slope<float>(-3e38f, slope);
  CHECK(slope == 0, "%g", double(slope));
}

// A warp's product of random matrices, stored as panels, against double.
template <class Kind>
struct ProductArguments {
  const double *left, *right;  // [16 MT, kDepth], [kDepth, 8 NT]
  float* result;
};

constexpr int kDepth = 48, kRowTiles = 2, kColumnTiles = 3, kPitch = 40;

template <class Kind>
void product_kernel(ProductArguments<Kind> p) {
  using T = typename Kind::Element;
  T* panel = reinterpret_cast<T*>(shared_memory());
  T* pixels = panel + 16 * kRowTiles * kDepth;
  store_panel<Kind, 16 * kRowTiles, kDepth, kLanes>(panel, [&](int row, int k, float (&pair)[2]) {
    for (int i = 0; i < Kind::kUnit; ++i) pair[i] = float(p.left[row * kDepth + k + i]);
  });
  for (int i = thread_index(); i < kDepth * 8 * kColumnTiles; i += kLanes) {
    pixels[i / (8 * kColumnTiles) * kPitch + i % (8 * kColumnTiles)] = from_float<T>(float(p.right[i]));
  }
  sync_block();
  float acc[kRowTiles][kColumnTiles][4] = {};
  multiply<kDepth>(Kind(), panel, pixels, kPitch, acc);
  for (int m = 0; m < kRowTiles; ++m) {
    for (int n = 0; n < kColumnTiles; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * m + lane_index() / 4 + i / 2 * 8, column = 8 * n + lane_index() % 4 * 2 + i % 2;
        p.result[row * 8 * kColumnTiles + column] = acc[m][n][i];
      }
    }
  }
}

template <class Kind>
void test_product(const char* name, double tolerance) {
  constexpr int kRows = 16 * kRowTiles, kColumns = 8 * kColumnTiles;
  std::vector<double> left(kRows * kDepth), right(kDepth * kColumns);
  std::mt19937 random(1);
  std::uniform_int_distribution<int> eighths(-16, 16);  // exact in every type
  for (double& x : left) x = eighths(random) / 8.0;
  for (double& x : right) x = eighths(random) / 8.0;
  std::vector<float> result(kRows * kColumns, NAN);
  const ProductArguments<Kind> p{left.data(), right.data(), result.data()};
  launch("product_kernel", product_kernel<Kind>, {1, kLanes, 32 << 10}, nullptr, p);
  double worst = 0;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += left[size_t(row * kDepth + k)] * right[size_t(k * kColumns + column)];
      const double error = std::fabs(sum - double(result[size_t(row * kColumns + column)]));
      worst = error <= worst ? worst : error;  // also NaN
    }
  }
  CHECK(worst <= tolerance, "%s: %.2e", name, worst);
}

// Each thread writes, then reads what its neighbour wrote, with or without a barrier in between.
template <bool kBarrier>
void neighbour_kernel(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[thread_index()] = thread_index();
  if (kBarrier) sync_block();
  out[thread_index()] = shared[(thread_index() + 1) % 64];
}

template <bool kBarrier>
std::vector<int> neighbours(emulation::Order order) {
  std::vector<int> out(64, -2);
  emulation::set_order(order);
  launch("neighbour_kernel", neighbour_kernel<kBarrier>, {1, 64, 64 * sizeof(int)}, nullptr, out.data());
  emulation::set_order(emulation::Order::forward);
  return out;
}

void test_barriers() {
  using emulation::Order;
  const auto expected = neighbours<true>(Order::forward);
  CHECK(expected[3] == 4 && expected[63] == 0, "%d %d", expected[3], expected[63]);
  for (Order order : {Order::backward, Order::shuffled}) CHECK(neighbours<true>(order) == expected, "with a barrier");
  CHECK(neighbours<false>(Order::forward) != expected, "without a barrier nothing shows");
  CHECK(neighbours<false>(Order::forward) != neighbours<false>(Order::backward), "the order of threads does nothing");
}

void diverging_kernel(int first) {
  if (thread_index() >= first) sync_block();
}

void diverging_warp_kernel(int first) {
  const uint32_t mine = 0;
  if (thread_index() >= first) emulation::exchange(&mine, 1);
}

bool refused(void (*kernel)(int), int first) {
  try {
    launch("diverging_kernel", kernel, {1, 64, 0}, nullptr, first);
  } catch (const std::logic_error& error) {
    return std::string(error.what()).rfind("diverging_kernel: some ", 0) == 0;
  }
  return false;
}

void test_divergence() {
  CHECK(!refused(diverging_kernel, 0) && !refused(diverging_warp_kernel, 0), "refused where all threads come");
  CHECK(refused(diverging_kernel, 1), "a thread that ends before the barrier");
  CHECK(refused(diverging_kernel, 32), "a warp that ends before the barrier");
  CHECK(refused(diverging_warp_kernel, 1), "a lane that does not take part");
}

}  // namespace

int main() {
  test_conversions<f16>(0x7c00);
  test_conversions<bf16>(0x7f80);
  CHECK(from_float<f16>(65519.0f).bits == 0x7bff && from_float<f16>(65520.0f).bits == 0x7c00, "overflow");
  test_gelu();
  test_product<TensorCores16<f16>>("f16", 0);
  test_product<TensorCores16<bf16>>("bf16", 0);
  test_product<TensorCoresTf32>("tf32", 0);
  test_product<ExactFloat>("float", 0);
  test_barriers();
  test_divergence();
  return mirage::test::finish();
}
