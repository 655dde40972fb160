// The backend of the CPU library.
#include <algorithm>

#include "backend.h"
#include "mirage/dense_conv2d.h"

namespace mirage::example {
namespace {

class CpuBackend : public Backend {
 public:
  Tensor keep(const Tensor& t) override { return t; }
  void upload(const float* from, const Map& to) override { std::copy(from, from + to.size(), to.data()); }
  void download(const Map& from, float* to) override { std::copy(from.data(), from.data() + from.size(), to); }

  void convolve(const Map& x, const Tensor& weight, const Map& y) override {
    dense_conv2d(x.tensor(), weight, y.tensor());
  }

  void blocks(const Map& x, const std::vector<BlockWeights>& weights, const Map& y) override {
    transformer_blocks(x.tensor(), weights.data(), int64_t(weights.size()), y.tensor());
  }

  void unshuffle(const Map& large, const Map& small) override {
    for_pixels(small, large, [](float& s, float& l) { s = l; });
  }
  void shuffle(const Map& small, const Map& large) override {
    for_pixels(small, large, [](float& s, float& l) { l = s; });
  }

  void concatenate(const Map& a, const Map& b, const Map& y) override {
    std::copy(b.data(), b.data() + b.size(), std::copy(a.data(), a.data() + a.size(), y.data()));
  }

  void add(const Map& x, const Map& y) override {
    for (int64_t i = 0; i < y.size(); ++i) y.data()[i] += x.data()[i];
  }

 private:
  std::shared_ptr<void> allocate(int64_t bytes) override {
    return {new float[size_t(bytes) / sizeof(float)], [](float* memory) { delete[] memory; }};
  }

  template <class Move>
  static void for_pixels(const Map& small, const Map& large, Move move) {
    for (int64_t c = 0; c < small.channels; ++c) {
      float* p = small.plane(c);
      float* q = large.plane(c / 4) + c % 4 / 2 * large.width + c % 2;
      for (int64_t i = 0; i < small.height; ++i) {
        for (int64_t j = 0; j < small.width; ++j) move(p[i * small.width + j], q[2 * i * large.width + 2 * j]);
      }
    }
  }
};

}  // namespace

std::unique_ptr<Backend> cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace mirage::example
