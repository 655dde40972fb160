// MIRAGE without Python: the levels of the network around transformer_blocks, on any backend.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "backend.h"
#include "safetensors.h"

namespace mirage::example {

class Network {
 public:
  // Both must outlive the network.
  Network(const SafeTensors& weights, Backend& backend) : weights_(weights), backend_(backend) {}

  // image: [1, 3, H, W] in [0, 1]; H and W are multiples of 8. The first call moves the weights to the backend. Throws
  // std::runtime_error if they are not those of MIRAGE.
  Map restore(const Map& image) {
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
    backend_.add(image, x);
    return x;
  }

 private:
  Map convolve(const std::string& name, const Map& x) {
    if (!convolutions_.count(name)) convolutions_[name] = weight(name + ".weight", 3);
    const Tensor& w = convolutions_[name];
    const Map y = backend_.map(w.size[0], x.height, x.width);
    backend_.convolve(x, w, y);
    return y;
  }

  Map blocks(const std::string& level, const Map& x) {
    if (!levels_.count(level)) levels_[level] = blocks_of(level);
    const Map y = backend_.map(x.channels, x.height, x.width);
    backend_.blocks(x, levels_[level], y);
    return y;
  }

  Map unshuffle(const Map& x) {
    const Map y = backend_.map(4 * x.channels, x.height / 2, x.width / 2);
    backend_.unshuffle(x, y);
    return y;
  }

  Map shuffle(const Map& x) {
    const Map y = backend_.map(x.channels / 4, 2 * x.height, 2 * x.width);
    backend_.shuffle(x, y);
    return y;
  }

  Map concatenate(const Map& a, const Map& b) {
    const Map y = backend_.map(a.channels + b.channels, a.height, a.width);
    backend_.concatenate(a, b, y);
    return y;
  }

  // A weight on the backend.
  Tensor weight(const std::string& name) const { return backend_.keep(weights_[name]); }

  // The same in the shape that the library takes: trailing dimensions merged until `ndim` are left.
  Tensor weight(const std::string& name, int ndim) const {
    Tensor t = weight(name);
    while (t.ndim > ndim) {
      t.size[t.ndim - 2] *= t.size[t.ndim - 1];
      t.stride[t.ndim - 2] = 1;
      --t.ndim;
    }
    return t;
  }

  std::vector<BlockWeights> blocks_of(const std::string& level) const {
    std::vector<BlockWeights> all;
    for (std::string name; weights_.has((name = level + "." + std::to_string(all.size())) + ".norm1.body.weight");) {
      all.push_back(block(name + "."));
    }
    return all;
  }

  BlockWeights block(const std::string& name) const {
    const std::string attn = name + "attn.", gated = attn + "gatedcnn.", ffn = name + "ffn.";
    BlockWeights b;
    MixerWeights& m = b.mixer;
    m.norm_weight = weight(name + "norm1.body.weight"), m.norm_bias = weight(name + "norm1.body.bias");
    m.qkv = weight(attn + "qkv.weight", 2), m.qkv_dwconv = weight(attn + "qkv_dwconv.weight", 2);
    m.temperature = weight(attn + "temperature", 1);
    m.bn_weight = weight(gated + "norm.weight"), m.bn_bias = weight(gated + "norm.bias");
    m.bn_mean = weight(gated + "norm.running_mean"), m.bn_var = weight(gated + "norm.running_var");
    m.gic1 = weight(gated + "gic1.weight", 2);
    m.generator_in = weight(gated + "kernel_generator.1.weight", 2);
    m.generator_out = weight(gated + "kernel_generator.3.weight", 2);
    m.gate_temperature = weight(gated + "temperature");
    m.gic2 = weight(gated + "gic2.weight", 2), m.proj_out = weight(gated + "proj_out.weight", 2);
    m.mlp_in = weight(attn + "mlp.0.weight", 2), m.mlp_out = weight(attn + "mlp.2.weight", 2);
    m.alpha_att = weight(attn + "alpha_att"), m.alpha_conv = weight(attn + "alpha_gated");
    m.alpha_mlp = weight(attn + "alpha_mlp");
    m.project_out = weight(attn + "project_out.weight", 2);
    FeedForwardWeights& f = b.feed_forward;
    f.norm_weight = weight(name + "norm2.body.weight"), f.norm_bias = weight(name + "norm2.body.bias");
    f.project_in = weight(ffn + "project_in.weight", 2), f.dwconv = weight(ffn + "dwconv.weight", 2);
    f.project_out = weight(ffn + "project_out.weight", 2);
    b.norm1_eps = b.bn_eps = b.norm2_eps = 1e-5;
    return b;
  }

  const SafeTensors& weights_;
  Backend& backend_;
  std::map<std::string, Tensor> convolutions_;               // by name, on the backend
  std::map<std::string, std::vector<BlockWeights>> levels_;  // by name
};

}  // namespace mirage::example
