// Structs of tensors from lists of capsules.
#pragma once

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "mirage/mixer_stage.h"

namespace mirage::python {

using Capsules = std::vector<py::capsule>;

// The capsules of PyTorch's tensors, made here: between kernels that fill the caches the loop would cost three times as much
// in Python. A tensor of other strides is copied first, as `Tensor.contiguous` does.
inline Capsules capsules_of(const py::function& to_dlpack, const py::sequence& tensors, int device = kDeviceCpu) {
  Capsules capsules;
  capsules.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    py::capsule capsule = to_dlpack(tensor);
    if (!from_dlpack("weight", capsule, device).is_contiguous()) capsule = to_dlpack(tensor.attr("contiguous")());
    capsules.push_back(std::move(capsule));
  }
  return capsules;
}

inline constexpr std::array<const char*, kMixerWeights> kMixerNames = {
    "norm_weight", "norm_bias", "qkv", "qkv_dwconv", "temperature", "bn_weight", "bn_bias", "bn_mean", "bn_var", "gic1",
    "generator_in", "generator_out", "gate_temperature", "gic2", "proj_out", "mlp_in", "mlp_out", "alpha_att",
    "alpha_conv", "alpha_mlp", "project_out"};

inline constexpr std::array<const char*, 5> kMixerStatisticsNames = {"attention", "kernels", "branch_mean", "batch_mean",
                                                                     "batch_var"};

inline constexpr std::array<const char*, 19> kMixerGradientNames = {
    "grad_norm_weight", "grad_norm_bias", "grad_qkv", "grad_qkv_dwconv", "grad_temperature", "grad_bn_weight",
    "grad_bn_bias", "grad_gic1", "grad_generator_in", "grad_generator_out", "grad_gate_temperature", "grad_gic2",
    "grad_proj_out", "grad_mlp_in", "grad_mlp_out", "grad_alpha_att", "grad_alpha_conv", "grad_alpha_mlp",
    "grad_project_out"};

// A struct of tensors from capsules in the order of its members.
template <class Struct, size_t N>
Struct from_capsules(const char* argument, const std::array<const char*, N>& names, const Capsules& capsules,
                     int device = kDeviceCpu) {
  static_assert(sizeof(Struct) == N * sizeof(Tensor), "one name per member");
  if (capsules.size() != N) fail(argument, std::to_string(N) + " tensors", std::to_string(capsules.size()));
  Struct result;
  Tensor* const members = reinterpret_cast<Tensor*>(&result);
  for (size_t i = 0; i < N; ++i) members[i] = from_dlpack(names[i], capsules[i], device);
  return result;
}

// The weight of a 1x1 convolution [out, in, 1, 1] or [out, in, 1] as a matrix.
inline Tensor pointwise(const char* name, const Tensor& t, int ndim = 4) {
  bool fits = t.ndim == ndim;
  for (int d = 2; fits && d < ndim; ++d) fits = t.size[d] == 1;
  if (!fits) fail(name, std::to_string(ndim) + " dimensions, from the third on of size 1", shape_of(t));
  return flattened(t, 2);
}

// The weight of a depthwise 3x3 convolution [n, 1, 3, 3] as a matrix.
inline Tensor depthwise3x3(const char* name, const Tensor& t) {
  check_ndim(name, t, 4);
  check_shape(name, t, {t.size[0], 1, 3, 3});
  return flattened(t, 2);
}

// The weights, or their gradients, as the library takes them: matrices, and the temperatures of the heads as a vector.
template <class Struct, size_t N>
Struct mixer_weights_from(const char* argument, const std::array<const char*, N>& names, const Capsules& capsules,
                          int device = kDeviceCpu) {
  auto w = from_capsules<Struct>(argument, names, capsules, device);
  for (auto [name, t] : {std::pair{"qkv", &w.qkv}, {"gic1", &w.gic1}, {"generator_in", &w.generator_in},
                         {"generator_out", &w.generator_out}, {"gic2", &w.gic2}, {"proj_out", &w.proj_out},
                         {"project_out", &w.project_out}}) {
    *t = pointwise(name, *t);
  }
  w.mlp_in = pointwise("mlp_in", w.mlp_in, 3);
  w.mlp_out = pointwise("mlp_out", w.mlp_out, 3);
  w.qkv_dwconv = depthwise3x3("qkv_dwconv", w.qkv_dwconv);
  check_ndim("temperature", w.temperature, 3);
  w.temperature = flattened(w.temperature, 1);
  return w;
}

}  // namespace mirage::python
