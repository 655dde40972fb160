// What follows from a list of weights (mirage/stage_weights.h): checks, and gradients where there are no pixels.
#pragma once

#include <cstring>
#include <vector>

#include "mirage/stage_weights.h"

// For expansion where `w` are the weights and the list's sizes are variables: every weight is contiguous, of its shape.
#define MIRAGE_CHECK_WEIGHT(name, form, ...) check_dense(#name, w.name, {__VA_ARGS__});
#define MIRAGE_CHECK_OPTIONAL(name, form, ...) \
  if (exists(w.name)) check_dense(#name, w.name, {__VA_ARGS__});

// For expansion in a list of GradientOf, where `weights` and `gradients` are the structs.
#define MIRAGE_GRADIENT_OF(name, ...) {"grad_" #name, gradients.name, weights.name},

namespace mirage {

// A gradient of a weight, and the weight.
struct GradientOf {
  const char* name;
  const Tensor &gradient, &weight;
};

// Those of weights that are there.
inline std::vector<GradientOf> of_given(const std::vector<GradientOf>& all) {
  std::vector<GradientOf> given;
  for (const GradientOf& g : all) {
    if (exists(g.weight)) given.push_back(g);
  }
  return given;
}

// Gradients are contiguous vectors and matrices of type `dtype`, of the shapes of the weights.
inline void check_gradients(DType dtype, const std::vector<GradientOf>& all) {
  for (const auto& [name, gradient, weight] : all) {
    if (weight.ndim == 1) check_dense(name, gradient, dtype, {weight.size[0]});
    else check_dense(name, gradient, dtype, {weight.size[0], weight.size[1]});
  }
}

// Those of a call without pixels.
inline void clear_gradients(const std::vector<GradientOf>& all) {
  for (const GradientOf& g : all) {
    std::memset(g.gradient.data, 0, size_t(g.gradient.numel() * bytes_of(g.gradient.dtype)));
  }
}

}  // namespace mirage
