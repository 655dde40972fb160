#include "workspace.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>

#include "address_space.h"
#include "arena.h"

namespace mirage::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kMostKept = size_t(2) << 30;
constexpr size_t kAddresses = size_t(64) << 30;  // where the size of the memory is unknown

// How many addresses the arena reserves. Without an address limit they cost nothing. Under one, what the arena reserves
// is lost to the rest of the program, so it takes a small part or nothing, and buffers come from the system one by one.
size_t addresses() noexcept {
  const size_t wanted = physical_memory() ? physical_memory() : kAddresses, room = address_room();
  return room == SIZE_MAX ? wanted : std::min(wanted, room / 8);
}

void free_now(Workspace w) noexcept { ::operator delete(w.data, kAlignment); }

// Buffers that were put back while another thread held the lock: a linked list whose nodes lie in the buffers
// themselves.
struct Waiting {
  Waiting* next;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  Arena arena{addresses(), default_workspace_limit()};
  std::atomic<Waiting*> waiting{nullptr};

  // The caller holds the mutex.
  void take_back() {
    for (Waiting* w = waiting.exchange(nullptr, std::memory_order_acquire); w != nullptr;) {
      Waiting* const next = w->next;
      arena.put(w, w->bytes);
      w = next;
    }
  }
  void wait(Workspace room) noexcept {
    auto* const w = ::new (room.data) Waiting{waiting.load(std::memory_order_relaxed), room.bytes};
    while (!waiting.compare_exchange_weak(w->next, w, std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
};

Pool& pool() {
  static Pool& all = *new Pool;  // never destroyed: threads may still run when the process ends
  return all;
}

}  // namespace

Workspace take_workspace(size_t bytes) {
  if (bytes >= kWorkspaceSmallest) {
    bytes = (bytes + Arena::kStep - 1) / Arena::kStep * Arena::kStep;
    Pool& p = pool();
    const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
    if (lock) {
      p.take_back();
      if (void* const data = p.arena.take(bytes)) return {data, bytes};
    }
  }
  return {::operator new(bytes, kAlignment), bytes};
}

void put_workspace(Workspace w) noexcept {
  Pool& p = pool();
  if (!p.arena.owns(w.data)) return free_now(w);
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock) return p.wait(w);
  p.take_back();
  p.arena.put(w.data, w.bytes);
}

size_t free_workspaces() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.take_back();
  return p.arena.trim(0);
}

size_t limit_workspace(size_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.take_back();
  const size_t before = p.arena.limit;
  p.arena.limit = bytes;
  p.arena.trim(bytes);
  return before;
}

size_t default_workspace_limit() noexcept {
  const size_t eighth = physical_memory() / 8;
  return eighth > 0 ? std::min(eighth, kMostKept) : kMostKept / 8;
}

}  // namespace mirage::cpu
