#include "workspace.h"

#include <mutex>
#include <new>
#include <vector>

namespace mirage::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kStep = 4096;
constexpr size_t kMostKept = 64;  // buffers

struct Pool {
  std::mutex mutex;
  std::vector<Workspace> kept;  // the oldest first
  size_t bytes = 0;

  Pool() { kept.reserve(kMostKept); }
  void erase(size_t i) {
    bytes -= kept[i].bytes;
    kept.erase(kept.begin() + std::ptrdiff_t(i));
  }
};

Pool& pool() {
  static Pool& all = *new Pool;  // never destroyed: threads may still run when the process ends
  return all;
}

void free_now(Workspace w) noexcept { ::operator delete(w.data, kAlignment); }

}  // namespace

Workspace take_workspace(size_t bytes) {
  bytes = (bytes + kStep - 1) / kStep * kStep;
  if (bytes >= kWorkspaceSmallest) {
    Pool& p = pool();
    const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
    if (lock) {
      size_t best = p.kept.size();
      for (size_t i = 0; i < p.kept.size(); ++i) {
        const size_t here = p.kept[i].bytes;
        if (here >= bytes && here / 4 <= bytes && (best == p.kept.size() || here < p.kept[best].bytes)) best = i;
      }
      if (best < p.kept.size()) {
        const Workspace found = p.kept[best];
        p.erase(best);
        return found;
      }
    }
  }
  return {::operator new(bytes, kAlignment), bytes};
}

void put_workspace(Workspace w) noexcept {
  if (w.bytes < kWorkspaceSmallest || w.bytes > kWorkspaceKept) return free_now(w);
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock) return free_now(w);
  while (p.bytes + w.bytes > kWorkspaceKept || p.kept.size() == kMostKept) {
    free_now(p.kept.front());
    p.erase(0);
  }
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

}  // namespace mirage::cpu
