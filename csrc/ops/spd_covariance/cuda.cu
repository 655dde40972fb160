// spd_covariance on a GPU: checks the arguments and selects the kernels.
#include "mirage/cuda/spd_covariance.h"

#include <algorithm>

#include "checks.h"
#include "common/cuda/call_checks.h"
#include "common/cuda/registry.h"
#include "cuda_kernels.h"

namespace mirage::cuda {

namespace {

constexpr int kNarrow = 16, kWide = 32;  // sides of a square of the channels' products
constexpr int kManyPixels = 1024;        // over this many, rounding to TF32 averages out

// The kernels for a math mode and x of T, with squares of kSide.
template <class Kind, class T, int kSide>
struct Covariance {
  using Tile = CovarianceTile<kSide>;
  static constexpr int64_t kBackwardBytes = sizeof(CovarianceBackwardTile<kSide>);
  static constexpr int64_t kGroups = kSide * kSide / kLanes;
  static constexpr int64_t kMergeBytes = 3 * kMergeWarps * kLanes * int64_t(sizeof(float));

  static void forward(const CovarianceArguments& p, void* stream) {
    const int64_t squares = int64_t(p.batch) * p.pairs();
    const int64_t bytes = int64_t(sizeof(Tile)) * (p.tiles > 1 ? 2 : 1);
    launch("covariance_part_kernel", covariance_part_kernel<Kind, T, kSide>,
           {squares * p.parts, kCovarianceThreads, bytes}, stream, p);
    launch("covariance_merge_kernel", covariance_merge_kernel<T, kSide>,
           {squares * kGroups, kMergeWarps * kLanes, kMergeBytes}, stream, p);
  }

  static void backward(const CovarianceArguments& p, void* stream) {
    launch("covariance_backward_kernel", covariance_backward_kernel<Kind, T, kSide>,
           {int64_t(p.batch) * p.parts * p.tiles, kCovarianceThreads, kBackwardBytes}, stream, p);
  }

  static void list(KernelList& list) {
    list.add<covariance_part_kernel<Kind, T, kSide>>(kCovarianceThreads, (kSide == kWide ? 2 : 1) * sizeof(Tile));
    list.add<covariance_merge_kernel<T, kSide>>(kMergeWarps * kLanes, kMergeBytes);
    list.add<covariance_backward_kernel<Kind, T, kSide>>(kCovarianceThreads, kBackwardBytes);
  }
};

template <class Kind, class T, class Function>
void with_side(int channels, Function function) {
  if (channels <= kNarrow) function(Covariance<Kind, T, kNarrow>());
  else function(Covariance<Kind, T, kWide>());
}

template <class Kind, class Function>
void with_type(DType dtype, int channels, Function function) {
  switch (dtype) {
    case DType::f16: return with_side<Kind, f16>(channels, function);
    case DType::bf16: return with_side<Kind, bf16>(channels, function);
    default: return with_side<Kind, float>(channels, function);
  }
}

template <class Function>
void with_kernels(DType dtype, int channels, bool exact, Function function) {
  if (exact) with_type<ExactFloat>(dtype, channels, function);
  else with_type<TensorCoresTf32>(dtype, channels, function);
}

bool is_exact(const Tensor& x, const Options& options) {
  return !options.tf32 || (x.dtype == DType::f16 && x.size[2] * x.size[3] < kManyPixels);
}

// Splits the pixels into parts so that there are four blocks per SM. A part has one block for each tile of channels, or
// for each pair of tiles.
CovarianceArguments arguments_of(const Tensor& x, bool pairs) {
  check_planes(x);
  CovarianceArguments p{};
  p.x = planes_of(x), p.x_step = kCovarianceWarps * p.x.s_channel;
  p.batch = int(x.size[0]), p.channels = int(x.size[1]), p.pixels = int(x.size[2] * x.size[3]);
  const int side = p.channels <= kNarrow ? kNarrow : kWide;
  p.tiles = (p.channels + side - 1) / side;
  const int64_t blocks = std::max<int64_t>(1, int64_t(p.batch) * (pairs ? p.pairs() : p.tiles));
  const int64_t chunks = (p.pixels + kCovariancePixels - 1) / kCovariancePixels;
  const int64_t wanted = std::max<int64_t>(1, std::min(chunks, (4 * multiprocessors() + blocks - 1) / blocks));
  const int64_t chunks_of_part = (chunks + wanted - 1) / wanted;
  p.part_pixels = int(chunks_of_part) * kCovariancePixels;
  p.parts = int((chunks + chunks_of_part - 1) / chunks_of_part);
  return p;
}

int64_t product_floats(const CovarianceArguments& p) {
  const int64_t side = p.channels <= kNarrow ? kNarrow : kWide;
  return int64_t(p.batch) * p.parts * p.pairs() * side * side;
}

int64_t workspace_bytes(const CovarianceArguments& p) {
  return (product_floats(p) + int64_t(p.batch) * p.parts * 2 * p.channels) * int64_t(sizeof(float));
}

}  // namespace

MIRAGE_KERNELS(list) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const int side : {kNarrow, kWide}) {
      for (const bool exact : {false, true}) {
        with_kernels(dtype, side, exact, [&](auto kernels) { kernels.list(list); });
      }
    }
  }
}

int64_t spd_covariance_workspace(const Tensor& x) {
  check_ndim("x", x, 4);
  return workspace_bytes(arguments_of(x, true));
}

void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean, const Options& options) {
  covariance::check_forward(x, y, mean);
  CovarianceArguments p = arguments_of(x, true);
  check_workspace(options, workspace_bytes(p));
  if (x.numel() == 0) return;
  p.y = y.data, p.mean = mean.as<float>(), p.eps = float(eps);
  p.products = static_cast<float*>(options.workspace), p.means = p.products + product_floats(p);
  with_kernels(x.dtype, p.channels, is_exact(x, options), [&](auto kernels) { kernels.forward(p, options.stream); });
}

void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x,
                             const Options& options) {
  covariance::check_backward(grad_y, x, mean, grad_x);
  CovarianceArguments p = arguments_of(x, false);
  if (x.numel() == 0) return;
  p.grad_y = grad_y.data, p.y = grad_x.data, p.mean = mean.as<float>();
  std::copy(grad_y.stride, grad_y.stride + 3, p.grad_stride);
  with_kernels(x.dtype, p.channels, is_exact(x, options), [&](auto kernels) { kernels.backward(p, options.stream); });
}

}  // namespace mirage::cuda
