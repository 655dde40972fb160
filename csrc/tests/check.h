// The whole test framework: CHECK(condition, format, ...) prints and counts failures; main returns finish().
#pragma once

#include <cstdint>
#include <cstdio>

#include "common/cpu/isa.h"

namespace mirage::test {

inline int failures = 0;

constexpr int kSkip = 77;  // tells ctest that the machine lacks what the test needs

inline int finish() {
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures ? 1 : 0;
}

// The next number of a sequence in [-1, 1) that is the same in every run.
inline double value() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return double(state >> 8) / (1 << 23) - 1;
}

}  // namespace mirage::test

#define CHECK(condition, ...)                                          \
  do {                                                                 \
    if (!(condition)) {                                                \
      ++::mirage::test::failures;                                      \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);      \
      std::printf(__VA_ARGS__);                                        \
      std::printf("\n");                                               \
    }                                                                  \
  } while (0)

// First line of main in a test that is compiled once per instruction set.
#define SKIP_WITHOUT_ISA()                                                                      \
  do {                                                                                          \
    if (::mirage::cpu::Isa::MIRAGE_ISA > ::mirage::cpu::active_isa()) {                         \
      std::printf("this machine lacks %s\n", isa_name(::mirage::cpu::Isa::MIRAGE_ISA));         \
      return ::mirage::test::kSkip;                                                             \
    }                                                                                           \
  } while (0)
