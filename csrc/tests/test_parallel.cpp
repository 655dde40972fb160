// Units over threads: every unit once, whatever their number and that of the threads, and whoever is slow.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "common/cpu/parallel.h"

using namespace mirage::cpu::MIRAGE_ISA;

namespace {

void every_unit_once(int64_t units, int threads, int slow) {
#if defined(_OPENMP)
  omp_set_num_threads(threads);
#endif
  std::vector<std::atomic<int>> seen(static_cast<size_t>(units));
  std::atomic<int> disturbed{0}, misled{0};
  parallel_units<float>(units, 16, [&](WorkUnit unit, float* scratch) {
    if (unit.follows && scratch[15] != float(unit - 1)) ++misled;
    scratch[15] = float(unit);
    if (unit == slow) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    if (scratch[15] != float(unit)) ++disturbed;
    ++seen[size_t(unit)];
  });
  for (int64_t unit = 0; unit < units; ++unit) {
    CHECK(seen[size_t(unit)] == 1, "unit %d of %d, %d threads: %d times", int(unit), int(units), threads,
          int(seen[size_t(unit)]));
  }
  CHECK(disturbed == 0, "%d units shared scratch memory", int(disturbed));
  CHECK(misled == 0, "%d units follow one whose scratch memory they do not find", int(misled));
}

// In the order that one thread finds them: its own from the first on, then the others' from the last.
void shares_in_order() {
  Shares shares(7, 2);
  const int64_t expected[] = {3, 4, 5, 6, 2, 1, 0, -1, -1};
  for (const int64_t unit : expected) {
    const int64_t found = shares.next(1);
    CHECK(found == unit, "%d instead of %d", int(found), int(unit));
  }
  Shares fewer(2, 200);  // more threads than shares are kept for
  const bool both = fewer.next(150) >= 0 && fewer.next(3) >= 0;
  CHECK(both && fewer.next(0) == -1, "two units for any two threads");
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  shares_in_order();
  for (int64_t units : {0, 1, 2, 3, 7, 64, 1001}) {
    for (int threads : {1, 2, 3, 5, 70}) every_unit_once(units, threads, 0);
  }
  every_unit_once(40, 4, 39);
  return mirage::test::finish();
}
