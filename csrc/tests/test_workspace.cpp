// Kept scratch memory: reused, bounded, given back.
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/workspace.h"

using namespace mirage::cpu;

int main() {
  constexpr size_t MiB = size_t(1) << 20;
  free_workspaces();
  CHECK(free_workspaces() == 0, "nothing is kept");

  const Workspace first = take_workspace(3 * MiB);
  CHECK(first.bytes >= 3 * MiB && reinterpret_cast<uintptr_t>(first.data) % 64 == 0, "%zu bytes", first.bytes);
  std::memset(first.data, 1, first.bytes);
  put_workspace(first);
  const Workspace smaller = take_workspace(2 * MiB);
  CHECK(smaller.data == first.data, "a buffer serves a smaller request");
  const Workspace other = take_workspace(2 * MiB);
  CHECK(other.data != smaller.data, "a buffer in use is nobody else's");
  put_workspace(smaller);
  put_workspace(other);
  CHECK(take_workspace(100 * MiB / 1024).data != first.data, "a buffer is not wasted on a request far below its size");
  CHECK(free_workspaces() == smaller.bytes + other.bytes, "all of it is given back");

  std::vector<Workspace> many;
  for (size_t i = 0; i < 40; ++i) many.push_back(take_workspace(5 * MiB));
  for (const Workspace& w : many) put_workspace(w);
  const Workspace last = take_workspace(5 * MiB);
  bool kept_last = false;
  for (size_t i = many.size() - kWorkspaceLimit / (5 * MiB); i < many.size(); ++i) kept_last |= many[i].data == last.data;
  CHECK(kept_last, "the newest are kept");
  put_workspace(last);
  const size_t kept = free_workspaces();
  CHECK(kept <= kWorkspaceLimit && kept + 5 * MiB > kWorkspaceLimit, "%zu bytes kept", kept);

  put_workspace(take_workspace(kWorkspaceLimit + 1));
  put_workspace(take_workspace(kWorkspaceSmallest - 5000));
  CHECK(free_workspaces() == 0, "neither the largest nor the smallest are kept");

  const Workspace large = take_workspace(40 * MiB), small = take_workspace(10 * MiB);
  put_workspace(large);
  put_workspace(small);
  put_workspace(take_workspace(30 * MiB, 1.25));
  CHECK(free_workspaces() == 40 * MiB, "40 MiB are too much for 30, and made room for them: %zu", free_workspaces());

  CHECK(limit_workspace(100 * MiB) == kWorkspaceLimit, "the limit before");
  put_workspace(take_workspace(90 * MiB));
  CHECK(limit_workspace(20 * MiB) == 100 * MiB, "the limit before");
  CHECK(free_workspaces() == 0, "what is over a new limit is freed");
  put_workspace(take_workspace(30 * MiB));
  CHECK(free_workspaces() == 0, "a buffer over the limit is not kept");
  limit_workspace(kWorkspaceLimit);
  return mirage::test::finish();
}
