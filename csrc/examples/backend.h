// What the network is made of, behind an interface: where maps and weights are, and which library computes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mirage/transformer_blocks.h"

namespace mirage::example {

// A feature map [1, C, H, W] of float, in the memory of a backend, which must outlive it. Copies are the same map.
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

// Results are maps that have the right size already, and no memory in common with what they are computed from. Work is
// done in the order of the calls; `download` waits for it.
class Backend {
 public:
  virtual ~Backend() = default;

  Map map(int64_t channels, int64_t height, int64_t width) {
    return {channels, height, width, allocate(channels * height * width * int64_t(sizeof(float)))};
  }

  // A contiguous tensor in this memory, where it stays as long as the backend lives. `t` may have to stay, too.
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

// On the current GPU. Throws std::runtime_error where there is none. In programs that are built with the CUDA library,
// or with the emulation of its kernels.
std::unique_ptr<Backend> cuda_backend();

}  // namespace mirage::example
