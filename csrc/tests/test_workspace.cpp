// Memory kept between calls: reused, joined, bounded, given back.
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "common/cpu/address_space.h"
#include "common/cpu/arena.h"
#include "common/cpu/workspace.h"

using namespace mirage::cpu;

namespace {

constexpr size_t KiB = 1024, MiB = 1024 * KiB, GiB = 1024 * MiB;

void places() {
  Arena arena(GiB, GiB);
  void* const a = arena.take(MiB);
  void* const b = arena.take(2 * MiB);
  void* const c = arena.take(3 * MiB);
  CHECK(a != nullptr && b != a && c != b, "three buffers");
  CHECK(arena.owns(a) && arena.owns(static_cast<char*>(c) + 3 * MiB - 1) && !arena.owns(&arena), "knows its own");
  arena.put(b, 2 * MiB);
  CHECK(arena.take(MiB + 64 * KiB) == b, "the lowest place that fits");
  CHECK(arena.take(2 * MiB) == static_cast<char*>(c) + 3 * MiB, "what does not fit goes on top");
  arena.put(b, MiB + 64 * KiB);
  arena.put(a, MiB);
  arena.put(c, 3 * MiB);
  CHECK(arena.take(6 * MiB) == a, "free neighbours are one place");
  CHECK(arena.take(2 * GiB) == nullptr, "more than there are addresses");
}

void pages() {
  Arena arena(GiB, 8 * MiB);
  void* const a = arena.take(6 * MiB);
  void* const b = arena.take(6 * MiB);
  std::memset(a, 1, 6 * MiB);
  CHECK(arena.kept() == 0, "nothing is free: %zu", arena.kept());
  arena.put(a, 6 * MiB);
  CHECK(arena.kept() == 6 * MiB, "kept: %zu", arena.kept());
  arena.put(b, 6 * MiB);
  CHECK(arena.kept() == 8 * MiB, "the limit: %zu", arena.kept());
  CHECK(arena.take(6 * MiB) == a && static_cast<char*>(a)[5] == 1, "the lowest keep their pages");
  CHECK(arena.kept() == 2 * MiB, "kept: %zu", arena.kept());
  void* const large = arena.take(20 * MiB);
  CHECK(large > a && arena.kept() == 0, "room was made for what needs new pages: %zu", arena.kept());
  arena.put(large, 20 * MiB);
  arena.put(a, 6 * MiB);
  CHECK(arena.kept() == 8 * MiB, "the limit: %zu", arena.kept());
  CHECK(arena.trim(0) == 8 * MiB && arena.kept() == 0 && arena.trim(0) == 0, "all of it is given back");
  void* const small = arena.take(64 * KiB);
  CHECK(small == a && static_cast<char*>(a)[5] == 0, "new pages");
  CHECK(arena.kept() == 2 * MiB - 64 * KiB, "the rest of a huge page is kept: %zu", arena.kept());
  CHECK(arena.trim(0) == 0, "and cannot be given back while a part is in use");
}

// What does not fit where pages are free takes new ones, and those go: there are hardly more than were ever in use.
void gaps() {
  Arena arena(2 * GiB, 2 * GiB);
  void* const a = arena.take(200 * MiB);
  void* const b = arena.take(200 * MiB);
  void* const c = arena.take(200 * MiB);
  arena.put(a, 200 * MiB);
  arena.put(c, 200 * MiB);
  CHECK(arena.kept() == 400 * MiB, "nothing is missing yet: %zu", arena.kept());
  CHECK(arena.take(300 * MiB) == c, "above what is in use");
  CHECK(arena.kept() == 164 * MiB, "600 MiB were in use, 500 are, and 64 more may be kept: %zu", arena.kept());
  CHECK(arena.take(200 * MiB) == a && arena.kept() == 0, "the rest, and new pages again: %zu", arena.kept());
  arena.put(a, 200 * MiB);
  arena.put(b, 200 * MiB);
  arena.put(c, 300 * MiB);
  CHECK(arena.kept() == 700 * MiB, "all that was in use is kept: %zu", arena.kept());
  CHECK(arena.trim(0) == 700 * MiB, "until it is given back");
  arena.take(100 * MiB);
  void* const d = arena.take(100 * MiB);
  CHECK(d == static_cast<char*>(a) + 100 * MiB, "the lowest place");
  arena.put(a, 100 * MiB);
  arena.take(300 * MiB);
  CHECK(arena.kept() == 64 * MiB, "of what was in use before nothing is remembered: %zu", arena.kept());
}

// Buffers of all sizes in any order: none overlap, and what is kept is within the limit but for the rests of pages.
void any_order() {
  std::mt19937 random(0);
  Arena arena(GiB, 40 * MiB);
  struct Held {
    char* data;
    size_t bytes;
    char value;
  };
  std::vector<Held> held;
  size_t wrong = 0, over = 0;
  for (int i = 0; i < 4000; ++i) {
    if (held.size() < 12 && random() % 2) {
      const size_t bytes = (1 + random() % (random() % 2 ? 8 : 160)) * Arena::kStep;
      char* const data = static_cast<char*>(arena.take(bytes));
      held.push_back({data, bytes, char(i)});
      data[0] = data[bytes / 2] = data[bytes - 1] = char(i);
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      const Held h = held.back();
      held.pop_back();
      wrong += h.data[0] != h.value || h.data[h.bytes / 2] != h.value || h.data[h.bytes - 1] != h.value;
      arena.put(h.data, h.bytes);
    }
    over += arena.kept() > 40 * MiB + 2 * kUnit * (held.size() + 1);
    for (size_t k = 0; k < held.size(); ++k) {
      for (size_t j = 0; j < k; ++j) {
        wrong += held[j].data < held[k].data + held[k].bytes && held[k].data < held[j].data + held[j].bytes;
      }
    }
  }
  for (const Held& h : held) arena.put(h.data, h.bytes);
  CHECK(wrong == 0 && over == 0, "%zu overlaps, %zu times over the limit", wrong, over);
  CHECK(arena.kept() <= 40 * MiB, "kept: %zu", arena.kept());
  arena.trim(0);
  CHECK(arena.kept() == 0, "kept: %zu", arena.kept());
}

void of_the_process() {
  free_workspaces();
  CHECK(free_workspaces() == 0, "nothing is kept");
  const size_t standard = default_workspace_limit();
  CHECK(standard >= 64 * MiB && standard <= 2 * GiB, "the limit: %zu", standard);
  const Workspace w = take_workspace(3 * MiB + 1);
  CHECK(w.bytes >= 3 * MiB + 1 && reinterpret_cast<uintptr_t>(w.data) % 64 == 0, "%zu bytes", w.bytes);
  std::memset(w.data, 1, w.bytes);
  put_workspace(w);
  const Workspace again = take_workspace(3 * MiB + 1);
  CHECK(again.data == w.data, "taken again");
  put_workspace(again);
  put_workspace(take_workspace(kWorkspaceSmallest - 5000));
  CHECK(free_workspaces() == 4 * MiB, "whole pages are given back, and small buffers are the allocator's");

  CHECK(limit_workspace(20 * MiB) == standard, "the limit before");
  put_workspace(take_workspace(30 * MiB));
  CHECK(free_workspaces() == 20 * MiB, "within the limit");
  put_workspace(take_workspace(30 * MiB));
  CHECK(limit_workspace(0) == 20 * MiB && free_workspaces() == 0, "what is over a new limit is given back");
  limit_workspace(standard);
}

// Whoever finds the door closed is served by the allocator, and what it puts back meanwhile is not lost.
void threads() {
  std::vector<std::thread> all;
  std::vector<size_t> wrong(4);
  for (size_t t = 0; t < wrong.size(); ++t) {
    all.emplace_back([t, &wrong] {
      for (size_t i = 0; i < 2000; ++i) {
        const Workspace w = take_workspace((1 + (i * 7 + t) % 5) * 128 * KiB);
        char* const data = static_cast<char*>(w.data);
        data[0] = data[w.bytes - 1] = char(t);
        std::this_thread::yield();
        wrong[t] += data[0] != char(t) || data[w.bytes - 1] != char(t);
        put_workspace(w);
      }
    });
  }
  for (std::thread& t : all) t.join();
  for (const size_t n : wrong) CHECK(n == 0, "%zu buffers in two hands", n);
  free_workspaces();
  CHECK(free_workspaces() == 0, "all of it came back");
}

}  // namespace

int main() {
  places();
  pages();
  gaps();
  any_order();
  of_the_process();
  threads();
  return mirage::test::finish();
}
