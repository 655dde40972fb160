"""Patterns as a forward asks them: do a block's children match, and where are the weights that an operator takes?

The C++ library walks the modules' dictionaries in one call for all blocks of a level
(csrc/python/bind_module_pattern.cpp): a network of 35 blocks is asked in every forward, each time after kernels that
have filled the caches with something else (see docs/performance.md, "The price of a call"). Without the library, and
while compiling, Python asks the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn

from mirage.fast.recognise.pattern import Held, Pattern
from mirage_kernels._runtime import dispatch

OPTIONAL = "optional"
"""Marks a tensor that may not be there, where the C++ library takes what a missing setting is."""


def _native(pattern: Pattern) -> Any:
    """The pattern as the C++ library asks it: what concerns structure alone is left out."""
    native = dispatch.native.ModulePattern
    slots: list[tuple[str, str, Any]] = [] if pattern.itself is None else [(native.ITSELF, "", None)]
    for name, held in pattern.tensors.items():
        slots.append(("_buffers" if held.buffer else "_parameters", name, OPTIONAL if held.optional else None))
    slots += [(native.SETTING, name, setting.default) for name, setting in pattern.takes.items()]
    return native(
        type=pattern.kind,
        named=pattern.named,
        one_of=[_native(p) for p in pattern.one_of],
        settings=list({**pattern.settings, **pattern.changeable}.items()),
        same=list(pattern.same),
        slots=slots,
        absent=list(pattern.absent),
        by_mode=pattern.by_mode,
        children=[(name, _native(child)) for name, child in pattern.children.items()],
        only=pattern.only,
    )


def _asked_in_cpp() -> bool:
    """An extension that was built from older sources, as in a checkout that has moved on, has no such classes."""
    return not torch.compiler.is_compiling() and hasattr(dispatch.native, "BlockPattern")


class Stage:
    """An operator that stands in for some children of a block.

    Args:
        operator: Its name, for people.
        children: What they have to be; the block itself is being called, so its class and hooks are its caller's.
        weights: Fields of the children that the operator takes as weights, in its order.
        numbers: Fields that it takes as numbers.
        others: Fields that whoever calls the operator needs besides.
        fixed: What follows from there being a match: handed out after all fields.
        tensors: Parameters of the block itself that belong to it.
    """

    def __init__(
        self,
        operator: str,
        children: dict[str, Pattern],
        weights: Sequence[str],
        numbers: Sequence[str],
        others: Sequence[str] = (),
        fixed: tuple[Any, ...] = (),
        tensors: Mapping[str, Held] | None = None,
    ) -> None:
        self.operator, self.fixed = operator, fixed
        self.pattern = Pattern(children=children, tensors=tensors or {})
        self.weights, self.numbers = tuple(weights), tuple(numbers)
        fields = list(self.pattern.fields())
        self.order = [fields.index(name) for name in (*weights, *numbers, *others)]
        self._tensors, self._known = len(self.weights), len(self.weights) + len(self.numbers)

    def match(self, block: nn.Module, inference: bool = False) -> tuple[Any, ...] | None:
        """Weights, numbers and others, in order, and what is fixed; None where the children have to be called.

        `inference`: also where what they compute depends on the batch.
        """
        if _asked_in_cpp():
            matched: tuple[Any, ...] | None = self.native.match(block, inference)
            return matched if matched is None else matched + self.fixed
        found: list[Any] = []
        if self.pattern.contents_problem(block, found, inference):
            return None
        return tuple([found[i] for i in self.order]) + self.fixed

    def problem(self, block: nn.Module) -> str:
        """Why `match` finds nothing; empty where it does."""
        return self.pattern.contents_problem(block, [])

    @cached_property
    def native(self) -> Any:
        return dispatch.native.StagePattern(_native(self.pattern), self.order, self._tensors, self._known)


class FirstOf:
    """Stages of one operator for children of several kinds: the first that matches."""

    def __init__(self, *stages: Stage) -> None:
        self.stages, self.operator = stages, stages[0].operator

    def match(self, block: nn.Module, inference: bool = False) -> tuple[Any, ...] | None:
        """See `Stage.match`."""
        for stage in self.stages:
            found = stage.match(block, inference)
            if found is not None:
                return found
        return None

    def problem(self, block: nn.Module) -> str:
        """Why none matches, in the words of the first; empty where one does."""
        problems = [stage.problem(block) for stage in self.stages]
        return "" if "" in problems else problems[0]


@dataclass(frozen=True)
class Half:
    """Half a block, x + branch(norm(x)): how its operator is run, or its children where it does not match.

    Attributes:
        norm, branch: Names of the children, with dots where they are children of those. A branch may also be a function
            of the block and the norm's result.
        stage: When an operator stands in for them, and what it takes. None as long as there is no such operator.
        run: `run(block, x, found)` calls it; `found` as of `Stage.match`.
    """

    norm: str
    branch: str | Callable[[Any, Tensor], Tensor]
    stage: Stage | FirstOf | None = None
    run: Callable[[nn.Module, Tensor, tuple[Any, ...]], Tensor] | None = None

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.stage is not None and self.run is not None:
            found = self.stage.match(block)
            if found is not None:
                return self.run(block, x, found)
        return self.call(block, x)

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """By its modules."""
        normal = _child(block, self.norm)(x)
        return x + (_child(block, self.branch)(normal) if isinstance(self.branch, str) else self.branch(block, normal))


def _child(block: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), block)


class BlockMatcher:
    """All stages of blocks of one class, as one operator runs them where nothing depends on the batch.

    Args:
        block: The class.
        stages: In the order in which the operator takes them.
        run: The operator, of x and the weights and numbers of all blocks that are to run one after the other.
    """

    def __init__(
        self,
        block: type[nn.Module],
        stages: Sequence[Stage],
        run: Callable[[Tensor, list[Tensor], list[float]], Tensor],
    ) -> None:
        self.block, self.stages, self.run = Pattern(block, fast=True), tuple(stages), run

    def match(self, block: nn.Module) -> tuple[list[Tensor], list[float]] | None:
        """Weights and numbers of all stages; None where one of them has to call its modules."""
        count, weights, numbers = self.match_run([block], 0, called=True)
        return (weights, numbers) if count else None

    def match_run(
        self, modules: list[nn.Module], first: int, called: bool = False
    ) -> tuple[int, list[Tensor], list[float]]:
        """How many blocks from modules[first] on match, one after the other, and the weights and numbers of all.

        A block of another class or with hooks does not match, unless it is `called` already.
        """
        if _asked_in_cpp():
            return self.native.match_run(modules, first, called)
        weights: list[Tensor] = []
        numbers: list[float] = []
        for position in range(first, len(modules)):
            if not called and not self.block.fits(modules[position]):
                return position - first, weights, numbers
            halves = []
            for stage in self.stages:
                found = stage.match(modules[position], inference=True)
                if found is None:
                    return position - first, weights, numbers
                halves.append((stage, found))
            for stage, found in halves:
                weights += found[: stage._tensors]
                numbers += found[stage._tensors : stage._known]
        return len(modules) - first, weights, numbers

    @cached_property
    def native(self) -> Any:
        return dispatch.native.BlockPattern(_native(self.block), [stage.native for stage in self.stages])
