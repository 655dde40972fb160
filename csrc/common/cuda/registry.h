// How the library launches its kernels, which is not written in their binaries: for tools/cuda_resources.py. Each stage
// lists its own with MIRAGE_KERNELS.
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

// A kernel's name and template arguments as its symbol demangles, without namespaces: "some_kernel<float, 3>".
template <auto kernel>
std::string kernel_name() {
  const std::unique_ptr<char, void (*)(void*)> demangled(
      abi::__cxa_demangle(typeid(KernelOf<kernel>).name(), nullptr, nullptr, nullptr), std::free);
  std::string name = demangled.get();
  const std::string space = "mirage::cuda::";
  for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, space.size());
  // now KernelOf<&(void some_kernel<float, 3>(Arguments))>, or KernelOf<&some_kernel> where it is no template
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

// By name: threads of a block and bytes of its dynamic shared memory, at most.
struct KernelLaunch {
  int threads = 0;
  int64_t shared_bytes = 0;
};

class KernelList {
 public:
  template <auto kernel>
  void add(int threads, int64_t shared_bytes) {
    KernelLaunch& most = all[kernel_name<kernel>()];
    most = {std::max(most.threads, threads), std::max(most.shared_bytes, shared_bytes)};
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

// Of all stages.
inline KernelList kernels() {
  KernelList list;
  for (auto lister : kernel_listers()) lister(list);
  return list;
}

}  // namespace mirage::cuda

// Once in a source file of a stage that is linked wherever its kernels are.
#define MIRAGE_KERNELS(list)                                             \
  static void list_kernels(::mirage::cuda::KernelList& list);            \
  static ::mirage::cuda::KernelRegistrar kernel_registrar(list_kernels); \
  static void list_kernels(::mirage::cuda::KernelList& list)
