// Each operator has a file bind_<operator>.cpp that registers its functions with MIRAGE_BINDINGS.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "dlpack.h"

namespace mirage::python {

namespace py = pybind11;
using Bind = void (*)(py::module_&);

inline std::vector<Bind>& bindings() {
  static std::vector<Bind> all;
  return all;
}

struct Registrar {
  explicit Registrar(Bind bind) { bindings().push_back(bind); }
};

}  // namespace mirage::python

#define MIRAGE_BINDINGS(module)                                      \
  static void register_functions(pybind11::module_& module);         \
  static ::mirage::python::Registrar registrar(register_functions);  \
  static void register_functions(pybind11::module_& module)
