#include "workspace.h"

#include <mutex>
#include <new>
#include <vector>

namespace mirage::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kStep = 4096;
constexpr size_t kMostKept = 256;  // buffers

void free_now(Workspace w) noexcept { ::operator delete(w.data, kAlignment); }

struct Pool {
  std::mutex mutex;
  std::vector<Workspace> kept;  // the oldest first
  size_t bytes = 0, limit = kWorkspaceLimit;

  Pool() { kept.reserve(kMostKept); }
  void erase(size_t i) {
    bytes -= kept[i].bytes;
    kept.erase(kept.begin() + std::ptrdiff_t(i));
  }
  // Frees the oldest until `more` bytes fit, or nothing is left.
  void make_room(size_t more) noexcept {
    while (!kept.empty() && (bytes + more > limit || kept.size() == kMostKept)) {
      free_now(kept.front());
      erase(0);
    }
  }
};

Pool& pool() {
  static Pool& all = *new Pool;  // never destroyed: threads may still run when the process ends
  return all;
}

}  // namespace

Workspace take_workspace(size_t bytes, double times) {
  bytes = (bytes + kStep - 1) / kStep * kStep;
  if (bytes >= kWorkspaceSmallest) {
    Pool& p = pool();
    const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
    if (lock) {
      size_t best = p.kept.size();
      for (size_t i = 0; i < p.kept.size(); ++i) {
        const size_t here = p.kept[i].bytes;
        const bool fits = here >= bytes && double(here) <= times * double(bytes);
        // Of equal ones the newest, which may still be in cache.
        if (fits && (best == p.kept.size() || here <= p.kept[best].bytes)) best = i;
      }
      if (best < p.kept.size()) {
        const Workspace found = p.kept[best];
        p.erase(best);
        return found;
      }
      p.make_room(bytes);
    }
  }
  return {::operator new(bytes, kAlignment), bytes};
}

void put_workspace(Workspace w) noexcept {
  if (w.bytes < kWorkspaceSmallest) return free_now(w);
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock || w.bytes > p.limit) return free_now(w);
  p.make_room(w.bytes);
  p.kept.push_back(w);
  p.bytes += w.bytes;
}

size_t free_workspaces() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const size_t freed = p.bytes;
  while (!p.kept.empty()) {
    free_now(p.kept.back());
    p.erase(p.kept.size() - 1);
  }
  return freed;
}

size_t limit_workspace(size_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const size_t before = p.limit;
  p.limit = bytes;
  p.make_room(0);
  return before;
}

}  // namespace mirage::cpu
