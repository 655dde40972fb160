// What the operating system knows of memory: addresses without memory, and pages for them.
#pragma once

#include <cstddef>

namespace mirage::cpu {

// Pages are taken and given back in units of this size, that of a huge page on most machines.
constexpr size_t kUnit = size_t(2) << 20;

// The physical memory of the machine; 0 where that is unknown.
size_t physical_memory() noexcept;

// The bytes of addresses that the process may still take under its limit (ulimit -v); the largest number without one.
size_t address_room() noexcept;

// Reserves an address range of `bytes` bytes, aligned to kUnit, which nothing may touch yet. Returns null if the system
// refuses. Here and below, `bytes` is a multiple of kUnit.
void* reserve_addresses(size_t bytes) noexcept;

// Makes memory writable, in huge pages where the system has them: one page fault per 2 MiB instead of one per 4 KiB.
// Pages are allocated when they are first touched. Returns false if the system refuses.
bool commit_memory(void* data, size_t bytes) noexcept;

// Returns the pages to the system. The memory stays writable: the next write allocates new pages.
void discard_pages(void* data, size_t bytes) noexcept;

}  // namespace mirage::cpu
