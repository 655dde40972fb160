"""What can be said of a module: its class, settings, tensors and children, and why it is not so.

A pattern is asked in two ways. `structure_problem` is for a module of any class that has the right names, once: are its
children of the right kind (subclasses count), set up as expected, and do the numbers of channels fit each other?
`call_problem` is for a module that is about to be called, every time: would calling it and its children be exactly what
a stage computes of their weights?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

ORIGINAL_CLASS = "_mirage_original_class"
"""The attribute in which a module whose class was changed keeps its own."""

Size = int | str | tuple[int, str]
"""A number, a name that stands for the first number it is compared with, or a multiple of a name."""


@dataclass(frozen=True)
class Held:
    """A parameter or buffer that has to be there: the `field` as which it is handed out, and its shape, which is a
    matter of structure (None where sizes of the module tell it). `optional`: it may be None or not there, and is handed
    out as None then."""

    field: str
    shape: tuple[Size, ...] | None = None
    buffer: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Setting:
    """An attribute that is handed out as `field`: the module's, or `default`. None is no value."""

    field: str
    default: Any = None


@dataclass(frozen=True)
class Pattern:
    """A module, told by what it is and by its children.

    Attributes:
        kind: Its class; None for any.
        fast: `kind` is one of `mirage.fast`, to which modules of other classes are changed: in a parent's structure
            any module may stand there, since it is recognised for itself.
        named: Of no class that is known here, but one of this name that has these attributes.
        settings: What attributes may be, the expected value first.
        changeable: As `settings`, but no matter of structure: where one is another, the module is called.
        sizes: What attributes have to be, compared with other sizes of the pattern.
        same: Attributes that have to be equal.
        tensors: Parameters and buffers that have to be there.
        absent: Parameters that must not be there.
        takes: Attributes that are handed out.
        itself: The field as which the module is handed out.
        by_mode: It computes something else in training mode.
        children: Those that have to be there; others do not matter, unless `only` these may be.
        one_of: It is one of these, which hand out nothing. No matter of structure: other modules are called.
        instead: For children that may be missing: the child in their place, and what that means.
        says: Reasons by name, where "has <name> <value>, not <value>" says too little.
    """

    kind: type[nn.Module] | None = None
    fast: bool = False
    named: tuple[str, tuple[str, ...]] | None = None
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    changeable: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    sizes: Mapping[str, Size] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    tensors: Mapping[str, Held] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    takes: Mapping[str, Setting] = field(default_factory=dict)
    itself: str | None = None
    by_mode: bool = False
    children: Mapping[str, Pattern] = field(default_factory=dict)
    only: bool = False
    one_of: tuple[Pattern, ...] = ()
    instead: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)

    def fields(self) -> Iterator[str]:
        """Of what `call_problem` hands out, in its order."""
        if self.itself is not None:
            yield self.itself
        for held in self.tensors.values():
            yield held.field
        for setting in self.takes.values():
            yield setting.field
        for child in self.children.values():
            yield from child.fields()

    # ---- every call ------------------------------------------------------------------------------------------------

    def fits(self, module: nn.Module) -> bool:
        """Whether calling the module is what an operator computes in its place."""
        return not self.call_problem(module, [])

    def call_problem(self, module: nn.Module, found: list[Any], inference: bool = False, path: str = "") -> str:
        """Why calling the module is not what the pattern says; empty where it is, and `found` has what is handed out.

        `inference`: what it computes must not depend on the batch. What csrc/python/bind_module_pattern.cpp asks is
        the same; torch.compile traces this.
        """
        if self.one_of:
            for other in self.one_of:
                if other._is_of_class(module):
                    if self.itself is not None:
                        found.append(module)
                    return other.call_problem(module, found, inference, path)
            return self._other_class(module, path)
        if not self._is_of_class(module):
            return self._other_class(module, path)
        return bypass_problem(module, path) or self.contents_problem(module, found, inference, path)

    def _is_of_class(self, module: nn.Module) -> bool:
        if self.named is not None:
            return _is_named(module, *self.named)
        return self.kind is None or type(module) is self.kind

    def contents_problem(self, module: nn.Module, found: list[Any], inference: bool = False, path: str = "") -> str:
        """As `call_problem` for all but the module's own class and hooks, which are its caller's."""
        state = module.__dict__  # whose items cost a tenth of the module's attributes
        modules = state["_modules"]
        if self.only and len(modules) != len(self.children):
            return _of(path, f"has {len(modules)} modules, not {len(self.children)}")
        if inference and self.by_mode and state["training"]:
            return _of(path, "is in training mode")
        problem = self._setting_problem(state, path)
        if problem:
            return problem
        for name, allowed in self.changeable.items():
            if state.get(name) not in allowed:
                return _of(path, f"has {name} {state.get(name)!r}, not {allowed[0]!r}")
        if self.itself is not None:
            found.append(module)
        for name, held in self.tensors.items():
            tensor = state["_buffers" if held.buffer else "_parameters"].get(name)
            if tensor is None and not held.optional:
                return _of(path, self.says.get(name, f"has no {name}"))
            found.append(tensor)
        for name, setting in self.takes.items():
            value = state[name] if name in state else getattr(module, name, setting.default)
            if value is None:
                return _of(path, f"has no {name}")
            found.append(value)
        for name, pattern in self.children.items():
            if modules.get(name) is None:
                return _of(path, self._missing(name, modules))
            problem = pattern.call_problem(modules[name], found, inference, _child(path, name))
            if problem:
                return problem
        return ""

    def settings_fit(self, module: nn.Module) -> bool:
        """Whether a module of the pattern's kind is set up as it says, whatever its class and hooks."""
        return not self._setting_problem(module.__dict__, "")

    def _setting_problem(self, state: dict[str, Any], path: str) -> str:
        for name in self.absent:
            if state["_parameters"].get(name) is not None:
                return _of(path, f"has a {name}")
        for name, allowed in self.settings.items():
            if state.get(name) not in allowed:
                return _of(path, self.says.get(name, f"has {name} {state.get(name)!r}, not {allowed[0]!r}"))
        for name in self.same[1:]:
            other = self.same[0]
            if state[name] != state[other]:
                return _of(path, f"has {other} {state[other]} and {name} {state[name]}, which should be equal")
        return ""

    # ---- once ------------------------------------------------------------------------------------------------------

    def structure_problem(self, module: nn.Module, sizes: dict[str, int], path: str = "") -> str:
        """Why a module that has the names of the pattern is not what it says; empty where it is.

        `sizes`: what the names of sizes stand for, to be filled in.
        """
        if not isinstance(module, nn.Module):
            return _of(path, f"is {type(module).__name__}, not a module")
        if self.one_of or (self.fast and path):
            return ""
        if self.kind is not None and not self.fast and not isinstance(module, self.kind):
            return self._other_class(module, path)
        modules = vars(module)["_modules"]
        if self.only and len(modules) != len(self.children):
            return _of(path, f"has {len(modules)} modules, not {len(self.children)}")
        problem = self._setting_problem(vars(module), path) or self._size_problem(module, sizes, path)
        if problem:
            return problem
        for name, child in self.children.items():
            # By getattr: a module of an unknown class may keep it as something else, which its reason then says.
            found = getattr(module, name, None)
            if found is None:
                return _of(path, self._missing(name, modules))
            problem = child.structure_problem(found, sizes, _child(path, name))
            if problem:
                return problem
        return ""

    def _size_problem(self, module: nn.Module, sizes: dict[str, int], path: str) -> str:
        for name, size in self.sizes.items():
            value = getattr(module, name)
            expected = _expected(size, value, sizes)
            if value != expected:
                return _of(path, f"has {name} {value}, not {expected}")
        for name, held in self.tensors.items():
            if held.shape is None:
                continue
            tensor = getattr(module, name, None)
            if not isinstance(tensor, Tensor):
                return _of(path, self.says.get(name, f"has no {name}"))
            shape = tuple(tensor.shape)
            same_rank = len(shape) == len(held.shape)
            if not same_rank or shape != tuple(_expected(s, n, sizes) for s, n in zip(held.shape, shape, strict=True)):
                known = [s if isinstance(s, int) else _expected(s, s, sizes) for s in held.shape]
                wanted = f"({', '.join(map(str, known))}{',' if len(known) == 1 else ''})"
                return _of(_child(path, name), f"is {shape}, not of shape {wanted}")
        return ""

    # ---- reasons ---------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        if self.one_of:
            return " or ".join(dict.fromkeys(other._name() for other in self.one_of))
        if self.named is not None:
            return self.named[0]
        return "a module" if self.kind is None else self.kind.__name__

    def _other_class(self, module: object, path: str) -> str:
        origin = "mirage.fast." if self.fast else ""
        return _of(path, f"is {type(module).__name__}, not {origin}{self._name()}")

    def names_of(self, child: str) -> tuple[str, ...]:
        """The names under which a child may be there."""
        return (child, self.instead[child][0]) if child in self.instead else (child,)

    def _missing(self, name: str, modules: Mapping[str, nn.Module | None]) -> str:
        other, meaning = self.instead.get(name, ("", ""))
        return meaning if other in modules else f"has no {name}"


def bypass_problem(module: nn.Module, path: str = "") -> str:
    """Why calling a module is not its class's forward on the weights it holds: hooks, parametrizations, a forward of
    the instance."""
    state = module.__dict__
    if "forward" in state:
        return _of(path, "has a forward of its own")
    if "parametrizations" in state["_modules"]:
        return _of(path, "is parametrized")
    for name in HOOKS:
        if state[name]:
            return _of(path, "has hooks")
    return ""


def is_plain_inference() -> bool:
    """Whether no gradient is wanted and nobody compiles: nothing but the results is seen, so that tensors may be let
    go of early, and steps may depend on sizes."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_bypassable(module: nn.Module) -> bool:
    """True where calling the module is the same as using its weights."""
    return not bypass_problem(module)


def _is_named(module: nn.Module, name: str, attributes: tuple[str, ...]) -> bool:
    if type(module).__name__ != name:
        return False
    state = module.__dict__
    return all(a in state or hasattr(type(module), a) for a in attributes)


def _of(path: str, what: str) -> str:
    return f"{path} {what}" if path else f"it {what}"


def _child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _expected(size: Size, value: Any, sizes: dict[str, int]) -> Any:
    """What the size is; where its name stands for nothing yet, what makes `value` right, if anything does."""
    if isinstance(size, int):
        return size
    factor, name = (1, size) if isinstance(size, str) else size
    if name not in sizes:
        if not isinstance(value, int) or value % factor:
            return f"a multiple of {factor}" if factor > 1 else name
        sizes[name] = value // factor
    return factor * sizes[name]
