// The Python module mirage_kernels._native: what the operators' bind_*.cpp register, and what the build is.
#include "bind.h"
#include "interface.h"

#include "common/cpu/isa_choice.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of mirage_kernels. Tensors are passed as DLPack capsules.";
  m.attr("__version__") = MIRAGE_VERSION;
  m.attr("interface") = mirage::python::kInterface;
  for (auto bind : mirage::python::bindings()) bind(m);
  m.def("cpu_isa", [] { return mirage::cpu::isa_name(mirage::cpu::active_isa()); },
        "The instruction set whose kernels run on this machine.");
  m.def("built_in_cpu_isa", [] { return mirage::cpu::isa_name(mirage::cpu::built_in_isa()); },
        "The one that is chosen where nobody says otherwise.");
  m.def("cpu_isa_problem", &mirage::cpu::isa_problem, pybind11::arg("name"),
        "Why kernels of this instruction set cannot run here; empty where they can.");
  m.def("prefer_cpu_isa", &mirage::cpu::prefer_isa, pybind11::arg("name"),
        "Choose this one where MIRAGE_CPU_ISA is not set; to be called before cpu_isa and any kernel.");
  m.def("why_no_tiles", [] { return mirage::cpu::why_no_tiles(); },
        "Why bfloat16 is not multiplied in the tiles of AMX; empty where it is.");
  m.def("max_threads", [] {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
  }, "Threads that the CPU kernels use.");
}
