"""What all degradations have in common: ranges, draws, records, and batches in and out."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Applied", "Degradation", "Images", "Maps", "Range", "apply", "as_generator", "draw_seed", "draw_uniform",
           "draw_whole", "field_generator", "ranged", "register", "registered", "rounded_to_8_bits"]  # fmt: skip

Images = TypeVar("Images", Tensor, np.ndarray)
Range = tuple[float, float]
"""Smallest and largest value of a parameter that is drawn; equal where it is fixed. A number stands for both."""
Maps = Mapping[str, Any]
"""Further images of a scene by name (``depth``, ``illumination``, ``rain``, ``snow``), ``[N, 1, H, W]`` in [0, 1]."""

MAPS = ("depth", "illumination", "rain", "snow")
LARGEST = 1e-4  # that values may lie outside of [0, 1], by the rounding of whatever made them
SEEDS = 2**53  # whole numbers below are exact in JSON, whoever reads it

_REGISTRY: dict[str, type[Degradation]] = {}


@dataclass(frozen=True)
class Applied:
    """What was drawn for one image: everything that its degradation depends on besides the image and given maps.

    Attributes:
        kind: id of the degradation, such as ``"GB"``; of a composition, the ids with ``+`` between them.
        values: the parameters by name: numbers, texts and lists, as JSON has them. ``seed`` is that of a field of
            random numbers, such as noise, one for each pixel.
        rounded: the result was rounded to 8 bits.
    """

    kind: str
    values: Mapping[str, Any]
    rounded: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return {"kind": self.kind, **self.values, "rounded": self.rounded}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Applied:
        """The inverse of `as_dict`.

        Raises:
            ValueError: there is no ``kind``.
        """
        values = dict(record)
        try:
            return cls(values.pop("kind"), values, values.pop("rounded", True))
        except KeyError as error:
            raise ValueError(f"record: expected a kind, got {sorted(record)}") from error


def ranged(low: float, high: float, *, least: float = -math.inf, most: float = math.inf, whole: bool = False) -> Any:
    """A field that holds a `Range`: its default, and what its values may be at all."""
    return field(default=(low, high), metadata={"least": least, "most": most, "whole": whole})


@dataclass(frozen=True)
class Degradation(ABC):
    """A kind of degradation with ranges for its parameters. Calling it degrades a batch.

    Args:
        rounded: round the result to 8 bits; it is clipped to [0, 1] in any case.
    """

    id: ClassVar[str] = ""
    name: ClassVar[str] = ""
    takes: ClassVar[tuple[str, ...]] = ()  # the maps that it reads, where they are given

    rounded: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if "least" in each.metadata:
                object.__setattr__(self, each.name, _range(self, each))

    @property
    def kind(self) -> str:
        """The id that records of it have."""
        return self.id

    @property
    def label(self) -> str:
        """The long name, for people and folders."""
        return self.name

    def __call__(
        self, images: Images, generator: torch.Generator | int, maps: Maps | None = None
    ) -> tuple[Images, list[Applied]]:
        """Degrade each image of a batch by parameters of its own.

        The parameters are drawn image by image, so a batch gets what its images get one by one, to the last bit. On
        the CPU results depend on the generator's state alone. A generator of the CPU draws the same parameters, lines,
        rain, snow and depth for images on a GPU; noise is drawn where the images are, and differs between kinds of
        devices.

        Args:
            images: ``[N, 3, H, W]`` RGB in [0, 1], float32 or float64: a tensor on any device, or a NumPy array.
            generator: what everything is drawn from, or a seed for a new one on the CPU.
            maps: what the scene's depth, illumination and so on are, for the kinds that take them (`takes`); those
                that are not given are made up.

        Returns:
            The degraded images (shape, dtype, device and library of ``images``), and a record for each of them.

        Raises:
            TypeError: ``images`` or a map is neither tensor nor array, or of another dtype.
            ValueError: another shape, or values outside of [0, 1].
        """
        batch = _batch(images)
        random = as_generator(generator)
        height, width = batch.shape[2:]
        applied = [self.draw(height, width, random) for _ in range(len(batch))]
        return _as(images, _applied_to(batch, applied, maps)), applied

    def draw(self, height: int, width: int, generator: torch.Generator) -> Applied:
        """The record of an image of this size: everything that is random."""
        return Applied(self.kind, self.draw_values(height, width, generator), self.rounded)

    @abstractmethod
    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        """The parameters of one image, those without a range included."""

    @staticmethod
    @abstractmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        """``image``, ``[3, H, W]``, degraded by parameters of `draw_values`; neither clipped nor rounded."""


Kind = TypeVar("Kind", bound=type[Degradation])


def register(cls: Kind) -> Kind:
    """Enter a class by its id."""
    _REGISTRY[cls.id] = cls
    return cls


def registered() -> dict[str, type[Degradation]]:
    """The classes by id."""
    return _REGISTRY


def apply(images: Images, applied: Sequence[Applied], maps: Maps | None = None) -> Images:
    """Degrade a batch by what its records say: repeats a call of a degradation, on the same kind of device to the bit.

    Args:
        images, maps: as of calling a `Degradation`.
        applied: a record for each image; their kinds may differ.

    Raises:
        TypeError, ValueError: as there; or another number of records, or a kind that is none.
    """
    batch = _batch(images)
    if len(applied) != len(batch):
        raise ValueError(f"applied: expected a record for each of {len(batch)} images, got {len(applied)}")
    return _as(images, _applied_to(batch, applied, maps))


@torch.no_grad()
def _applied_to(batch: Tensor, applied: Sequence[Applied], maps: Maps | None) -> Tensor:
    unknown = [name for name in maps or {} if name not in MAPS]
    if unknown:
        raise ValueError(f"maps: expected some of {', '.join(MAPS)}, got {unknown[0]!r}")
    given = {name: _map(name, values, batch) for name, values in (maps or {}).items()}
    results = torch.empty_like(batch)
    for i, one in enumerate(applied):
        own = {name: values[i] for name, values in given.items()}
        result = degrade_one(batch[i], one.kind, one.values, own)
        results[i] = rounded_to_8_bits(result) if one.rounded else result.clamp(0, 1)
    return results


def degrade_one(image: Tensor, kind: str, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
    """``image``, ``[3, H, W]``, after one step or, for a composition, after all of them, clipped between them."""
    steps = values.get("steps")
    if steps is not None:
        for step in steps:
            image = degrade_one(image, step["kind"], step, maps).clamp(0, 1)
        return image
    if kind not in _REGISTRY:
        raise ValueError(f"kind: expected one of {', '.join(_REGISTRY)}, got {kind!r}")
    return _REGISTRY[kind].degrade(image, values, maps)


def rounded_to_8_bits(images: Tensor) -> Tensor:
    """Clipped to [0, 1] and rounded to multiples of 1/255, half to even as NumPy does."""
    # a scalar would be multiplied by its reciprocal on GPUs, which is one bit off what others make of 8-bit pixels
    return (images.clamp(0, 1) * 255).round() / torch.full((), 255.0, dtype=images.dtype, device=images.device)


def as_generator(generator: torch.Generator | int) -> torch.Generator:
    """A generator, or a new one of the CPU with this seed.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        return torch.Generator().manual_seed(int(generator))
    raise TypeError(f"generator: expected a torch.Generator or a seed, got {type(generator).__name__}")


def draw_uniform(generator: torch.Generator, bounds: Range) -> float:
    """A number of a range, every one as likely."""
    low, high = bounds
    unit = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).item()
    return low + (high - low) * unit


def draw_whole(generator: torch.Generator, bounds: Range) -> int:
    """A whole number of a range, both ends included."""
    low, high = (int(bound) for bound in bounds)
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device).item())


def draw_seed(generator: torch.Generator) -> int:
    """A seed for a field of random numbers."""
    return int(torch.randint(SEEDS, (), generator=generator, device=generator.device).item())


def field_generator(seed: int, like: Tensor) -> torch.Generator:
    """The generator of a field of random numbers, on the device of the image that it is for."""
    return torch.Generator(like.device).manual_seed(seed)


def _range(owner: Degradation, of: dataclasses.Field[Any]) -> Range:
    given, least, most = getattr(owner, of.name), of.metadata["least"], of.metadata["most"]
    bounds = list(given) if isinstance(given, (list, tuple)) else [given, given]
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in bounds)
    whole = of.metadata["whole"]
    if (
        not numbers
        or len(bounds) != 2
        or not least <= bounds[0] <= bounds[1] <= most
        or not all(math.isfinite(each) for each in bounds)
        or (whole and any(each != int(each) for each in bounds))
    ):
        limits = f" within [{least:g}, {most:g}]" if math.isfinite(least) or math.isfinite(most) else ""
        what = "whole numbers" if whole else "numbers"
        raise ValueError(f"{of.name}: expected a range (low, high) of {what}{limits}, got {given!r}")
    return (int(bounds[0]), int(bounds[1])) if whole else (float(bounds[0]), float(bounds[1]))


def _batch(images: Any) -> Tensor:
    batch = _tensor("images", images)
    if batch.ndim != 4 or batch.shape[1] != 3 or 0 in batch.shape[2:]:
        raise ValueError(f"images: expected [N, 3, H, W], got {list(batch.shape)}")
    _check_values("images", batch)
    return batch


def _map(name: str, values: Any, batch: Tensor) -> Tensor:
    given = _tensor(f"maps[{name!r}]", values)
    expected = [len(batch), 1, *batch.shape[2:]]
    if list(given.shape) != expected:
        raise ValueError(f"maps[{name!r}]: expected {expected}, got {list(given.shape)}")
    _check_values(f"maps[{name!r}]", given)
    return given.to(batch)


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, np.ndarray):
        if values.dtype not in (np.float32, np.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {values.dtype}")
        return torch.from_numpy(np.ascontiguousarray(values))
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor or a NumPy array, got {type(values).__name__}")
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {str(values.dtype).removeprefix('torch.')}")
    return values.detach()


def _check_values(name: str, values: Tensor) -> None:
    """Images of 0 to 255 would be clipped to white, and one that is no number spreads."""
    if values.numel():
        low, high = (each.item() for each in values.aminmax())
        if not (low >= -LARGEST and high <= 1 + LARGEST):
            raise ValueError(f"{name}: expected values in [0, 1], got {low:g} to {high:g}")


def _as(images: Any, results: Tensor) -> Any:
    return results.numpy() if isinstance(images, np.ndarray) else results
