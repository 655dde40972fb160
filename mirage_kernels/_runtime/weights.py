"""A stage's weights, described where their tuple is declared: shapes, schema, FLOPs and test values follow from it.

    C, c, h = sizes("C c h")

    class StageWeights(NamedTuple):
        norm_weight: Annotated[Tensor, Weight(C, around=1)]
        expand: Annotated[Tensor, Weight(2 * h, c, 1, 1, per="pixel")]
        bn_mean: Annotated[Tensor, Weight(c, learned=False)]

    STAGE = Description(StageWeights)

The order of the fields is that of the operator's schema and of the list in csrc (``MIRAGE_..._WEIGHTS``), from which
structs, checks and bindings of C++ follow.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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

    def __init__(
        self, *shape: Size | int, per: str | None = None, learned: bool = True, around: float = 0.0
    ) -> None:
        for name, value in {"shape": shape, "per": per, "learned": learned, "around": around}.items():
            object.__setattr__(self, name, value)

    def source(self) -> str:
        """The shape as Python writes it."""
        return f"({', '.join(map(str, self.shape))},)"


def empty_gradients(weights: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Memory for a kernel to write the gradients of `weights` to: contiguous, of `dtype`."""
    return [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]


def in_own_dtypes(grads: Iterable[Tensor], weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each gradient in the dtype of its weight."""
    return (grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True))


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
        self.schema = ", ".join(f"Tensor {name}" for name in self.weights)
        """The weights as arguments of an operator."""

    def multiply_adds(self, shapes: Sequence[Sequence[int]], per: str) -> int:
        """Of the products with all weights, which have `shapes`, for one pixel or sample: one for each element."""
        pairs = zip(self.weights.values(), shapes, strict=True)
        return sum(math.prod(shape) for weight, shape in pairs if weight.per == per)

    def ordinary(self, generator: torch.Generator, **values: int) -> dict[str, Tensor]:
        """Values as in a trained network for the weights that have gradients, in float64: matrices such that a product
        keeps the size of what it multiplies, other weights near what :class:`Weight` says."""
        found: dict[str, Tensor] = {}
        shapes = self.shapes(**values)
        for name in self.learned:
            weight, shape = self.weights[name], shapes[name]
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            is_product = weight.per is not None
            found[name] = noise / math.prod(shape[1:]) ** 0.5 if is_product else weight.around + 0.2 * noise
        return found
