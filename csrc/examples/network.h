// MIRAGE on the CPU library, without Python: the levels of the network around mirage::transformer_blocks.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "mirage/dense_conv2d.h"
#include "mirage/transformer_blocks.h"
#include "safetensors.h"

namespace mirage::example {

// A feature map [1, C, H, W] of float.
class Map {
 public:
  Map(int64_t channels, int64_t height, int64_t width)
      : channels(channels), height(height), width(width), values(size_t(channels * height * width)) {}

  float* plane(int64_t c) { return values.data() + c * height * width; }
  const float* plane(int64_t c) const { return values.data() + c * height * width; }

  Tensor tensor() const {
    const int64_t n = height * width;
    return {const_cast<float*>(values.data()), DType::f32, 4, {1, channels, height, width}, {channels * n, n, width, 1}};
  }

  int64_t channels, height, width;
  std::vector<float> values;
};

class Network {
 public:
  // The weights have to outlive the network. Throws std::runtime_error where they are not those of MIRAGE.
  explicit Network(const SafeTensors& weights) : weights_(weights) {}

  // image: [1, 3, H, W] in [0, 1], H and W multiples of 8.
  Map restore(const Map& image) const {
    const Map level1 = blocks("encoder_level1", convolve("patch_embed.proj", image));
    const Map level2 = blocks("encoder_level2", unshuffle(convolve("down1_2.body.0", level1)));
    const Map level3 = blocks("encoder_level3", unshuffle(convolve("down2_3.body.0", level2)));
    Map x = blocks("latent", unshuffle(convolve("down3_4.body.0", level3)));
    x = shuffle(convolve("up4_3.body.0", convolve("reduce_dim_level3", x)));
    x = blocks("decoder_level3", convolve("reduce_chan_level3", concatenate(x, level3)));
    x = shuffle(convolve("up3_2.body.0", x));
    x = blocks("decoder_level2", convolve("reduce_chan_level2", concatenate(x, level2)));
    x = blocks("decoder_level1", concatenate(shuffle(convolve("up2_1.body.0", x)), level1));
    x = convolve("output", blocks("refinement", x));
    for (size_t i = 0; i < x.values.size(); ++i) x.values[i] += image.values[i];
    return x;
  }

 private:
  // A weight as the library takes it: its last dimensions as one, so that `ndim` are left.
  Tensor weight(const std::string& name, int ndim) const {
    Tensor t = weights_[name];
    while (t.ndim > ndim) {
      t.size[t.ndim - 2] *= t.size[t.ndim - 1];
      t.stride[t.ndim - 2] = 1;
      --t.ndim;
    }
    return t;
  }

  Map convolve(const std::string& name, const Map& x) const {
    Tensor w = weight(name + ".weight", 3);
    Map y(w.size[0], x.height, x.width);
    dense_conv2d(x.tensor(), w, y.tensor());
    return y;
  }

  Map blocks(const std::string& level, const Map& x) const {
    std::vector<BlockWeights> all;
    for (std::string name; weights_.has((name = level + "." + std::to_string(all.size())) + ".norm1.body.weight");) {
      all.push_back(block(name + "."));
    }
    Map y(x.channels, x.height, x.width);
    transformer_blocks(x.tensor(), all.data(), int64_t(all.size()), y.tensor());
    return y;
  }

  BlockWeights block(const std::string& name) const {
    const std::string attn = name + "attn.", gated = attn + "gatedcnn.", ffn = name + "ffn.";
    BlockWeights b;
    MixerWeights& m = b.mixer;
    m.norm_weight = weights_[name + "norm1.body.weight"], m.norm_bias = weights_[name + "norm1.body.bias"];
    m.qkv = weight(attn + "qkv.weight", 2), m.qkv_dwconv = weight(attn + "qkv_dwconv.weight", 2);
    m.temperature = weight(attn + "temperature", 1);
    m.bn_weight = weights_[gated + "norm.weight"], m.bn_bias = weights_[gated + "norm.bias"];
    m.bn_mean = weights_[gated + "norm.running_mean"], m.bn_var = weights_[gated + "norm.running_var"];
    m.gic1 = weight(gated + "gic1.weight", 2);
    m.generator_in = weight(gated + "kernel_generator.1.weight", 2);
    m.generator_out = weight(gated + "kernel_generator.3.weight", 2);
    m.gate_temperature = weights_[gated + "temperature"];
    m.gic2 = weight(gated + "gic2.weight", 2), m.proj_out = weight(gated + "proj_out.weight", 2);
    m.mlp_in = weight(attn + "mlp.0.weight", 2), m.mlp_out = weight(attn + "mlp.2.weight", 2);
    m.alpha_att = weights_[attn + "alpha_att"], m.alpha_conv = weights_[attn + "alpha_gated"];
    m.alpha_mlp = weights_[attn + "alpha_mlp"];
    m.project_out = weight(attn + "project_out.weight", 2);
    FeedForwardWeights& f = b.feed_forward;
    f.norm_weight = weights_[name + "norm2.body.weight"], f.norm_bias = weights_[name + "norm2.body.bias"];
    f.project_in = weight(ffn + "project_in.weight", 2), f.dwconv = weight(ffn + "dwconv.weight", 2);
    f.project_out = weight(ffn + "project_out.weight", 2);
    b.norm1_eps = b.bn_eps = b.norm2_eps = 1e-5;
    return b;
  }

  // [C, H, W] to [4C, H / 2, W / 2], and back.
  static Map unshuffle(const Map& x) {
    Map y(4 * x.channels, x.height / 2, x.width / 2);
    move_pixels(y, x, [](float& small, const float& large) { small = large; });
    return y;
  }
  static Map shuffle(const Map& x) {
    Map y(x.channels / 4, 2 * x.height, 2 * x.width);
    move_pixels(x, y, [](const float& small, float& large) { large = small; });
    return y;
  }

  template <class Small, class Large, class Move>
  static void move_pixels(Small& small, Large& large, Move move) {
    for (int64_t c = 0; c < small.channels; ++c) {
      auto* p = small.plane(c);
      auto* q = large.plane(c / 4) + c % 4 / 2 * large.width + c % 2;
      for (int64_t i = 0; i < small.height; ++i) {
        for (int64_t j = 0; j < small.width; ++j) move(p[i * small.width + j], q[2 * i * large.width + 2 * j]);
      }
    }
  }

  static Map concatenate(const Map& a, const Map& b) {
    Map y(a.channels + b.channels, a.height, a.width);
    std::copy(a.values.begin(), a.values.end(), y.values.begin());
    std::copy(b.values.begin(), b.values.end(), y.values.begin() + int64_t(a.values.size()));
    return y;
  }

  const SafeTensors& weights_;
};

}  // namespace mirage::example
