// Whether modules of PyTorch are what mirage.fast expects, and what they hold: by their dictionaries, in a few microseconds
// a block, where the same questions asked in Python take ten times as long. It belongs to mirage/fast/recognise, whose
// pattern.py says what each question means; it is here because this is where Python calls C++.
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "bind.h"

namespace mirage::python {
namespace {

py::str interned(const py::object& text) {
  PyObject* p = py::cast<py::str>(text).release().ptr();
  PyUnicode_InternInPlace(&p);
  return py::reinterpret_steal<py::str>(p);
}

// A borrowed reference, or null.
PyObject* item(PyObject* dictionary, py::handle key) {
  PyObject* const value = PyDict_GetItemWithError(dictionary, key.ptr());
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

PyObject* dictionary_of(PyObject* state, py::handle name) {
  PyObject* const value = item(state, name);
  return value && PyDict_Check(value) ? value : nullptr;
}

// Comparing may run code of the user's, which must not take away what is compared.
bool equal(PyObject* a, PyObject* b) {
  const auto kept = {py::reinterpret_borrow<py::object>(a), py::reinterpret_borrow<py::object>(b)};
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same;
}

bool is_true(PyObject* value) {
  const int result = PyObject_IsTrue(value);
  if (result < 0) throw py::error_already_set();
  return result;
}

// The names of PyTorch's own attributes. Never destroyed: that would be after the interpreter is gone.
struct Names {
  py::str modules = interned(py::str("_modules")), parameters = interned(py::str("_parameters")),
          forward = interned(py::str("forward")), parametrizations = interned(py::str("parametrizations")),
          training = interned(py::str("training"));
  py::str hooks[4] = {interned(py::str("_forward_hooks")), interned(py::str("_forward_pre_hooks")),
                      interned(py::str("_backward_hooks")), interned(py::str("_backward_pre_hooks"))};
};
const Names& names() {
  static const Names* const all = new Names;
  return *all;
}

using Found = std::vector<py::object>;

// What a pattern hands out.
struct Slot {
  enum Place { kItself, kSetting, kTensor } place;
  py::str dictionary;  // of a tensor: "_parameters" or "_buffers"
  py::str key;
  py::object otherwise;  // of a setting that neither the module nor its class has; None: no match
  bool optional = false;  // of a tensor: None where it is not there
};

constexpr const char *kItselfName = "", *kSettingName = "setting", *kOptionalName = "optional";

class ModulePattern {
 public:
  using Settings = std::vector<std::pair<py::str, py::tuple>>;
  using Slots = std::vector<std::tuple<py::str, py::str, py::object>>;
  using Named = std::optional<std::pair<std::string, std::vector<py::str>>>;

  ModulePattern(py::object type, Named named, py::list one_of, Settings settings, std::vector<py::str> same, Slots slots,
                std::vector<py::str> absent, bool by_mode, py::list children, bool only)
      : type_(std::move(type)), named_(std::move(named)), settings_(std::move(settings)), by_mode_(by_mode), only_(only),
        kept_{std::move(one_of), std::move(children)} {
    for (const auto& one : kept_[0]) one_of_.push_back(py::cast<const ModulePattern*>(one));
    for (auto& setting : settings_) setting.first = interned(setting.first);
    for (auto& name : same) same_.push_back(interned(name));
    for (auto& name : absent) absent_.push_back(interned(name));
    for (auto& [dictionary, key, otherwise] : slots) {
      const std::string place = dictionary;
      const auto kind = place == kItselfName ? Slot::kItself : place == kSettingName ? Slot::kSetting : Slot::kTensor;
      slots_.push_back({kind, interned(dictionary), interned(key), otherwise,
                        kind == Slot::kTensor && !otherwise.is_none()});
    }
    for (const auto& child : kept_[1]) {
      const auto pair = py::cast<py::tuple>(child);
      children_.emplace_back(interned(pair[0]), py::cast<const ModulePattern*>(pair[1]));
    }
  }

  // Whether calling the module is what an operator computes in its place; what it holds is added to `found`. Where it is
  // not, some may have been added.
  bool call(PyObject* module, bool inference, Found& found) const {
    if (!one_of_.empty()) {
      for (const Slot& slot : slots_) {
        if (slot.place == Slot::kItself) found.push_back(py::reinterpret_borrow<py::object>(module));
      }
      for (const ModulePattern* one : one_of_) {
        if (one->is_of_class(module)) return one->call(module, inference, found);
      }
      return false;
    }
    if (!is_of_class(module)) return false;
    const py::object state = state_of(module);
    return is_bypassable(state.ptr()) && contents(module, state.ptr(), inference, found);
  }

  // The same without the module's own class and hooks.
  bool contents(PyObject* module, bool inference, Found& found) const {
    return contents(module, state_of(module).ptr(), inference, found);
  }

 private:
  static py::object state_of(PyObject* module) {
    auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!state) throw py::error_already_set();
    return state;
  }

  // Whether calling the module is its class's forward and nothing else.
  static bool is_bypassable(PyObject* state) {
    for (const auto& name : names().hooks) {
      PyObject* const registered = dictionary_of(state, name);
      if (!registered || PyDict_GET_SIZE(registered) != 0) return false;
    }
    PyObject* const modules = dictionary_of(state, names().modules);
    return modules && !item(state, names().forward) && !item(modules, names().parametrizations);
  }

  bool is_of_class(PyObject* module) const {
    PyTypeObject* const type = Py_TYPE(module);
    if (!named_) return type_.is_none() || reinterpret_cast<PyObject*>(type) == type_.ptr();
    const char* const dot = std::strrchr(type->tp_name, '.');
    if (named_->first != (dot ? dot + 1 : type->tp_name)) return false;
    const py::object state = state_of(module);
    for (const py::str& name : named_->second) {
      if (!item(state.ptr(), name) && !PyObject_HasAttr(reinterpret_cast<PyObject*>(type), name.ptr())) return false;
    }
    return true;
  }

  bool is_set_up(PyObject* state) const {
    for (const auto& [name, allowed] : settings_) {
      PyObject* const value = item(state, name);
      bool fits = false;
      for (Py_ssize_t i = 0; value && !fits && i < PyTuple_GET_SIZE(allowed.ptr()); ++i) {
        fits = equal(value, PyTuple_GET_ITEM(allowed.ptr(), i));
      }
      if (!fits) return false;
    }
    for (size_t i = 1; i < same_.size(); ++i) {
      PyObject *const a = item(state, same_[0]), *const b = item(state, same_[i]);
      if (!a || !b || !equal(a, b)) return false;
    }
    if (absent_.empty()) return true;
    PyObject* const parameters = dictionary_of(state, names().parameters);
    for (const py::str& name : absent_) {
      PyObject* const value = parameters ? item(parameters, name) : nullptr;
      if (value && value != Py_None) return false;
    }
    return true;
  }

  // What the slot holds; null: nothing.
  static py::object held(const Slot& slot, PyObject* module, PyObject* state) {
    if (slot.place == Slot::kItself) return py::reinterpret_borrow<py::object>(module);
    PyObject* const where = slot.place == Slot::kTensor ? dictionary_of(state, slot.dictionary) : state;
    PyObject* const value = where ? item(where, slot.key) : nullptr;
    if (value || slot.place == Slot::kTensor) return py::reinterpret_borrow<py::object>(value);
    // Not by the instance, of which PyTorch's modules look for what is missing in Python code.
    if (!PyObject_HasAttr(reinterpret_cast<PyObject*>(Py_TYPE(module)), slot.key.ptr())) return slot.otherwise;
    return py::reinterpret_borrow<py::object>(module).attr(slot.key);
  }

  bool contents(PyObject* module, PyObject* state, bool inference, Found& found) const {
    PyObject* const modules = dictionary_of(state, names().modules);
    if (!modules || (only_ && PyDict_GET_SIZE(modules) != Py_ssize_t(children_.size()))) return false;
    if (inference && by_mode_) {
      PyObject* const training = item(state, names().training);
      if (!training || is_true(training)) return false;
    }
    if (!is_set_up(state)) return false;
    for (const Slot& slot : slots_) {
      py::object value = held(slot, module, state);
      if (!value || value.is_none()) {
        if (!slot.optional) return false;
        value = py::none();
      }
      found.push_back(std::move(value));
    }
    for (const auto& [name, pattern] : children_) {
      const auto child = py::reinterpret_borrow<py::object>(item(modules, name));
      if (!child || child.is_none() || !pattern->call(child.ptr(), inference, found)) return false;
    }
    return true;
  }

  const py::object type_;
  const Named named_;
  std::vector<const ModulePattern*> one_of_;
  Settings settings_;
  std::vector<py::str> same_;
  std::vector<Slot> slots_;
  std::vector<py::str> absent_;  // parameters that are not there, or None
  const bool by_mode_;
  std::vector<std::pair<py::str, const ModulePattern*>> children_;
  const bool only_;
  const std::array<py::list, 2> kept_;  // the patterns of `one_of_` and `children_`
};

// What an operator takes of a block: `order` says which of the things found, the first `tensors` of them as weights and
// those up to `known` as numbers.
class StagePattern {
 public:
  StagePattern(py::object pattern, std::vector<size_t> order, size_t tensors, size_t known)
      : kept_(std::move(pattern)), pattern_(py::cast<const ModulePattern*>(kept_)), order_(std::move(order)),
        tensors_(tensors), known_(known) {
    if (tensors_ > known_ || known_ > order_.size()) fail("known", "no more than there are", std::to_string(known_));
  }

  // A tuple in order; None where the block's modules have to be called.
  py::object match(py::handle block, bool inference) const {
    Found found;
    if (!find(block.ptr(), inference, found)) return py::none();
    py::tuple result(order_.size());
    for (size_t i = 0; i < order_.size(); ++i) {
      PyTuple_SET_ITEM(result.ptr(), Py_ssize_t(i), py::object(found[order_[i]]).release().ptr());
    }
    return std::move(result);
  }

  bool find(PyObject* block, bool inference, Found& found) const {
    found.reserve(order_.size() + 8);
    if (!pattern_->contents(block, inference, found)) return false;
    for (size_t i : order_) {
      if (i >= found.size()) fail("order", "places below " + std::to_string(found.size()), std::to_string(i));
    }
    return true;
  }

  void hand_out(const Found& found, py::list& weights, py::list& numbers) const {
    for (size_t i = 0; i < known_; ++i) (i < tensors_ ? weights : numbers).append(found[order_[i]]);
  }

 private:
  const py::object kept_;
  const ModulePattern* const pattern_;
  const std::vector<size_t> order_;
  const size_t tensors_, known_;
};

// Blocks next to each other whose stages all match, none of which depends on the batch.
class BlockPattern {
 public:
  BlockPattern(py::object block, py::list stages)
      : kept_(std::move(block)), kept_stages_(std::move(stages)), block_(py::cast<const ModulePattern*>(kept_)) {
    for (const auto& stage : kept_stages_) stages_.push_back(py::cast<const StagePattern*>(stage));
  }

  // How many from modules[first] on match, and the weights and numbers of all. `called`: their class and hooks do not
  // matter.
  py::tuple match_run(const py::list& modules, size_t first, bool called) const {
    py::list weights, numbers;
    std::vector<Found> found(stages_.size());
    size_t position = first;
    for (; position < modules.size(); ++position) {
      const py::object module = modules[position];
      Found nothing;
      if (!called && !block_->call(module.ptr(), true, nothing)) break;
      bool matches = true;
      for (size_t i = 0; matches && i < stages_.size(); ++i) {
        found[i].clear();
        matches = stages_[i]->find(module.ptr(), true, found[i]);
      }
      if (!matches) break;
      for (size_t i = 0; i < stages_.size(); ++i) stages_[i]->hand_out(found[i], weights, numbers);
    }
    return py::make_tuple(position - first, weights, numbers);
  }

 private:
  const py::object kept_;
  const py::list kept_stages_;
  const ModulePattern* const block_;
  std::vector<const StagePattern*> stages_;
};

}  // namespace

MIRAGE_BINDINGS(m) {
  py::class_<ModulePattern> module(m, "ModulePattern", "What a torch.nn.Module has to be; see mirage/fast/recognise.");
  module
      .def(py::init<py::object, ModulePattern::Named, py::list, ModulePattern::Settings, std::vector<py::str>,
                    ModulePattern::Slots, std::vector<py::str>, bool, py::list, bool>(),
           py::arg("type"), py::arg("named"), py::arg("one_of"), py::arg("settings"), py::arg("same"), py::arg("slots"),
           py::arg("absent"), py::arg("by_mode"), py::arg("children"), py::arg("only"));
  module.attr("ITSELF") = kItselfName;
  module.attr("SETTING") = kSettingName;
  module.attr("OPTIONAL") = kOptionalName;
  py::class_<StagePattern>(m, "StagePattern", "What an operator takes of a block's modules.")
      .def(py::init<py::object, std::vector<size_t>, size_t, size_t>(), py::arg("pattern"), py::arg("order"),
           py::arg("tensors"), py::arg("known"))
      .def("match", &StagePattern::match, py::arg("block"), py::arg("inference"));
  py::class_<BlockPattern>(m, "BlockPattern", "Blocks whose stages all match.")
      .def(py::init<py::object, py::list>(), py::arg("block"), py::arg("stages"))
      .def("match_run", &BlockPattern::match_run, py::arg("modules"), py::arg("first"), py::arg("called"));
}

}  // namespace mirage::python
