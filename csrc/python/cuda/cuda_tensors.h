// Converts tensors and options from Python for the CUDA library.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "mirage/cuda/stream.h"
#include "python/bind.h"

namespace mirage::python {

#if defined(MIRAGE_EMULATED)
constexpr bool kEmulated = true;
constexpr int kDevice = kDeviceCpu;
#else
constexpr bool kEmulated = false;
constexpr int kDevice = kDeviceCuda;
#endif

inline Tensor tensor_of(const char* argument, const py::capsule& capsule) {
  return from_dlpack(argument, capsule, kDevice);
}

inline Tensor matrix_of(const char* argument, const py::capsule& capsule) {
  return matrix_from_dlpack(argument, capsule, kDevice);
}

// `stream`: a cudaStream_t as an integer.
inline cuda::Options options_of(uintptr_t stream, bool tf32) {
  cuda::Options options;
  options.stream = reinterpret_cast<void*>(stream);
  options.tf32 = tf32;
  return options;
}

// The same with workspace, a contiguous tensor.
inline cuda::Options options_of(uintptr_t stream, bool tf32, const py::capsule& workspace) {
  cuda::Options options = options_of(stream, tf32);
  const Tensor memory = tensor_of("workspace", workspace);
  check_contiguous("workspace", memory);
  options.workspace = memory.data;
  options.workspace_bytes = memory.numel() * bytes_of(memory.dtype);
  return options;
}

// Registers a function of N tensors and options as a Python function of a list of capsules, a workspace, a stream, and
// whether TF32 is allowed.
template <class Function, size_t N, size_t... I>
void define_function(py::module_& m, const char* name, Function function, const std::array<const char*, N>& names,
                     std::index_sequence<I...>) {
  m.def(name, [=](const std::vector<py::capsule>& tensors, py::capsule workspace, uintptr_t stream, bool tf32) {
    if (tensors.size() != N) fail("tensors", std::to_string(N), std::to_string(tensors.size()));
    const Tensor t[] = {tensor_of(names[I], tensors[I])...};
    const cuda::Options options = options_of(stream, tf32, workspace);
    py::gil_scoped_release release;
    function(t[I]..., options);
  });
}

template <class Function, size_t N>
void define_function(py::module_& m, const char* name, Function function, const std::array<const char*, N>& names) {
  define_function(m, name, function, names, std::make_index_sequence<N>());
}

}  // namespace mirage::python
