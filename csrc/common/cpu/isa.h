// Run-time choice of instruction set.
//
// Every kernel file (*_kernels.cpp) is compiled once per instruction set, with MIRAGE_ISA naming the namespace its code
// goes to. The file beside it is compiled once, for the baseline: it checks arguments and calls the kernels through
// MIRAGE_DISPATCH_ISA. Kernel files may not use templates of the standard library: the linker keeps one copy of each, and
// it could keep the one with instructions that this machine lacks.
//
// avx512_bf16 multiplies bfloat16 and rounds to it: kernels that gain by that (cmake/isa.cmake names them) are compiled for
// it on bfloat16 tensors alone and go through MIRAGE_DISPATCH_ISA_OF; all else runs there as on avx512. amx_bf16 is the
// same for products in tiles, of the fewer kernels that call them through MIRAGE_DISPATCH_PRODUCTS_OF.
#pragma once

namespace mirage::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };

// The best set that this machine and this build have; MIRAGE_CPU_ISA=baseline|avx2|avx512|avx512_bf16|amx_bf16
// lowers it.
// Intel's processors multiply bfloat16 in vectors at half the rate of float32: without tiles avx512 is the best there.
Isa active_isa();
const char* isa_name(Isa isa);

// Why bfloat16 is not multiplied in tiles; empty where it is.
const char* why_no_tiles();

}  // namespace mirage::cpu

#if defined(MIRAGE_HAVE_X86_ISAS)
#define MIRAGE_DECLARE_KERNEL(signature)         \
  namespace mirage::cpu::baseline { signature; } \
  namespace mirage::cpu::avx2 { signature; }     \
  namespace mirage::cpu::avx512 { signature; }   \
  namespace mirage::cpu::avx512_bf16 { signature; } \
  namespace mirage::cpu::amx_bf16 { signature; }
#define MIRAGE_DISPATCH_ISA(call)                                     \
  do {                                                                \
    switch (::mirage::cpu::active_isa()) {                            \
      case ::mirage::cpu::Isa::amx_bf16:                              \
      case ::mirage::cpu::Isa::avx512_bf16:                           \
      case ::mirage::cpu::Isa::avx512: return avx512::call;           \
      case ::mirage::cpu::Isa::avx2: return avx2::call;               \
      default: return baseline::call;                                 \
    }                                                                 \
  } while (0)
#define MIRAGE_DISPATCH_ISA_OF(dtype, call)                                                                   \
  do {                                                                                                        \
    if ((dtype) == ::mirage::DType::bf16 && ::mirage::cpu::active_isa() >= ::mirage::cpu::Isa::avx512_bf16) { \
      return avx512_bf16::call;                                                                               \
    }                                                                                                         \
    MIRAGE_DISPATCH_ISA(call);                                                                                \
  } while (0)
#if defined(MIRAGE_HAVE_AMX)
#define MIRAGE_DISPATCH_PRODUCTS_OF(dtype, call)                                                           \
  do {                                                                                                     \
    if ((dtype) == ::mirage::DType::bf16 && ::mirage::cpu::active_isa() == ::mirage::cpu::Isa::amx_bf16) { \
      return amx_bf16::call;                                                                               \
    }                                                                                                      \
    MIRAGE_DISPATCH_ISA_OF(dtype, call);                                                                   \
  } while (0)
#else
#define MIRAGE_DISPATCH_PRODUCTS_OF MIRAGE_DISPATCH_ISA_OF
#endif
#else
#define MIRAGE_DISPATCH_PRODUCTS_OF MIRAGE_DISPATCH_ISA_OF
#define MIRAGE_DECLARE_KERNEL(signature) namespace mirage::cpu::baseline { signature; }
#define MIRAGE_DISPATCH_ISA(call) return baseline::call
#define MIRAGE_DISPATCH_ISA_OF(dtype, call) return baseline::call
#endif
