// What a stage's weights are is listed once, in a macro that is expanded wherever all of them are needed:
//
//   #define MIRAGE_EXAMPLE_WEIGHTS(WEIGHT, OPTIONAL, BUFFER)
//     WEIGHT(norm_weight, as_it_is, C)
//     OPTIONAL(norm_bias, as_it_is, C)
//     WEIGHT(expand, pointwise, 2 * h, C)
//     BUFFER(running_mean, as_it_is, C)
//
// A WEIGHT has a gradient, a BUFFER has none. An OPTIONAL weight may be absent, which is a Tensor of no dimensions: then its
// gradient is one too. The second argument says how PyTorch shapes it (python/bind_weights.h), the
// others are its sizes here. Structs, argument checks, gradients' names and bindings follow; so do the order of lists that
// come from Python, which has the same description in mirage_kernels/<stage>/weights.py (a test compares the names).
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// False of an absent weight.
inline bool exists(const Tensor& t) { return t.ndim > 0; }

}  // namespace mirage

#define MIRAGE_WEIGHT_MEMBER(name, ...) Tensor name;
#define MIRAGE_NO_WEIGHT(name, ...)

// The struct of all tensors in the list, and the struct of the gradients.
#define MIRAGE_DEFINE_WEIGHTS(LIST, Weights, Gradients)                  \
  struct Weights {                                                       \
    LIST(MIRAGE_WEIGHT_MEMBER, MIRAGE_WEIGHT_MEMBER, MIRAGE_WEIGHT_MEMBER)\
  };                                                                     \
  struct Gradients {                                                     \
    LIST(MIRAGE_WEIGHT_MEMBER, MIRAGE_WEIGHT_MEMBER, MIRAGE_NO_WEIGHT)   \
  }
