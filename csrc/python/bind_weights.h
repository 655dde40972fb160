// Structs of tensors from lists of capsules.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "bind.h"
#include "mirage/channel_attention_stage.h"
#include "mirage/feed_forward_stage.h"
#include "mirage/mixer_stage.h"

namespace mirage::python {

// None of an optional weight that is absent.
using Capsules = std::vector<std::optional<py::capsule>>;

// The capsules of PyTorch's tensors, made here: between kernels that fill the caches the loop would cost three times as much
// in Python. A tensor of other strides is copied first, as `Tensor.contiguous` does.
inline Capsules capsules_of(const py::function& to_dlpack, const py::sequence& tensors, int device = kDeviceCpu) {
  Capsules capsules;
  capsules.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    if (tensor.is_none()) {
      capsules.emplace_back();
      continue;
    }
    py::capsule capsule = to_dlpack(tensor);
    if (!from_dlpack("weight", capsule, device).is_contiguous()) capsule = to_dlpack(tensor.attr("contiguous")());
    capsules.push_back(std::move(capsule));
  }
  return capsules;
}

template <size_t N>
using Names = const char* const (&)[N];

// A struct of tensors from capsules in the order of its members, of which all but the first `least` may be left out; None or
// nothing leaves a tensor that does not exist.
template <class Struct, size_t N>
Struct from_capsules(const char* argument, Names<N> names, const Capsules& capsules, int device = kDeviceCpu,
                     size_t least = N) {
  static_assert(sizeof(Struct) == N * sizeof(Tensor), "one name per member");
  if (capsules.size() < least || capsules.size() > N) {
    const std::string count = least < N ? std::to_string(least) + " to " : "";
    fail(argument, count + std::to_string(N) + " tensors", std::to_string(capsules.size()));
  }
  Struct result;
  Tensor* const members = reinterpret_cast<Tensor*>(&result);
  for (size_t i = 0; i < capsules.size(); ++i) {
    if (!capsules[i]) continue;
    members[i] = from_dlpack(names[i], *capsules[i], device);
    if (!exists(members[i])) fail(names[i], "a tensor of at least one dimension", "one of none");
  }
  return result;
}

// Lets Python compare the names and their order with its own: `module.stage_weights[list]`, a tuple.
template <size_t N>
void publish(py::module_& m, const char* list, Names<N> names, size_t prefix = 0) {
  if (!py::hasattr(m, "stage_weights")) m.attr("stage_weights") = py::dict();
  py::tuple all(N);
  for (size_t i = 0; i < N; ++i) all[i] = py::str(names[i] + prefix);
  m.attr("stage_weights")[list] = all;
}

// How many there are from the first to the last that is not optional.
template <size_t N>
constexpr size_t least_of(const bool (&is_required)[N]) {
  size_t least = N;
  while (least > 0 && !is_required[least - 1]) --least;
  return least;
}

inline const Tensor& required(const char* name, const Tensor& t) {
  if (!exists(t)) fail(name, "a tensor", "None");
  return t;
}

// ---- how PyTorch shapes a weight: the second argument in lists of weights -------------------------------------------

inline Tensor as_it_is(const char*, const Tensor& t) { return t; }

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

// The weight of a 1x1 convolution over one dimension, [out, in, 1].
inline Tensor pointwise_1d(const char* name, const Tensor& t) { return pointwise(name, t, 3); }

// One number for each head, [heads, 1, 1].
inline Tensor per_head(const char* name, const Tensor& t) {
  check_ndim(name, t, 3);
  return flattened(t, 1);
}

// ---- weights and gradients of a stage from lists of capsules --------------------------------------------------------

#define MIRAGE_WEIGHT_NAME(name, ...) #name,
#define MIRAGE_GRADIENT_NAME(name, ...) "grad_" #name,
#define MIRAGE_IS_REQUIRED(name, ...) true,
#define MIRAGE_IS_OPTIONAL(name, ...) false,
#define MIRAGE_WEIGHT_TO_MATRIX(name, form, ...) w.name = form(#name, required(#name, w.name));
#define MIRAGE_OPTIONAL_TO_MATRIX(name, form, ...) \
  if (exists(w.name)) w.name = form(#name, w.name);

// Names, and functions from capsules to structs as the library takes them: matrices and vectors.
#define MIRAGE_BIND_WEIGHTS(LIST, Weights, Gradients)                                                                  \
  inline constexpr const char* k##Weights[] = {LIST(MIRAGE_WEIGHT_NAME, MIRAGE_WEIGHT_NAME, MIRAGE_WEIGHT_NAME)};      \
  inline constexpr const char* k##Gradients[] = {LIST(MIRAGE_GRADIENT_NAME, MIRAGE_GRADIENT_NAME, MIRAGE_NO_WEIGHT)};  \
  inline constexpr bool k##Weights##Required[] = {LIST(MIRAGE_IS_REQUIRED, MIRAGE_IS_OPTIONAL, MIRAGE_IS_REQUIRED)};  \
  inline constexpr bool k##Gradients##Required[] = {LIST(MIRAGE_IS_REQUIRED, MIRAGE_IS_OPTIONAL, MIRAGE_NO_WEIGHT)};   \
  inline Weights to_##Weights(const Capsules& capsules, int device = kDeviceCpu) {                                     \
    auto w = from_capsules<Weights>("weights", k##Weights, capsules, device, least_of(k##Weights##Required));          \
    LIST(MIRAGE_WEIGHT_TO_MATRIX, MIRAGE_OPTIONAL_TO_MATRIX, MIRAGE_WEIGHT_TO_MATRIX)                                  \
    return w;                                                                                                          \
  }                                                                                                                    \
  inline Gradients to_##Gradients(const Capsules& capsules, int device = kDeviceCpu) {                                 \
    constexpr size_t least = least_of(k##Gradients##Required);                                                         \
    auto w = from_capsules<Gradients>("gradients", k##Gradients, capsules, device, least);                             \
    LIST(MIRAGE_WEIGHT_TO_MATRIX, MIRAGE_OPTIONAL_TO_MATRIX, MIRAGE_NO_WEIGHT)                                         \
    return w;                                                                                                          \
  }                                                                                                                    \
  inline void publish_##Weights(py::module_& m, const std::string& stage) {                                            \
    publish(m, stage.c_str(), k##Weights);                                                                             \
    publish(m, (stage + "_gradients").c_str(), k##Gradients, sizeof("grad_") - 1);                                     \
  }

MIRAGE_BIND_WEIGHTS(MIRAGE_MIXER_WEIGHTS, MixerWeights, MixerGradients)
MIRAGE_BIND_WEIGHTS(MIRAGE_FEED_FORWARD_WEIGHTS, FeedForwardWeights, FeedForwardGradients)
MIRAGE_BIND_WEIGHTS(MIRAGE_CHANNEL_ATTENTION_WEIGHTS, ChannelAttentionWeights, ChannelAttentionGradients)

inline constexpr const char* kMixerStatistics[] = {"attention", "kernels", "branch_mean", "batch_mean", "batch_var"};

}  // namespace mirage::python
