// Whether a module of PyTorch and those below it are what they are expected to be, and what they hold: by their
// dictionaries, in a few microseconds, where the same questions asked in Python take ten times as long.
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "bind.h"

namespace mirage::python {
namespace {

// What is looked up in a dictionary of a module, and its place among what match() returns.
struct Slot {
  py::str dictionary;  // "_parameters", "_buffers" or "_modules"; empty: the module's own
  py::str key;
};

class ModulePattern {
 public:
  using Attributes = std::vector<std::pair<py::str, py::tuple>>;
  using Children = std::vector<std::pair<py::str, const ModulePattern*>>;
  using Slots = std::vector<std::pair<py::str, py::str>>;

  ModulePattern(std::vector<py::type> types, bool bare, Attributes attributes, Slots slots, std::vector<py::str> absent,
                py::list children, bool only)
      : types_(std::move(types)), bare_(bare), attributes_(std::move(attributes)), only_(only) {
    for (auto& [dictionary, key] : slots) slots_.push_back({interned(dictionary), interned(key)});
    for (auto& name : absent) absent_.push_back(interned(name));
    for (auto& attribute : attributes_) attribute.first = interned(attribute.first);
    for (const auto& child : children) {
      const auto pair = py::cast<py::tuple>(child);
      kept_.push_back(pair[1]);
      children_.emplace_back(interned(pair[0]), py::cast<const ModulePattern*>(pair[1]));
    }
  }

  // What the slots hold, in the order of a walk that takes a module's own before its children's; None if anything is not
  // as expected, or a slot is empty.
  py::object match(py::handle module) const {
    std::vector<py::object> found;
    found.reserve(40);
    if (!collect(module, found)) return py::none();
    py::tuple result(found.size());
    for (size_t i = 0; i < found.size(); ++i) PyTuple_SET_ITEM(result.ptr(), Py_ssize_t(i), found[i].release().ptr());
    return std::move(result);
  }

 private:
  static py::str interned(const py::object& text) {
    PyObject* p = py::cast<py::str>(text).release().ptr();
    PyUnicode_InternInPlace(&p);
    return py::reinterpret_steal<py::str>(p);
  }

  // A borrowed reference, or null.
  static PyObject* item(PyObject* dictionary, py::handle key) {
    PyObject* const value = PyDict_GetItemWithError(dictionary, key.ptr());
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  static PyObject* dictionary_of(PyObject* state, py::handle name) {
    PyObject* const value = item(state, name);
    return value && PyDict_Check(value) ? value : nullptr;
  }

  static bool is_one_of(PyObject* value, const py::tuple& allowed) {
    if (!value) return false;
    for (const auto& one : allowed) {
      const int same = PyObject_RichCompareBool(value, one.ptr(), Py_EQ);
      if (same < 0) throw py::error_already_set();
      if (same) return true;
    }
    return false;
  }

  // The names of PyTorch's own attributes. Never destroyed: that would be after the interpreter is gone.
  struct Names {
    py::str modules = interned(py::str("_modules")), parameters = interned(py::str("_parameters")),
            forward = interned(py::str("forward")), parametrizations = interned(py::str("parametrizations"));
    py::str hooks[4] = {interned(py::str("_forward_hooks")), interned(py::str("_forward_pre_hooks")),
                        interned(py::str("_backward_hooks")), interned(py::str("_backward_pre_hooks"))};
  };
  static const Names& names() {
    static const Names* const all = new Names;
    return *all;
  }

  // Whether calling the module is its class's forward and nothing else.
  static bool is_bare(PyObject* state, PyObject* modules) {
    for (const auto& name : names().hooks) {
      PyObject* const registered = dictionary_of(state, name);
      if (!registered || PyDict_GET_SIZE(registered) != 0) return false;
    }
    return !item(state, names().forward) && !item(modules, names().parametrizations);
  }

  bool has_type(PyObject* module) const {
    for (const auto& type : types_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(module)) == type.ptr()) return true;
    }
    return types_.empty();
  }

  bool collect(py::handle module, std::vector<py::object>& found) const {
    if (!has_type(module.ptr())) return false;
    const auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!state) throw py::error_already_set();
    PyObject* const modules = dictionary_of(state.ptr(), names().modules);
    if (!modules || (only_ && PyDict_GET_SIZE(modules) != Py_ssize_t(children_.size()))) return false;
    if (bare_ && !is_bare(state.ptr(), modules)) return false;
    for (const auto& [name, allowed] : attributes_) {
      if (!is_one_of(item(state.ptr(), name), allowed)) return false;
    }
    for (const auto& slot : slots_) {
      PyObject* const where = PyUnicode_GET_LENGTH(slot.dictionary.ptr()) ? dictionary_of(state.ptr(), slot.dictionary)
                                                                          : state.ptr();
      PyObject* const value = where ? item(where, slot.key) : nullptr;
      if (!value || value == Py_None) return false;
      found.push_back(py::reinterpret_borrow<py::object>(value));
    }
    if (!absent_.empty()) {
      PyObject* const parameters = dictionary_of(state.ptr(), names().parameters);
      for (const auto& name : absent_) {
        PyObject* const value = parameters ? item(parameters, name) : nullptr;
        if (value && value != Py_None) return false;
      }
    }
    for (const auto& [name, pattern] : children_) {
      PyObject* const child = item(modules, name);
      if (!child || !pattern->collect(child, found)) return false;
    }
    return true;
  }

  const std::vector<py::type> types_;
  const bool bare_;
  Attributes attributes_;
  const bool only_;
  std::vector<Slot> slots_;
  std::vector<py::str> absent_;  // parameters that are not there, or None
  Children children_;
  std::vector<py::object> kept_;  // the children's patterns
};

}  // namespace

MIRAGE_BINDINGS(m) {
  py::class_<ModulePattern>(m, "ModulePattern", "What a torch.nn.Module is expected to be; see mirage/fast/pattern.py.")
      .def(py::init<std::vector<py::type>, bool, ModulePattern::Attributes, ModulePattern::Slots,
                    std::vector<py::str>, py::list, bool>(),
           py::arg("types"), py::arg("bare"), py::arg("attributes"), py::arg("slots"), py::arg("absent"),
           py::arg("children"), py::arg("only"))
      .def("match", &ModulePattern::match, py::arg("module"));
}

}  // namespace mirage::python
