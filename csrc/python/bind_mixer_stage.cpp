#include <pybind11/stl.h>

#include <array>

#include "bind.h"
#include "mirage/mixer_stage.h"

namespace mirage::python {
namespace {

using Capsules = std::vector<py::capsule>;

constexpr std::array<const char*, kMixerWeights> kWeights = {
    "norm_weight", "norm_bias", "qkv", "qkv_dwconv", "temperature", "bn_weight", "bn_bias", "bn_mean", "bn_var", "gic1",
    "generator_in", "generator_out", "gate_temperature", "gic2", "proj_out", "mlp_in", "mlp_out", "alpha_att",
    "alpha_conv", "alpha_mlp", "project_out"};
constexpr std::array<const char*, 19> kGradients = {
    "grad_norm_weight", "grad_norm_bias", "grad_qkv", "grad_qkv_dwconv", "grad_temperature", "grad_bn_weight",
    "grad_bn_bias", "grad_gic1", "grad_generator_in", "grad_generator_out", "grad_gate_temperature", "grad_gic2",
    "grad_proj_out", "grad_mlp_in", "grad_mlp_out", "grad_alpha_att", "grad_alpha_conv", "grad_alpha_mlp",
    "grad_project_out"};
constexpr std::array<const char*, 5> kStatistics = {"attention", "kernels", "branch_mean", "batch_mean", "batch_var"};

// A struct of tensors from capsules in the order of its members.
template <class Struct, size_t N>
Struct from_capsules(const char* argument, const std::array<const char*, N>& names, const Capsules& capsules) {
  static_assert(sizeof(Struct) == N * sizeof(Tensor), "one name per member");
  if (capsules.size() != N) fail(argument, std::to_string(N) + " tensors", std::to_string(capsules.size()));
  Struct result;
  Tensor* const members = reinterpret_cast<Tensor*>(&result);
  for (size_t i = 0; i < N; ++i) members[i] = from_dlpack(names[i], capsules[i]);
  return result;
}

// The weights, or their gradients, as the library takes them: matrices, and the temperatures of the heads as a vector.
template <class Struct, size_t N>
Struct weights_from(const char* argument, const std::array<const char*, N>& names, const Capsules& capsules) {
  auto w = from_capsules<Struct>(argument, names, capsules);
  for (Tensor* t : {&w.qkv, &w.qkv_dwconv, &w.gic1, &w.generator_in, &w.generator_out, &w.gic2, &w.proj_out, &w.mlp_in,
                    &w.mlp_out, &w.project_out}) {
    *t = flattened(*t, 2);
  }
  w.temperature = flattened(w.temperature, 1);
  return w;
}

}  // namespace

MIRAGE_BINDINGS(m) {
  m.def("mixer_stage", [](py::capsule x, const Capsules& weights, py::capsule branch_scale, bool training,
                          double norm_eps, double bn_eps, const Capsules& statistics, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), ts = from_dlpack("branch_scale", branch_scale), ty = from_dlpack("y", y);
    const auto w = weights_from<MixerWeights>("weights", kWeights, weights);
    const auto s = from_capsules<MixerStatistics>("statistics", kStatistics, statistics);
    py::gil_scoped_release release;
    mixer_stage(tx, w, ts, {training, norm_eps, bn_eps}, s, ty);
  });
  m.def("mixer_stage_backward", [](py::capsule grad_y, py::capsule x, const Capsules& weights, py::capsule branch_scale,
                                   bool training, double norm_eps, double bn_eps, const Capsules& statistics,
                                   py::capsule grad_x, const Capsules& gradients) {
    const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x),
                 ts = from_dlpack("branch_scale", branch_scale), to = from_dlpack("grad_x", grad_x);
    const auto w = weights_from<MixerWeights>("weights", kWeights, weights);
    const auto s = from_capsules<MixerStatistics>("statistics", kStatistics, statistics);
    const auto g = weights_from<MixerGradients>("gradients", kGradients, gradients);
    py::gil_scoped_release release;
    mixer_stage_backward(tg, tx, w, ts, {training, norm_eps, bn_eps}, s, to, g);
  });
}

}  // namespace mirage::python
