"""What is true of an operator, said once: each operator's folder has a ``cases.py`` that defines ``CASES``, which its
``op.py`` registers together with the functions.

Tests, ``mirage doctor``, benchmarks and the compilation of Triton's kernels iterate over :func:`operators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirage_kernels._runtime.implementations import KERNELS

Shape = tuple[int, ...]
"""What an operator's `make` takes: [B, C, H, W] of its main argument, and what else says how large the others are."""

DIMS = {"tiny": 24, "small": 30}
"""Channels of the first level of MIRAGE-T and MIRAGE-S."""


class Level(NamedTuple):
    """A kind of block: the channels and size of the maps it works on, and its heads."""

    channels: int
    heads: int
    height: int
    width: int


def levels(dim: int, height: int, width: int) -> list[Level]:
    """Every kind of block of MIRAGE with `dim` channels on its first level, for an image of height x width."""
    return [
        Level(dim, 1, height, width),
        Level(2 * dim, 1, height, width),  # decoder level 1 and refinement
        Level(2 * dim, 2, height // 2, width // 2),
        Level(4 * dim, 4, height // 4, width // 4),
        Level(8 * dim, 8, height // 8, width // 8),
    ]


LARGER = (Level(96, 4, 224, 224), Level(192, 8, 64, 64))
"""Kinds of block of larger images, for which Triton's kernels of stages are compiled too."""


def at_levels(shape: Callable[[Level], Shape]) -> Callable[[int, int], list[Shape]]:
    """The shapes of an operator that every block of a network calls, from its shape in one block."""
    return lambda dim, size: [shape(level) for level in levels(dim, size, size)]


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _directly(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


@dataclass(frozen=True)
class Operator:
    """A public operator of mirage_kernels, or one of its modes, as a function of tensors that have gradients.

    Attributes:
        name: of the public function and of its folder.
        arguments: names of its tensor arguments, in order.
        make: ``make(shape, generator)``, the arguments in float64; neither easy nor ill-conditioned.
        shapes: small ones for tests: the first typical, others with sizes of one, odd and prime ones, several samples.
        empty: a shape without samples.
        large: one of about a million pixels.
        in_network: ``in_network(dim, size)``, the shapes that MIRAGE with `dim` channels on its first level gives it on
            an image of size x size; for operators at each level, in the order of :func:`levels`.
        flops: of forward, two for a multiply-add, from the shapes of the arguments: products and convolutions of the
            reference, as `torch.utils.flop_counter` counts them. Backward has twice as many, one for each factor.
        call: calls a function like the public one on the arguments; returns one tensor.
        declined: the implementations that it lacks, each with the reason.
        mode: which of several modes of one function this is.
        compiled: shapes for which Triton's kernels are compiled beside those of the networks.
        is_stage: whether it is half a block of the network, or more: slow in Triton's interpreter.
        is_chain_on_gpus: whether its implementations for GPUs are those of other operators, one after the other.
        gradients: whether its kernels have a backward pass. Where they have not, it is others one after the other.
    """

    name: str
    arguments: tuple[str, ...]
    make: Callable[[Any, torch.Generator], tuple[Tensor, ...]]
    shapes: tuple[Shape, ...]
    empty: Shape
    large: Shape
    in_network: Callable[[int, int], list[Shape]]
    flops: Callable[..., int]
    call: Callable[..., Tensor] = _directly
    declined: Mapping[str, str] = field(default_factory=dict, hash=False)
    mode: str = ""
    compiled: tuple[Shape, ...] = ()
    is_stage: bool = False
    is_chain_on_gpus: bool = False
    gradients: bool = True

    @property
    def implementations(self) -> tuple[str, ...]:
        """Those of its own that it has, beside ``"torch"``."""
        return tuple(name for name in KERNELS if name not in self.declined)

    def public(self, *tensors: Tensor) -> Tensor:
        """The public function."""
        return self.call(REGISTERED[self.name][1][0], *tensors)

    def reference(self, *tensors: Tensor) -> Tensor:
        """Its definition in plain PyTorch."""
        return self.call(REGISTERED[self.name][1][1], *tensors)

    def inputs(self, shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        """The arguments, each requiring its gradient; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return [t.to(dtype=dtype, device=device).requires_grad_() for t in self.make(shape, generator)]

    def without_memory(self, shape: Shape, dtype: torch.dtype = torch.float32, far: bool = False) -> list[Tensor]:
        """The arguments on the meta device. `far`: the channels of the first 2^31 elements apart."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            shapes = [t.shape for t in self.make(shape, torch.Generator())]
        tensors = [torch.empty(s, dtype=dtype, device="meta") for s in shapes]
        if far:
            strides = (2**31 * shapes[0][1], 2**31, *tensors[0].stride()[2:])
            tensors[0] = torch.empty_strided(shapes[0], strides, dtype=dtype, device="meta")
        return tensors

    def macs(self, shape: Shape, both: bool = False) -> int:
        """Multiply-adds of forward, or of forward and backward; what backward recomputes is not counted."""
        return self.flops(*(t.shape for t in self.without_memory(shape))) // 2 * (3 if both else 1)

    def nbytes(self, shape: Shape, both: bool = False, dtype: torch.dtype = torch.float32) -> int:
        """The least that forward reads and writes: arguments in and result out. With backward also: the arguments and
        the gradient of the result in, the gradients of the arguments out."""
        tensors = self.without_memory(shape, dtype)
        arguments, result = sum(t.nbytes for t in tensors), self.reference(*tensors).nbytes
        return 3 * arguments + 2 * result if both else arguments + result


Functions = tuple[Callable[..., Any], Callable[..., Any]]
REGISTERED: dict[str, tuple[tuple[Operator, ...], Functions]] = {}
"""By name: an operator's cases, its public function and its reference. Each ``op.py`` registers its own."""


def register(cases: tuple[Operator, ...], public: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Make an operator known to all that iterate over :func:`operators`; `cases` are its modes, of one name."""
    (name,) = {case.name for case in cases}
    REGISTERED[name] = cases, (public, reference)


def operators(names: Iterable[str] | None = None) -> list[Operator]:
    """Every operator and each of its modes, by name, or those of `names`.

    Raises:
        ValueError: one of `names` is none of an operator.
    """
    chosen = sorted(REGISTERED) if names is None else list(names)
    for name in chosen:
        if name not in REGISTERED:
            raise ValueError(f"no operator {name!r}; there are {', '.join(sorted(REGISTERED))}")
    return [operator for name in chosen for operator in REGISTERED[name][0]]


def pixels(shape: Iterable[int]) -> int:
    """B H W of [B, C, H, W]."""
    batch, _, *size = shape
    return batch * math.prod(size)
