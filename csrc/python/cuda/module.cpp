// The Python modules mirage_kernels._cuda (the CUDA library) and mirage_kernels._cuda_emulated (its kernels compiled
// for the host): what the operators' bind_cuda.cpp register, and facts about the build.
#include "common/cuda/registry.h"
#include "cuda_tensors.h"
#include "python/interface.h"
#if defined(MIRAGE_EMULATED)
#include "common/cuda/emulation.h"
#endif

PYBIND11_MODULE(MIRAGE_MODULE, m) {
  m.doc() = "CUDA kernels of mirage_kernels. Tensors are passed as DLPack capsules.";
  m.attr("__version__") = MIRAGE_VERSION;
  m.attr("interface") = mirage::python::kInterface;
  m.attr("emulated") = mirage::python::kEmulated;
  for (auto bind : mirage::python::bindings()) bind(m);
  m.def("kernels", [] {
    pybind11::list all;
    for (const auto& [name, launch] : mirage::cuda::kernels().all) {
      all.append(pybind11::make_tuple(name, launch.threads, launch.shared_bytes, int(launch.oldest)));
    }
    return all;
  }, "(name, threads of a block, bytes of dynamic shared memory, oldest GPU: 80 for sm_80) of every kernel.");
#if defined(MIRAGE_EMULATED)
  m.def("set_order", [](const std::string& order) {
    using mirage::cuda::emulation::Order;
    const char* names[] = {"forward", "backward", "shuffled"};
    for (int i = 0; i < 3; ++i) {
      if (order == names[i]) return mirage::cuda::emulation::set_order(Order(i));
    }
    mirage::fail("order", "forward, backward or shuffled", order);
  }, "In which order the threads of a block run between two barriers.");
  m.def("set_multiprocessors", [](int count) {
    if (count < 1) mirage::fail("count", "a positive number", std::to_string(count));
    mirage::cuda::emulation::set_multiprocessors(count);
  }, "How many the GPU has: among how many blocks kernels share their work.");
#endif
}
