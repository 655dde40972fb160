#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mirage::cpu {

void expect_writes(const Tensor& result) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(2) << 20, smallest = uintptr_t(4) << 20;
  const uintptr_t bytes = uintptr_t(result.numel() * bytes_of(result.dtype));
  if (bytes < smallest) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(result.data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(result.data) + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing changes nothing
#else
  (void)result;
#endif
}

}  // namespace mirage::cpu
