// Memory that outlives a call: scratch, and results. A step takes and frees the same large buffers over and over, and
// an allocator that gives them back to the system in between pays a page fault for every 4 KiB of them, every time.
//
// It is one range of addresses, as large as the memory of the machine. A buffer lies at the lowest place where it fits;
// what is given back joins what is free on either side of it. So buffers of one size take turns with buffers of others,
// and the pages of all of them together are hardly more than were ever in use at once.
#pragma once

#include <cstddef>

namespace mirage::cpu {

// Smaller buffers come from the C++ allocator.
constexpr size_t kWorkspaceSmallest = size_t(64) << 10;

struct Workspace {
  void* data;
  size_t bytes;
};

// Takes a buffer of at least `bytes`, aligned to 64, whose content is whatever its last user left there. If it needs
// new pages, free ones are returned to the system until both together are within the limit, and until all pages exceed
// the most that was in use at once by 64 MiB at most. Throws std::bad_alloc.
Workspace take_workspace(size_t bytes);

// Gives a buffer back, on any thread. Pages go to the system if more than the limit would be free. Neither function
// waits for another thread: if one holds the lock, buffers come from the allocator, and what is put back is queued.
void put_workspace(Workspace workspace) noexcept;

// Returns every free page to the system. Returns how many bytes that was.
size_t free_workspaces();

// Sets how many bytes of free pages are kept, for the whole process, and returns what exceeds it to the system. Memory
// in use is not limited, nor is the free rest of a page that is partly in use. Returns the previous limit.
size_t limit_workspace(size_t bytes);

// The limit unless limit_workspace says otherwise: 2 GiB, or an eighth of the memory of the machine if that is less.
size_t default_workspace_limit() noexcept;

}  // namespace mirage::cpu
