// How the library launches its kernels: threads, dynamic shared memory and GPUs. Binaries do not record this, and
// tools/cuda_resources.py needs it. Each operator registers its kernels with MIRAGE_KERNELS.
#pragma once

#include <cxxabi.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <typeinfo>
#include <vector>

namespace mirage::cuda {

template <auto kernel> struct KernelOf {};

// The kernel's name and template arguments as its symbol demangles, without namespaces: "some_kernel<float, 3>".
template <auto kernel>
std::string kernel_name() {
  const std::unique_ptr<char, void (*)(void*)> demangled(
      abi::__cxa_demangle(typeid(KernelOf<kernel>).name(), nullptr, nullptr, nullptr), std::free);
  std::string name = demangled.get();
  const std::string space = "mirage::cuda::";
  for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, space.size());
  // here: KernelOf<&(void some_kernel<float, 3>(Arguments))>, or KernelOf<&some_kernel> if it is no template
  size_t begin = name.find('&') + 1;
  for (const std::string prefix : {"(", "void "}) {
    if (name.compare(begin, prefix.size(), prefix) == 0) begin += prefix.size();
  }
  size_t end = begin;
  for (int depth = 0; depth > 0 || (name[end] != '(' && name[end] != '>'); ++end) {
    depth += (name[end] == '<') - (name[end] == '>');
  }
  return name.substr(begin, end - begin);
}

// GPUs by the shared memory that a thread block can have: 163 KiB on an A100 (sm_80), 227 KiB on an H100 (sm_90).
enum class Gpu { sm_80 = 80, sm_90 = 90 };

// The largest launch of a kernel: threads and bytes of dynamic shared memory of a thread block. And the oldest GPU on
// which the library launches it: older ones have too little shared memory, and run a smaller kernel or none.
struct KernelLaunch {
  int threads = 0;
  int64_t shared_bytes = 0;
  Gpu oldest = Gpu::sm_90;
};

class KernelList {
 public:
  template <auto kernel>
  void add(int threads, int64_t shared_bytes, Gpu oldest = Gpu::sm_80) {
    KernelLaunch& most = all[kernel_name<kernel>()];
    most = {std::max(most.threads, threads), std::max(most.shared_bytes, shared_bytes), std::min(most.oldest, oldest)};
  }

  std::map<std::string, KernelLaunch> all;
};

using ListKernels = void (*)(KernelList& list);

inline std::vector<ListKernels>& kernel_listers() {
  static std::vector<ListKernels> all;
  return all;
}

struct KernelRegistrar {
  explicit KernelRegistrar(ListKernels lister) { kernel_listers().push_back(lister); }
};

// Collects the kernels of all operators.
inline KernelList kernels() {
  KernelList list;
  for (auto lister : kernel_listers()) lister(list);
  return list;
}

}  // namespace mirage::cuda

// To be used once per operator, in a source file that is linked wherever its kernels are.
#define MIRAGE_KERNELS(list)                                             \
  static void list_kernels(::mirage::cuda::KernelList& list);            \
  static ::mirage::cuda::KernelRegistrar kernel_registrar(list_kernels); \
  static void list_kernels(::mirage::cuda::KernelList& list)
