// The backend of the CUDA library, which keeps activations and weights on the GPU. It is compiled by nvcc, or by any
// C++ compiler for the emulation, whose device.h and launch.h the kernels below use.
#include <map>
#include <stdexcept>

#include "backend.h"
#include "device_memory.h"
#include "mirage/cuda/transformer_blocks.h"

namespace mirage::example {
namespace {

using cuda::block_index;
using cuda::thread_index;

constexpr int kThreads = 256;

// One thread per pixel of the result, which has `size`. `small`: [4C, H, W], `large`: [C, 2H, 2W].
MIRAGE_KERNEL(kThreads)
unshuffle_kernel(const float* large, float* small, const int64_t height, const int64_t width, const int64_t size) {
  const int64_t n = block_index() * kThreads + thread_index();
  if (n >= size) return;
  const int64_t x = n % width, y = n / width % height, c = n / width / height;
  small[n] = large[((c / 4 * height + y) * 2 + c % 4 / 2) * 2 * width + 2 * x + c % 2];
}

MIRAGE_KERNEL(kThreads)
shuffle_kernel(const float* small, float* large, const int64_t height, const int64_t width, const int64_t size) {
  const int64_t n = block_index() * kThreads + thread_index();
  if (n >= size) return;
  const int64_t x = n % (2 * width), y = n / (2 * width) % (2 * height), c = n / (2 * width) / (2 * height);
  large[n] = small[((4 * c + y % 2 * 2 + x % 2) * height + y / 2) * width + x / 2];
}

MIRAGE_KERNEL(kThreads) add_kernel(const float* x, float* y, const int64_t size) {
  const int64_t n = block_index() * kThreads + thread_index();
  if (n < size) y[n] += x[n];
}

// A bias-free convolution, stride 1, zero padding: each thread sums one pixel of the result, [outputs, height, width]
// of `size` pixels. `weight`: [outputs, channels, kernel, kernel], kernel 1 or 3. The library leaves dense convolutions
// to others (PyTorch to cuDNN). A network has eleven of them between its levels, and here a plain one will do: lanes
// read neighbouring pixels, all threads of a block the same few weights.
MIRAGE_KERNEL(kThreads)
convolution_kernel(const float* x, const float* weight, float* y, const int64_t channels, const int kernel,
                   const int64_t height, const int64_t width, const int64_t size) {
  const int64_t n = block_index() * kThreads + thread_index();
  if (n >= size) return;
  const int64_t column = n % width, row = n / width % height, output = n / width / height;
  const int halo = kernel / 2;
  weight += output * channels * kernel * kernel;
  float sum = 0.0f;
  for (int64_t c = 0; c < channels; ++c, x += height * width) {
    float of_channel = 0.0f;  // summed per channel first, which keeps the rounding error small
    for (int i = 0; i < kernel; ++i) {
      for (int j = 0; j < kernel; ++j, ++weight) {
        const int64_t from_row = row + i - halo, from_column = column + j - halo;
        const bool in_bounds = from_row >= 0 && from_row < height && from_column >= 0 && from_column < width;
        if (in_bounds) of_channel = fmaf(*weight, x[from_row * width + from_column], of_channel);
      }
    }
    sum += of_channel;
  }
  y[n] = sum;
}

// Memory that is reused once it is given back. All its users are on one stream, which orders their reads and writes.
class Pool {
 public:
  ~Pool() {
    for (const auto& [bytes, memory] : free_) device_free(memory);
  }

  std::shared_ptr<void> allocate(int64_t bytes) {
    const auto found = free_.lower_bound(bytes);
    const bool fits = found != free_.end() && found->first <= 2 * bytes;
    const int64_t size = fits ? found->first : (bytes / 256 + 1) * 256;
    void* const memory = fits ? found->second : device_malloc(size);
    if (fits) free_.erase(found);
    return {memory, [this, size](void* done) { free_.emplace(size, done); }};
  }

 private:
  std::multimap<int64_t, void*> free_;
};

class CudaBackend : public Backend {
 public:
  // What is kept returns to the pool, which is destroyed last; by then no work may be in flight.
  ~CudaBackend() override {
    try {
      stream_.wait();
    } catch (const std::exception&) {
    }
  }

  Tensor keep(const Tensor& t) override {
    const int64_t bytes = t.numel() * bytes_of(t.dtype);
    kept_.push_back(pool_.allocate(bytes));
    Tensor copy = t;
    copy.data = kept_.back().get();
    stream_.copy(copy.data, t.data, bytes);
    return copy;
  }

  void upload(const float* from, const Map& to) override {
    stream_.copy(to.data(), from, to.size() * int64_t(sizeof(float)));
    stream_.wait();
  }

  void download(const Map& from, float* to) override {
    stream_.copy(to, from.data(), from.size() * int64_t(sizeof(float)));
    stream_.wait();
  }

  void convolve(const Map& x, const Tensor& weight, const Map& y) override {
    const int kernel = weight.size[2] == 1 ? 1 : 3;
    const float* const from = x.data();
    cuda::launch("convolution_kernel", convolution_kernel, grid_for(y), stream_.get(), from, weight.as<const float>(),
                 y.data(), x.channels, kernel, x.height, x.width, y.size());
  }

  void blocks(const Map& x, const std::vector<BlockWeights>& weights, const Map& y) override {
    cuda::Options options = options_with(nullptr, 0);
    const int64_t count = int64_t(weights.size());
    const std::string problem = cuda::transformer_blocks_problem(x.tensor(), weights.data(), count, options);
    if (!problem.empty()) throw std::runtime_error("no CUDA kernel takes " + problem);
    const int64_t bytes = cuda::transformer_blocks_workspace(x.tensor(), weights.data(), count, options);
    const auto workspace = pool_.allocate(bytes);
    options = options_with(workspace.get(), bytes);
    cuda::transformer_blocks(x.tensor(), weights.data(), count, y.tensor(), options);
  }

  void unshuffle(const Map& large, const Map& small) override {
    for_all("unshuffle_kernel", unshuffle_kernel, small, large.data(), small.data(), small.height, small.width);
  }
  void shuffle(const Map& small, const Map& large) override {
    for_all("shuffle_kernel", shuffle_kernel, large, small.data(), large.data(), small.height, small.width);
  }

  void concatenate(const Map& a, const Map& b, const Map& y) override {
    stream_.copy(y.data(), a.data(), a.size() * int64_t(sizeof(float)));
    stream_.copy(y.data() + a.size(), b.data(), b.size() * int64_t(sizeof(float)));
  }

  void add(const Map& x, const Map& y) override { for_all("add_kernel", add_kernel, y, x.data(), y.data()); }

 private:
  std::shared_ptr<void> allocate(int64_t bytes) override { return pool_.allocate(bytes); }

  cuda::Options options_with(void* workspace, int64_t bytes) const {
    cuda::Options options;
    options.stream = stream_.get(), options.workspace = workspace, options.workspace_bytes = bytes;
    return options;
  }

  // One thread per pixel of `y`.
  static cuda::Grid grid_for(const Map& y) { return {(y.size() + kThreads - 1) / kThreads, kThreads, 0}; }

  template <class Kernel, class... Sizes>
  void for_all(const char* name, Kernel kernel, const Map& y, const float* from, float* to, Sizes... sizes) {
    cuda::launch(name, kernel, grid_for(y), stream_.get(), from, to, sizes..., y.size());
  }

  Pool pool_;
  Stream stream_;
  std::vector<std::shared_ptr<void>> kept_;
};

}  // namespace

std::unique_ptr<Backend> cuda_backend() { return std::make_unique<CudaBackend>(); }

}  // namespace mirage::example
