// Memory that outlives a call: scratch, and results. A step takes and frees the same large buffers over and over, and an
// allocator that gives them back to the system in between pays a page fault for every 4 KiB of them, every time.
//
// It is one range of addresses, as large as the memory of the machine. A buffer lies at the lowest place where it fits;
// what is given back joins what is free on either side of it. So buffers of one size take turns with buffers of others, and
// the pages of all of them together are hardly more than were ever in use at once.
#pragma once

#include <cstddef>

namespace mirage::cpu {

// Smaller buffers are the allocator's.
constexpr size_t kWorkspaceSmallest = size_t(64) << 10;

struct Workspace {
  void* data;
  size_t bytes;
};

// At least `bytes`, aligned to 64; what it holds is whatever its last user left there. Where it needs new pages, free
// ones are given back to the system until those and what stays free are within the limit. Throws std::bad_alloc.
Workspace take_workspace(size_t bytes);

// Back from take_workspace, on any thread. Pages are given back to the system where more than the limit would be free.
// Neither function waits: where another thread is inside, the allocator serves, and what is put back waits its turn.
void put_workspace(Workspace workspace) noexcept;

// Gives every page that is free back to the system. How many bytes that was.
size_t free_workspaces();

// Sets how many bytes of free pages are kept, for the whole process, and gives back what is over it. What is in use is
// not limited by it; of a page that is in use in part, the rest stays too. The limit before.
size_t limit_workspace(size_t bytes);

// The limit unless limit_workspace says otherwise: 2 GiB, or an eighth of the memory of the machine if that is less.
size_t default_workspace_limit() noexcept;

}  // namespace mirage::cpu
