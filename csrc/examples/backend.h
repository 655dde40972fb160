// The interface between the network and what computes it: where activations and weights live, and which library runs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mirage/transformer_blocks.h"

namespace mirage::example {

// Activations [1, C, H, W] of float in the memory of a backend, which must outlive them. Copies share the memory.
class Map {
 public:
  Map(int64_t channels, int64_t height, int64_t width, std::shared_ptr<void> memory)
      : channels(channels), height(height), width(width), memory_(std::move(memory)) {}

  float* data() const { return static_cast<float*>(memory_.get()); }
  float* plane(int64_t c) const { return data() + c * height * width; }
  int64_t size() const { return channels * height * width; }

  Tensor tensor() const {
    const int64_t n = height * width;
    return {data(), DType::f32, 4, {1, channels, height, width}, {channels * n, n, width, 1}};
  }

  int64_t channels, height, width;

 private:
  std::shared_ptr<void> memory_;
};

// Results are passed in with the right size, and do not overlap the inputs. Work runs in the order of the calls;
// `download` waits for it.
class Backend {
 public:
  virtual ~Backend() = default;

  Map map(int64_t channels, int64_t height, int64_t width) {
    return {channels, height, width, allocate(channels * height * width * int64_t(sizeof(float)))};
  }

  // Returns a contiguous tensor in the backend's memory, valid as long as the backend. `t` may have to outlive it too.
  virtual Tensor keep(const Tensor& t) = 0;
  virtual void upload(const float* from, const Map& to) = 0;
  virtual void download(const Map& from, float* to) = 0;

  // A bias-free convolution, stride 1, zero padding, `weight` [M, C, 1 or 9] (mirage/dense_conv2d.h); and
  // mirage/transformer_blocks.h.
  virtual void convolve(const Map& x, const Tensor& weight, const Map& y) = 0;
  virtual void blocks(const Map& x, const std::vector<BlockWeights>& weights, const Map& y) = 0;

  // [C, 2H, 2W] to [4C, H, W], and back: channel 4c + 2i + j has the pixels (2y + i, 2x + j) of channel c.
  virtual void unshuffle(const Map& large, const Map& small) = 0;
  virtual void shuffle(const Map& small, const Map& large) = 0;

  // y = the channels of a, then those of b.
  virtual void concatenate(const Map& a, const Map& b, const Map& y) = 0;

  // y += x
  virtual void add(const Map& x, const Map& y) = 0;

 private:
  virtual std::shared_ptr<void> allocate(int64_t bytes) = 0;
};

std::unique_ptr<Backend> cpu_backend();

// A backend on the current GPU. Throws std::runtime_error if there is none. Available in programs built with the CUDA
// library or with the emulation of its kernels.
std::unique_ptr<Backend> cuda_backend();

}  // namespace mirage::example
