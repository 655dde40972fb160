// The kinds of norm over the channels of a pixel.
#pragma once

#include <string>

#include "mirage/tensor.h"

namespace mirage {

// With the mean m and the biased variance v of the channels, and s = sqrt(v + eps), a weight w and a bias b or none:
//   centred    (x - m) / s * w + b, LayerNorm
//   uncentred  x / s * w + b, Restormer's norm without bias
enum class NormKind : int { centred, uncentred };

inline NormKind norm_kind_of(const std::string& name) {
  if (name == "centred") return NormKind::centred;
  if (name != "uncentred") fail("norm", "'centred' or 'uncentred'", "'" + name + "'");
  return NormKind::uncentred;
}

}  // namespace mirage
