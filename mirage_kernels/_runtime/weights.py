"""A stage's weights, described where their tuple is declared: shapes, schema, FLOPs and test values follow from it.

    C, c, h = sizes("C c h")

    class StageWeights(NamedTuple):
        norm_weight: Annotated[Tensor, Weight(C, around=1)]
        norm_bias: Annotated[Tensor | None, Weight(C, optional=True)]
        expand: Annotated[Tensor, Weight(2 * h, c, 1, 1, per="pixel")]
        bn_mean: Annotated[Tensor, Weight(c, learned=False)]

    STAGE = Description(StageWeights)

The order of the fields is that of the operator's schema and of the list in csrc (``MIRAGE_..._WEIGHTS``), from which
structs, checks and bindings of C++ follow; an ``optional=True`` is an OPTIONAL there. Where it is absent it is None in
the tuple and in lists of tensors, and its gradient is None. An operator cannot return None: its backward returns a
tensor of shape [0] (:func:`in_own_dtypes`, :func:`like`), which its autograd replaces (:func:`of_given`).
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """A multiple of a size that a call has, such as ``2 * h``."""

    symbol: str
    factor: int = 1

    def __rmul__(self, factor: int) -> Size:
        return Size(self.symbol, factor * self.factor)

    def __str__(self) -> str:
        return self.symbol if self.factor == 1 else f"{self.factor} * {self.symbol}"


def sizes(symbols: str) -> tuple[Size, ...]:
    """The sizes that shapes of weights are made of, by name."""
    return tuple(map(Size, symbols.split()))


@dataclass(frozen=True, init=False)
class Weight:
    """What is true of one weight."""

    shape: tuple[Size | int, ...]
    per: str | None  # "pixel" or "sample": each of these is multiplied by the whole weight once
    learned: bool  # whether it has a gradient
    around: float  # the mean of ordinary values
    optional: bool  # whether it may be None

    def __init__(
        self,
        *shape: Size | int,
        per: str | None = None,
        learned: bool = True,
        around: float = 0.0,
        optional: bool = False,
    ) -> None:
        values = {"shape": shape, "per": per, "learned": learned, "around": around, "optional": optional}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def source(self) -> str:
        """The shape as Python writes it."""
        return f"({', '.join(map(str, self.shape))},)"


Given = TypeVar("Given", Tensor, Tensor | None)


def empty_gradients(weights: Iterable[Given], dtype: torch.dtype) -> list[Given]:
    """Memory for a kernel to write the gradients of `weights` to: contiguous, of `dtype`; None for None."""
    return [None if w is None else torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]


def no_gradient(like: Tensor) -> Tensor:
    """What the backward of an operator returns for a weight that is absent."""
    return like.new_empty(0)


def in_own_dtypes(grads: Iterable[Tensor | None], weights: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """Each gradient in the dtype of its weight; [0] in the place of None."""
    first = next(w for w in weights if w is not None)
    for grad, weight in zip(grads, weights, strict=True):
        yield no_gradient(first) if grad is None or weight is None else grad.to(weight.dtype)


def like(weights: Sequence[Tensor | None]) -> list[Tensor]:
    """What :func:`in_own_dtypes` gives for `weights`, without values: for the fake of a backward."""
    first = next(w for w in weights if w is not None)
    return [no_gradient(first) if w is None else w.new_empty(w.shape) for w in weights]


def of_given(grads: Iterable[Tensor], weights: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The gradients that a backward returned, None for weights that are None: what autograd takes."""
    return [None if weight is None else grad for grad, weight in zip(grads, weights, strict=True)]


def capsules(weights: Iterable[Tensor | None]) -> list[Any]:
    """Weights as the C++ library takes a list of them: contiguous, as DLPack capsules; None for None."""
    return [None if w is None else torch._C._to_dlpack(w.contiguous()) for w in weights]


class Description:
    """What the fields of a NamedTuple of weights say, read once."""

    def __init__(self, weights: Any) -> None:
        hints = typing.get_type_hints(weights, include_extras=True)
        self.weights: dict[str, Weight] = {name: hints[name].__metadata__[0] for name in weights._fields}
        symbols = {n.symbol for weight in self.weights.values() for n in weight.shape if isinstance(n, Size)}
        shapes = ", ".join(f"{name!r}: {weight.source()}" for name, weight in self.weights.items())
        # Compiled, since every call of a stage asks: 4 microseconds for 21 weights, where a loop takes 40.
        self.shapes: Callable[..., dict[str, tuple[int, ...]]] = eval(f"lambda *, {', '.join(symbols)}: {{{shapes}}}")
        """The shape of each weight by name, for sizes given by symbol."""
        self.learned = tuple(name for name, weight in self.weights.items() if weight.learned)
        """The names of the weights that have gradients, in order."""
        self.schema = ", ".join(f"Tensor{'?' * w.optional} {name}" for name, w in self.weights.items())
        """The weights as arguments of an operator."""
        self.optional = frozenset(name for name, weight in self.weights.items() if weight.optional)
        """The names of the weights that may be None."""

    def multiply_adds(self, shapes: Sequence[Sequence[int] | None], per: str) -> int:
        """Of the products with all weights, which have `shapes`, for one pixel or sample: one for each element."""
        pairs = zip(self.weights.values(), shapes, strict=True)
        return sum(math.prod(shape) for weight, shape in pairs if weight.per == per and shape is not None)

    def ordinary(self, generator: torch.Generator, without: Collection[str] = (), **values: int) -> dict[str, Tensor]:
        """Values as in a trained network for the weights that have gradients, in float64: matrices such that a product
        keeps the size of what it multiplies, other weights near what :class:`Weight` says. `without`: left out."""
        found: dict[str, Tensor] = {}
        shapes = self.shapes(**values)
        for name in self.learned:
            if name in without:
                continue
            weight, shape = self.weights[name], shapes[name]
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            is_product = weight.per is not None
            found[name] = noise / math.prod(shape[1:]) ** 0.5 if is_product else weight.around + 0.2 * noise
        return found
