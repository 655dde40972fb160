#include "isa.h"

#include "isa_choice.h"

#include <cstdlib>
#include <cstring>

#if defined(MIRAGE_HAVE_AMX)
#include <cpuid.h>
#endif
#if defined(MIRAGE_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mirage::cpu {
namespace {

#if defined(MIRAGE_HAVE_X86_ISAS)

// Asks for the tiles of AMX: Linux gives a process room for their state once it has asked for it. Returns why there are
// none, or an empty string.
const char* ask_for_tiles() {
#if !defined(MIRAGE_HAVE_AMX)
  return "the compiler that built the library does not know AMX";
#elif !defined(__linux__) || !defined(SYS_arch_prctl)
  return "only Linux is asked for the tiles of AMX";
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) {
    return "the processor has no AMX";
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the kernel refuses the tiles of AMX";
  return "";
#endif
}

const char* no_tiles() {
  static const char* const reason = ask_for_tiles();
  return reason;
}

#endif

// The highest set that the machine has, tiles apart.
Isa best_of_vectors() {
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

// Set by prefer_isa() before the choice is made.
const Isa* preferred = nullptr;

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16};

// The set of this name; null where there is none.
const Isa* isa_named(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(name, isa_name(isa)) == 0) return &isa;
  }
  return nullptr;
}

Isa choose_isa() {
  if (const char* wish = std::getenv("MIRAGE_CPU_ISA"); wish != nullptr && *wish) {
    return *isa_problem(wish) ? built_in_isa() : *isa_named(wish);
  }
  return preferred != nullptr ? *preferred : built_in_isa();
}

}  // namespace

Isa built_in_isa() {
  const Isa best = best_of_vectors();
#if defined(MIRAGE_HAVE_X86_ISAS)
  if (best == Isa::avx512_bf16) {
    if (!*no_tiles()) return Isa::amx_bf16;
    if (__builtin_cpu_is("intel")) return Isa::avx512;
  }
#endif
  return best;
}

const char* isa_problem(const char* name) {
  const Isa* const isa = isa_named(name);
  if (isa == nullptr) return "there is no such instruction set";
#if defined(MIRAGE_HAVE_X86_ISAS)
  if (*isa == Isa::amx_bf16) return best_of_vectors() == Isa::avx512_bf16 ? no_tiles() : "the processor has no AMX";
#else
  if (*isa != Isa::baseline) return "the library was built without it";
#endif
  return *isa <= best_of_vectors() ? "" : "the processor does not have it";
}

void prefer_isa(const char* name) {
  if (!*isa_problem(name)) preferred = isa_named(name);
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx_bf16: return "amx_bf16";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

const char* why_no_tiles() {
#if defined(MIRAGE_HAVE_X86_ISAS)
  if (active_isa() == Isa::amx_bf16) return "";
  if (best_of_vectors() != Isa::avx512_bf16) return "the processor has no AMX";
  const char* const reason = no_tiles();
  return *reason ? reason : "another instruction set was chosen";
#else
  return "only x86-64 has AMX";
#endif
}

}  // namespace mirage::cpu
