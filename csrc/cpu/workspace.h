// Memory that outlives a call: scratch, and large results. A step takes and frees the same large buffers over and over,
// and an allocator that gives them back to the system in between pays a page fault for every 4 KiB of them, every time.
#pragma once

#include <cstddef>

namespace mirage::cpu {

// What is kept between calls, for the whole process, unless limit_workspace says otherwise. What is in use is not
// limited by it.
constexpr size_t kWorkspaceLimit = size_t(64) << 20;
// Smaller buffers are the allocator's.
constexpr size_t kWorkspaceSmallest = size_t(64) << 10;

struct Workspace {
  void* data;
  size_t bytes;
};

// At least `bytes`, aligned to 64, and at most `times` as much where it was kept; what it holds is whatever its last
// user left there. Where nothing kept fits, the oldest is freed until the new buffer and what stays are within the
// limit. Throws std::bad_alloc.
Workspace take_workspace(size_t bytes, double times = 4);

// Back from take_workspace. The oldest kept buffers are freed where more than the limit would be held. Neither
// function waits: where another thread is inside, the allocator serves.
void put_workspace(Workspace workspace) noexcept;

// Frees what is kept. The number of bytes.
size_t free_workspaces();

// Sets the limit and frees what is over it. The limit before.
size_t limit_workspace(size_t bytes);

}  // namespace mirage::cpu
