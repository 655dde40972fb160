// Windows and cuts from lists of numbers.
#pragma once

#include <string>
#include <vector>

#include "bind.h"
#include "mirage/region.h"

namespace mirage::python {

using Numbers = std::vector<int64_t>;

inline Window window_of(const Numbers& numbers) {
  if (numbers.size() != 4) fail("window", "height, width, row and column", std::to_string(numbers.size()) + " numbers");
  return {numbers[0], numbers[1], numbers[2], numbers[3]};
}

// The numbers have to stay where they are.
inline Cuts cuts_of(const char* argument, const Numbers& positions) {
  if (positions.size() < 2) fail(argument, "at least two positions", std::to_string(positions.size()));
  return {positions.data(), int64_t(positions.size()) - 1};
}

}  // namespace mirage::python
