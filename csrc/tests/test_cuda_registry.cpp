// Tests of the kernel registry: names as tools find them in binaries, the largest launch of each kernel, all operators.
#include <string>

#include "check.h"
#include "common/cuda/gemm.h"
#include "common/cuda/registry.h"

namespace mirage::cuda {

enum class Side { left, right };

template <class Kind, int kChannelTiles, bool kWide> MIRAGE_KERNEL(32) of_types(int) {}
template <Side side> MIRAGE_KERNEL(32) of_enumerator(void (*)(int)) {}
MIRAGE_KERNEL(32) plain(const float*) {}

}  // namespace mirage::cuda

using namespace mirage::cuda;

namespace {

void check_name(const std::string& name, const char* expected) {
  CHECK(name == expected, "%s, not %s", name.c_str(), expected);
}

MIRAGE_KERNELS(list) {
  list.add<plain>(64, 100);
  list.add<plain>(32, 200);
  list.add<of_types<ExactFloat, 3, true>>(256, 0, Gpu::sm_90);
}

}  // namespace

int main() {
  check_name(kernel_name<of_types<TensorCores16<bf16>, 12, false>>(), "of_types<TensorCores16<bf16>, 12, false>");
  check_name(kernel_name<of_types<float*, -1, true>>(), "of_types<float*, -1, true>");
  check_name(kernel_name<of_enumerator<Side::right>>(), "of_enumerator<(Side)1>");
  check_name(kernel_name<plain>(), "plain");

  const auto all = kernels().all;
  CHECK(all.size() == 2 && all.count("of_types<ExactFloat, 3, true>") == 1, "%zu kernels", all.size());
  const KernelLaunch launch = all.at("plain");
  CHECK(launch.threads == 64 && launch.shared_bytes == 200, "%d, %d", launch.threads, int(launch.shared_bytes));
  CHECK(launch.oldest == Gpu::sm_80, "sm_%d", int(launch.oldest));
  CHECK(all.at("of_types<ExactFloat, 3, true>").oldest == Gpu::sm_90, "of every GPU");
  return mirage::test::finish();
}
