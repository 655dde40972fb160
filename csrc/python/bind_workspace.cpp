// Memory that outlives a call: large results from it, and what Python may do with it.
#include <pybind11/stl.h>

#include "bind.h"
#include "common/cpu/workspace.h"

namespace mirage::python {
namespace {

// A contiguous tensor whose memory goes back to the workspace when its last owner lets go of it, on whatever thread.
struct Result : DLManagedTensor {
  std::vector<int64_t> shape;
  cpu::Workspace room{};

  Result(std::vector<int64_t> sizes, int code, int bits) : DLManagedTensor{}, shape(std::move(sizes)) {
    size_t bytes = size_t(bits / 8);
    for (const int64_t n : shape) bytes *= size_t(n);
    room = cpu::take_workspace(bytes);
    tensor.data = room.data;
    tensor.device = {kDeviceCpu, 0};
    tensor.ndim = int32_t(shape.size());
    tensor.dtype = {uint8_t(code), uint8_t(bits), 1};
    tensor.shape = shape.data();
    deleter = [](DLManagedTensor* self) { delete static_cast<Result*>(self); };
  }
  ~Result() { cpu::put_workspace(room); }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
};

py::capsule make_result(std::vector<int64_t> shape, int code, int bits) {
  return py::capsule(static_cast<DLManagedTensor*>(new Result(std::move(shape), code, bits)), "dltensor",
                     [](PyObject* capsule) {
                       if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // taken over by a tensor
                       auto* const left = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
                       left->deleter(left);
                     });
}

}  // namespace

MIRAGE_BINDINGS(m) {
  m.def("result", &make_result, "A tensor of a shape and a DLPack type code and width, its values whatever they were.");
  m.def("release_workspace", &cpu::free_workspaces, "Frees the memory kept between calls.");
  m.def("limit_workspace", &cpu::limit_workspace, "Sets how many bytes are kept between calls; those before.");
}

}  // namespace mirage::python
