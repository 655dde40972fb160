// dense_conv2d on a GPU: argument checks, and how its products are cut into blocks.
#include "mirage/cuda/dense_conv2d.h"

#include <algorithm>
#include <limits>

#include "checks.h"
#include "common/cuda/call_checks.h"
#include "cuda_launch.h"

namespace mirage::cuda {

namespace {

constexpr int64_t kMostSize = INT32_MAX / 64;

DenseConvRunner runner_for(DType dtype, const Options& options) {
  switch (dtype) {
    case DType::f16: return dense_conv_runner<TensorCores16<f16>>();
    case DType::bf16: return dense_conv_runner<TensorCores16<bf16>>();
    default: return options.tf32 ? dense_conv_runner<TensorCoresTf32>() : dense_conv_runner<ExactFloat>();
  }
}

void check_sizes(const Tensor& x, const Tensor& weight) {
  check_kernel_dtype("x", x);
  if (weight.dtype != x.dtype) check_dtype("weight", weight, DType::f32);
  for (int64_t size : {x.size[0], x.size[1], x.size[2], x.size[3]}) {
    if (size > kMostSize) fail("x", "sizes up to " + std::to_string(kMostSize), shape_of(x));
  }
  if (weight.size[0] > kMostSize) fail("weight", "sizes up to " + std::to_string(kMostSize), shape_of(weight));
}

int size_of_kernel(const Tensor& weight) { return weight.size[2] == 1 ? 1 : 3; }

PixelMap map_of(const Tensor& t) {
  return {t.data, t.stride[0], t.stride[2], t.stride[3], t.stride[1] * bytes_of(t.dtype),
          int(t.size[0]), int(t.size[1]), int(t.size[2]), int(t.size[3])};
}

// Whether the lines of an image follow each other, so that one long line is the same image to a 1x1 convolution.
bool is_flat(const PixelMap& map) {
  return (map.height == 1 || map.s_row == map.width * map.s_column) && int64_t(map.height) * map.width <= kMostSize;
}

void flatten(PixelMap& map) { map.width *= map.height, map.height = 1; }

int64_t ceil_of(int64_t n, int64_t of) { return (n + of - 1) / of; }

// Tiles of `pixels` in lines of `columns`, in an image.
int64_t tiles_of(const PixelMap& map, int pixels, int columns) {
  return ceil_of(map.width, columns) * ceil_of(map.height, pixels / columns);
}

// Of a tile: long lines are read in fewer pieces; short ones where that saves tiles.
int columns_of(const PixelMap& map, int pixels) {
  return tiles_of(map, pixels, 32) <= tiles_of(map, pixels, 16) ? 32 : 16;
}

// ---- the convolution -----------------------------------------------------------------------------------------------

// Clocks of a multiprocessor for a chunk of channels of a block, roughly: 32 bytes of pixels a clock, and then what is
// slowest of the products, reading fragments from shared memory or, where they are exact, multiplying.
int64_t clocks_of_chunk(int size, int outputs, int64_t depth, bool exact) {
  const int64_t staged = kDensePixels * (size == 1 ? 2 : 1), panels = size == 1 ? 2 : 9;
  const int64_t fragments = panels * kTileWarps * 4 * (outputs / 16 + 2);
  return staged + (exact ? std::max(fragments, kDensePixels * outputs * depth * size * size / 128) : fragments);
}

// What a launch takes on a GPU that has nothing else to do, and the bytes a multiprocessor writes or reads in a clock.
constexpr int64_t kLaunchClocks = 3000, kBytesOfClock = 16;

// A convolution with everything but its memory: how many outputs a block has, and how many blocks share the channels of
// a tile, so that the estimated time is least. Many outputs use each pixel more often; few blocks leave multiprocessors
// idle.
struct Convolution {
  DenseConvArguments p;
  DenseConvPlan plan;
  int64_t panel_bytes = 0, partial_bytes = 0;

  Convolution(const DenseConvRunner& runner, const PixelMap& x, int64_t outputs, const Tensor& weight, DType dtype,
              bool exact) : p(), plan() {
    p.x = x, p.outputs = int(outputs), p.wide = weight.dtype == DType::f32;
    plan.size = size_of_kernel(weight);
    if (plan.size == 1 && is_flat(x)) flatten(p.x), p.tile = Lines(kDensePixels);
    else p.tile = Lines(columns_of(x, kDensePixels));
    p.window = Lines(p.tile.length + plan.size / 2 * 2);
    plan.tiles = p.x.batch * tiles_of(p.x, kDensePixels, p.tile.length);
    const int64_t depth = runner.depth[plan.size];
    p.chunks = int(std::max<int64_t>(1, ceil_of(p.x.channels, depth)));
    const int64_t elements = int64_t(p.x.batch) * outputs * p.x.height * p.x.width, all = multiprocessors();
    int64_t least = std::numeric_limits<int64_t>::max();
    for (const int of_block : kDenseOutputs) {
      const int64_t blocks = plan.tiles * ceil_of(outputs, of_block);
      for (int splits = 1; splits <= std::min(p.chunks, 32); ++splits) {
        const int64_t partial = splits == 1 ? 0 : splits * elements * int64_t(sizeof(float));
        const int64_t products = ceil_of(p.chunks, splits) * clocks_of_chunk(plan.size, of_block, depth, exact);
        const int64_t sums = splits == 1 ? 0 : kLaunchClocks + 2 * partial / (all * kBytesOfClock);
        const int64_t clocks = ceil_of(blocks * splits, all) * products + sums;
        if (clocks >= least) continue;
        least = clocks, plan.outputs = of_block, p.splits = splits, partial_bytes = partial;
      }
    }
    plan.panel_rows = ceil_of(outputs, plan.outputs) * plan.outputs;
    panel_bytes = ceil_of(plan.panel_rows * p.chunks * depth * weight.size[2] * bytes_of(dtype), 256) * 256;
  }

  int64_t bytes() const { return panel_bytes + partial_bytes; }

  void run(const DenseConvRunner& runner, const void* weight, bool turned, const Tensor& y, const Options& options) {
    p.weight = weight, p.turned = turned, p.y = y.data;
    p.panels = options.workspace;
    p.partial = reinterpret_cast<float*>(static_cast<char*>(options.workspace) + panel_bytes);
    p.pairs = p.x.width % 2 == 0 && reinterpret_cast<uintptr_t>(y.data) % (2 * uintptr_t(bytes_of(y.dtype))) == 0;
    runner.convolve(p, plan, options.stream);
  }
};

Convolution convolution_of(const DenseConvRunner& runner, const Tensor& x, int64_t outputs, const Tensor& weight,
                           const Options& options) {
  return Convolution(runner, map_of(x), outputs, weight, x.dtype, x.dtype == DType::f32 && !options.tf32);
}

// ---- the gradient of the weight ------------------------------------------------------------------------------------

struct WeightGradient {
  DenseWeightArguments p;
  DenseWeightPlan plan;

  // Wide tiles of the gradient take about three times as long as narrow ones. Two blocks for each multiprocessor.
  WeightGradient(const PixelMap& x, const PixelMap& grad_y, int size) : p(), plan() {
    p.x = x, p.grad_y = grad_y, plan.size = size;
    if (size == 1 && is_flat(x) && is_flat(grad_y)) {
      flatten(p.x), flatten(p.grad_y), p.tile = Lines(kDenseWeightPixels);
    } else {
      p.tile = Lines(columns_of(x, kDenseWeightPixels));
    }
    p.window = Lines(p.tile.length + size / 2 * 2);
    p.tiles = x.batch * tiles_of(p.x, kDenseWeightPixels, p.tile.length);
    const int64_t narrow = ceil_of(grad_y.channels, 32) * ceil_of(x.channels, 16);
    const int64_t wide = ceil_of(grad_y.channels, 64) * ceil_of(x.channels, size == 1 ? 64 : 32);
    plan.wide = size == 1 || narrow > 3 * wide;
    plan.items = plan.wide ? wide : narrow;
    const int64_t wanted = plan.items > 0 ? ceil_of(2 * multiprocessors(), plan.items) : 1;
    p.parts = int(std::min(p.tiles, wanted));
  }

  int64_t elements() const { return int64_t(p.grad_y.channels) * p.x.channels * plan.size * plan.size; }
  int64_t bytes() const { return p.parts == 1 ? 0 : p.parts * elements() * int64_t(sizeof(float)); }

  void run(const DenseConvRunner& runner, const Tensor& grad_weight, const Options& options) {
    float* const result = grad_weight.as<float>();
    p.partial = p.parts == 1 ? result : static_cast<float*>(options.workspace);
    if (p.parts > 0) runner.weight(p, plan, options.stream);
    if (p.parts == 1) return;
    launch("dense_weight_sum_kernel", dense_weight_sum_kernel<kTileThreads>,
           {ceil_of(elements(), kLanes), kTileThreads, kTileThreads * int64_t(sizeof(float))}, options.stream,
           static_cast<const float*>(p.partial), p.parts, elements(), result);
  }
};

MIRAGE_KERNELS(list) {
  dense_conv_runner<TensorCores16<f16>>().list(list);
  dense_conv_runner<TensorCores16<bf16>>().list(list);
  dense_conv_runner<TensorCoresTf32>().list(list);
  dense_conv_runner<ExactFloat>().list(list);
  list.add<dense_weight_sum_kernel<kTileThreads>>(kTileThreads, kTileThreads * sizeof(float));
}

}  // namespace

int64_t dense_conv2d_workspace(const Tensor& x, const Tensor& weight, const Options& options) {
  dense_conv::check_inputs(x, weight);
  check_sizes(x, weight);
  return convolution_of(runner_for(x.dtype, options), x, weight.size[0], weight, options).bytes();
}

void dense_conv2d(const Tensor& x, const Tensor& weight, const Tensor& y, const Options& options) {
  dense_conv::check_forward(x, weight, y);
  check_sizes(x, weight);
  if (y.numel() == 0) return;
  const DenseConvRunner runner = runner_for(x.dtype, options);
  Convolution forward = convolution_of(runner, x, weight.size[0], weight, options);
  check_workspace(options, forward.bytes());
  forward.run(runner, weight.data, false, y, options);
}

int64_t dense_conv2d_backward_workspace(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                        const Options& options) {
  dense_conv::check_grad_y(grad_y, x, weight);
  check_sizes(x, weight);
  const Convolution back = convolution_of(runner_for(x.dtype, options), grad_y, x.size[1], weight, options);
  return std::max(back.bytes(), WeightGradient(map_of(x), map_of(grad_y), size_of_kernel(weight)).bytes());
}

void dense_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                           const Tensor& grad_weight, const Options& options) {
  dense_conv::check_backward(grad_y, x, weight, grad_x, grad_weight);
  check_sizes(x, weight);
  const DenseConvRunner runner = runner_for(x.dtype, options);
  if (dense_conv::is_wanted(grad_x) && x.numel() > 0) {
    Convolution back = convolution_of(runner, grad_y, x.size[1], weight, options);
    check_workspace(options, back.bytes());
    back.run(runner, weight.data, true, grad_x, options);
  }
  if (dense_conv::is_wanted(grad_weight) && weight.numel() > 0) {
    WeightGradient of_weight(map_of(x), map_of(grad_y), size_of_kernel(weight));
    check_workspace(options, of_weight.bytes());
    of_weight.run(runner, grad_weight, options);
  }
}

}  // namespace mirage::cuda
