"""What a block looks like whose children the stages replace, told in one call of the C++ library.

`plain` answers the same questions in Python and has the last word: a pattern that does not match says nothing, one that
does says that `plain` would have found the modules plain. A network of 35 blocks asks them in every forward, each time
after kernels that have filled the caches with something else (see docs/performance.md, "The price of a call").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from mirage_kernels._runtime import dispatch

_OWN = ""  # the dictionary of the module itself


@dataclass(frozen=True)
class Pattern:
    """A module of one of `types` (of any where there are none), called as its class says (`bare`: without hooks or
    parametrizations), with `attributes` of one of the values given, without the parameters in `absent`, and with
    `children`, `only` with those. `takes` names what to hand out: for each name a dictionary of the module
    ("_parameters", "_buffers", "_modules", or "" for its own) and a key; None there is no match."""

    types: tuple[type[nn.Module], ...] = ()
    bare: bool = True
    attributes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    takes: dict[str, tuple[str, str]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    children: dict[str, Pattern] = field(default_factory=dict)
    only: bool = False

    def names(self) -> Iterator[str]:
        """What `matcher` finds, in its order."""
        yield from self.takes
        for child in self.children.values():
            yield from child.names()

    def native(self) -> Any:
        children = [(name, child.native()) for name, child in self.children.items()]
        return dispatch.native.ModulePattern(
            types=list(self.types),
            bare=self.bare,
            attributes=list(self.attributes.items()),
            slots=list(self.takes.values()),
            absent=list(self.absent),
            children=children,
            only=self.only,
        )


def matcher(pattern: Pattern, wanted: Sequence[str]) -> Callable[[nn.Module], tuple[Any, ...] | None]:
    """A function of a module that returns what is `wanted` of `takes`, in that order; None where the module does not
    match, while compiling, and without the C++ library."""
    if dispatch.native is None:
        return lambda module: None
    names = list(pattern.names())
    pick, match = itemgetter(*map(names.index, wanted)), pattern.native().match

    def run(module: nn.Module) -> tuple[Any, ...] | None:
        if torch.compiler.is_compiling():
            return None
        found = match(module)
        return None if found is None else pick(found)

    return run


def weight(name: str) -> dict[str, tuple[str, str]]:
    return {name: ("_parameters", "weight")}


def attribute(name: str, key: str) -> dict[str, tuple[str, str]]:
    return {name: (_OWN, key)}


def convolution(
    takes: dict[str, tuple[str, str]], size: int = 1, kind: type[nn.Module] = nn.Conv2d, dense: bool = True
) -> Pattern:
    """The bias-free, stride-1, zero-padded, same-size convolution; of any number of groups where it is not `dense`."""
    dims = 1 if kind is nn.Conv1d else 2
    attributes: dict[str, tuple[Any, ...]] = {
        "kernel_size": ((size,) * dims,),
        "padding": ((size // 2,) * dims,),
        "stride": ((1,) * dims,),
        "dilation": ((1,) * dims,),
        "padding_mode": ("zeros",),
    }
    if dense:
        attributes["groups"] = (1,)
    return Pattern((kind,), attributes=attributes, takes=takes, absent=("bias",))


GELU = Pattern((nn.GELU,), attributes={"approximate": ("none",)})
GLOBAL_AVERAGE = Pattern((nn.AdaptiveAvgPool2d,), attributes={"output_size": (1, (1, 1))})


def sequence(*modules: Pattern) -> Pattern:
    return Pattern((nn.Sequential,), children={str(i): m for i, m in enumerate(modules)}, only=True)
