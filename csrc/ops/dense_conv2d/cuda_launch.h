// From the sizes of a convolution to its kernels; each kind of product is a source file of its own, which instantiates
// this.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/registry.h"
#include "cuda_kernels.h"
#include "cuda_weight.h"

namespace mirage::cuda {

constexpr int kDenseOutputs[] = {16, 32, 48, 64};  // of a block

// How a convolution is cut into blocks.
struct DenseConvPlan {
  int size;            // of the kernel, 1 or 3
  int outputs;         // of a block
  int64_t tiles;       // of pixels, of all samples
  int64_t panel_rows;  // outputs, with what fills up the last block's
};

struct DenseWeightPlan {
  int size;
  bool wide;
  int64_t items;  // tiles of the gradient: blocks for each part of the pixels
};

struct DenseConvRunner {
  int depth[4];  // channels of a chunk, by the size of the kernel
  void (*convolve)(const DenseConvArguments& arguments, const DenseConvPlan& plan, void* stream);
  void (*weight)(const DenseWeightArguments& arguments, const DenseWeightPlan& plan, void* stream);
  void (*list)(KernelList& list);
};

template <class Kind> DenseConvRunner dense_conv_runner();

#if defined(MIRAGE_INSTANTIATE)

namespace {

template <class Kind>
struct DenseConv {
  using T = typename Kind::Element;

  // function(a tile of the kernel for so many outputs of a block)
  template <int K, class Function>
  static void with_outputs(int outputs, Function function) {
    switch (outputs) {
      case 16: return function(DenseConvTile<Kind, K, 16>());
      case 32: return function(DenseConvTile<Kind, K, 32>());
      case 48: return function(DenseConvTile<Kind, K, 48>());
      default: return function(DenseConvTile<Kind, K, 64>());
    }
  }

  template <int K>
  static void convolve(const DenseConvArguments& p, const DenseConvPlan& plan, void* stream) {
    const int64_t size = plan.panel_rows * p.chunks * DenseConvTile<Kind, K, 16>::kDepth;
    const auto kernel = p.wide ? dense_panel_kernel<Kind, float, K> : dense_panel_kernel<Kind, T, K>;
    launch("dense_panel_kernel", kernel, {(size + 255) / 256, 256, 0}, stream, p, plan.outputs, size);
    with_outputs<K>(plan.outputs, [&](auto tile) {
      const Grid grid{plan.tiles * (plan.panel_rows / plan.outputs) * p.splits, kTileThreads, int64_t(sizeof(tile))};
      launch("dense_conv_kernel", dense_conv_kernel<Kind, K, decltype(tile)::kOut>, grid, stream, p);
    });
    if (p.splits == 1) return;
    const int64_t elements = int64_t(p.x.batch) * p.outputs * p.x.height * p.x.width;
    launch("dense_conv_sum_kernel", dense_conv_sum_kernel<T>, {(elements + 255) / 256, 256, 0}, stream, p, elements);
  }

  template <int K, bool kWide>
  static void weight(const DenseWeightArguments& p, const DenseWeightPlan& plan, void* stream) {
    using Tile = DenseWeightTile<Kind, K, kWide>;
    const Grid grid{plan.items * p.parts, kTileThreads, int64_t(sizeof(Tile))};
    launch("dense_weight_kernel", dense_weight_kernel<Kind, K, kWide>, grid, stream, p);
  }

  template <int K>
  static void list_size(KernelList& list) {
    list.add<dense_panel_kernel<Kind, T, K>>(256, 0);
    list.add<dense_panel_kernel<Kind, float, K>>(256, 0);
    for (const int outputs : kDenseOutputs) {
      with_outputs<K>(outputs, [&](auto tile) {
        list.add<dense_conv_kernel<Kind, K, decltype(tile)::kOut>>(kTileThreads, sizeof(tile));
      });
    }
    list.add<dense_weight_kernel<Kind, K, true>>(kTileThreads, sizeof(DenseWeightTile<Kind, K, true>));
  }

  static void list(KernelList& list) {
    list_size<1>(list);
    list_size<3>(list);
    list.add<dense_weight_kernel<Kind, 3, false>>(kTileThreads, sizeof(DenseWeightTile<Kind, 3, false>));
    list.add<dense_conv_sum_kernel<T>>(256, 0);
  }
};

}  // namespace

template <class Kind>
DenseConvRunner dense_conv_runner() {
  using Kernels = DenseConv<Kind>;
  return {{0, DenseConvTile<Kind, 1, 16>::kDepth, 0, DenseConvTile<Kind, 3, 16>::kDepth},
          [](const DenseConvArguments& p, const DenseConvPlan& plan, void* stream) {
            plan.size == 1 ? Kernels::template convolve<1>(p, plan, stream)
                           : Kernels::template convolve<3>(p, plan, stream);
          },
          [](const DenseWeightArguments& p, const DenseWeightPlan& plan, void* stream) {
            plan.size == 1 ? Kernels::template weight<1, true>(p, plan, stream)
            : plan.wide    ? Kernels::template weight<3, true>(p, plan, stream)
                           : Kernels::template weight<3, false>(p, plan, stream);
          },
          Kernels::list};
}

#endif

}  // namespace mirage::cuda
