#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace mirage::cpu {
namespace {

Isa best_isa() {
#if defined(MIRAGE_HAVE_X86_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  // Every processor with AVX2 and FMA has the F16C conversions too.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  Isa best = best_isa();
  const char* wish = std::getenv("MIRAGE_CPU_ISA");
  if (!wish) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (std::strcmp(wish, isa_name(isa)) == 0 && isa < best) return isa;
  }
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace mirage::cpu
