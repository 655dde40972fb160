#include "address_space.h"

#include <cstdint>
#include <cstdio>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#define MIRAGE_HAS_MMAP 1
#endif

namespace mirage::cpu {

#if defined(MIRAGE_HAS_MMAP)

size_t physical_memory() noexcept {
  const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
  return pages > 0 && bytes > 0 ? size_t(pages) * size_t(bytes) : 0;
}

size_t address_room() noexcept {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return SIZE_MAX;
  unsigned long pages = 0;  // in use; 0 if the system does not say
  if (std::FILE* const file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%lu", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  const size_t used = size_t(pages) * size_t(sysconf(_SC_PAGESIZE));
  return used < limit.rlim_cur ? size_t(limit.rlim_cur) - used : 0;
}

void* reserve_addresses(size_t bytes) noexcept {
  void* const all = mmap(nullptr, bytes + kUnit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(all), aligned = (begin + kUnit - 1) / kUnit * kUnit;
  if (aligned > begin) munmap(all, aligned - begin);
  munmap(reinterpret_cast<void*>(aligned + bytes), begin + kUnit - aligned);
  return reinterpret_cast<void*>(aligned);
}

bool commit_memory(void* data, size_t bytes) noexcept {
  if (mprotect(data, bytes, PROT_READ | PROT_WRITE) != 0) return false;
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);  // advice: failing changes nothing
#endif
  return true;
}

void discard_pages(void* data, size_t bytes) noexcept {
#if defined(__linux__)
  madvise(data, bytes, MADV_DONTNEED);
#else  // elsewhere that advice may keep the pages
  mmap(data, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#endif
}

#else

size_t physical_memory() noexcept { return 0; }
size_t address_room() noexcept { return SIZE_MAX; }
void* reserve_addresses(size_t) noexcept { return nullptr; }
bool commit_memory(void*, size_t) noexcept { return false; }
void discard_pages(void*, size_t) noexcept {}

#endif

}  // namespace mirage::cpu
