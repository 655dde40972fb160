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

// Addresses of `bytes` bytes, aligned to kUnit, which nothing may touch yet; null where the system gives none. `bytes`,
// and everything below, in whole units.
void* reserve_addresses(size_t bytes) noexcept;

// Lets memory be written, in huge pages where the system has them: a fault for every 2 MiB instead of every 4 KiB. Pages
// come when they are touched. False where the system refuses.
bool commit_memory(void* data, size_t bytes) noexcept;

// Gives the pages back; the memory may be written again, and then starts with new ones.
void discard_pages(void* data, size_t bytes) noexcept;

}  // namespace mirage::cpu
