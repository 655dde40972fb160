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

// Names of their own in every use, so that several files can be compiled as one.
#define MIRAGE_BINDINGS(module) MIRAGE_BINDINGS_NUMBERED(module, __COUNTER__)
#define MIRAGE_BINDINGS_NUMBERED(module, number) MIRAGE_BINDINGS_JOINED(module, number)
#define MIRAGE_BINDINGS_JOINED(module, number) \
  MIRAGE_BINDINGS_NAMED(module, register_functions_##number, registrar_##number)
#define MIRAGE_BINDINGS_NAMED(module, function, registrar) \
  static void function(pybind11::module_& module);         \
  static ::mirage::python::Registrar registrar(function);  \
  static void function(pybind11::module_& module)
