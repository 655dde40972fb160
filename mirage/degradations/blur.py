"""Blur and ringing: Gaussian, motion, defocus, the Richardson-Lucy artefact, and a sharp low-pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage.degradations.base import Degradation, Range, draw_uniform, draw_whole, ranged, register
from mirage.degradations.filters import convolve, offsets

__all__ = ["DefocusBlur", "GaussianBlur", "MotionBlur", "RichardsonLucy", "Ringing", "defocus_kernel",
           "gaussian_kernel", "motion_kernel", "ringing_kernel"]  # fmt: skip

SUBPIXELS = 64  # a side, over which the disc's part of a pixel is counted


def gaussian_kernel(sigma: float, size: int = 15) -> Tensor:
    """``exp(-r^2 / (2 sigma^2))`` at whole pixels, divided by its sum: float64 ``[size, size]``, ``size`` odd."""
    down, right = offsets(size // 2)
    kernel = torch.exp(-(down.square() + right.square()) / (2 * sigma**2))
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> Tensor:
    """A straight line through the centre, one pixel wide and ``length`` long, divided by its sum: float64 ``[k, k]``.

    Across, its edges are those of a tent of width 1; along, of a box. At an angle of 0 (along a row) and an odd length
    it is ``length`` equal taps.

    Args:
        angle: radians, from the columns' direction towards the rows'.
    """
    down, right = offsets(math.ceil(length / 2) + 1)
    along = down * math.sin(angle) + right * math.cos(angle)
    across = right * math.sin(angle) - down * math.cos(angle)
    kernel = (length / 2 - along.abs() + 0.5).clamp(0, 1) * (1 - across.abs()).clamp(min=0)
    return kernel / kernel.sum()


def defocus_kernel(radius: float) -> Tensor:
    """A disc: what part of each pixel it covers, divided by its sum: float64 ``[k, k]``."""
    reach = max(0, math.ceil(radius - 0.5))
    side = 2 * reach + 1
    places = (torch.arange(side * SUBPIXELS, dtype=torch.float64) + 0.5) / SUBPIXELS - side / 2
    inside = places[:, None].square() + places[None, :].square() <= radius**2
    kernel = inside.double().reshape(side, SUBPIXELS, side, SUBPIXELS).mean((1, 3))
    return kernel / kernel.sum()


def ringing_kernel(cutoff: float, size: int = 15) -> Tensor:
    """A circular ideal low-pass, ``w J1(w r) / (2 pi r)`` with ``w^2 / (4 pi)`` in the centre, divided by its sum:
    float64 ``[size, size]``, ``size`` odd.

    Args:
        cutoff: ``w``, in radians per pixel.
    """
    down, right = offsets(size // 2)
    r = torch.hypot(down, right)
    kernel = cutoff * _bessel_j1(cutoff * r) / (2 * math.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _bessel_j1(x: Tensor) -> Tensor:
    """``J1``, by the mean of ``cos(a - x sin a)`` over half a turn: exact but for rounding from some ``x`` points on.

    ``torch.special.bessel_j1`` is off by up to 5e-7, in float64 too.
    """
    count = 2 * math.ceil(float(x.max())) + 64
    turn = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    return torch.cos(turn - x[..., None] * torch.sin(turn)).mean(-1)


@register
@dataclass(frozen=True)
class GaussianBlur(Degradation):
    """Gaussian kernel of 15x15; borders mirrored.

    Args:
        sigma: standard deviation, in pixels. From 3 on the kernel's own size makes it a little less.
        size: side of the kernel, odd.
    """

    id = "GB"
    name = "gaussian_blur"
    sigma: Range = ranged(1, 4, least=1e-3, most=1e3)
    size: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("size", self.size)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"sigma": draw_uniform(generator, self.sigma), "size": self.size}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        return convolve(image, gaussian_kernel(values["sigma"], values["size"]))


@register
@dataclass(frozen=True)
class MotionBlur(Degradation):
    """A straight line of whole length, at any angle; borders mirrored.

    Args:
        length: in pixels, whole numbers.
        angle: in radians.
    """

    id = "MB"
    name = "motion_blur"
    length: Range = ranged(7, 25, least=1, most=1e4, whole=True)
    angle: Range = ranged(0, math.pi)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"length": draw_whole(generator, self.length), "angle": draw_uniform(generator, self.angle)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        return convolve(image, motion_kernel(values["length"], values["angle"]))


@register
@dataclass(frozen=True)
class DefocusBlur(Degradation):
    """A disc with smooth edges; borders mirrored.

    Args:
        radius: in pixels.
    """

    id = "DB"
    name = "defocus_blur"
    radius: Range = ranged(1, 4, least=0.1, most=1e3)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"radius": draw_uniform(generator, self.radius)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        return convolve(image, defocus_kernel(values["radius"]))


@register
@dataclass(frozen=True)
class Ringing(Degradation):
    """A sharp circular low-pass, which rings at edges; borders mirrored.

    Args:
        cutoff: in radians per pixel; pi is the highest frequency that pixels have.
        size: side of the kernel, odd.
    """

    id = "RI"
    name = "ringing"
    cutoff: Range = ranged(1.2, 1.2, least=1e-2, most=math.pi)
    size: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("size", self.size)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"cutoff": draw_uniform(generator, self.cutoff), "size": self.size}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        # the 21x21 that the kernel is padded to with zeros add nothing, not even at the mirrored borders
        return convolve(image, ringing_kernel(values["cutoff"], values["size"]))


@register
@dataclass(frozen=True)
class RichardsonLucy(Degradation):
    """One Richardson-Lucy iteration from a constant start, with a flat 5x5 point spread, on an image that was sharp.

    The constant divides out, and what is left is the mean of 5x5 pixels of the image between ramps to 0, 7 pixels long,
    at its borders.

    Args:
        size: side of the point spread, odd.
        ramp: length of the ramps, in pixels.
    """

    id = "RL"
    name = "richardson_lucy"
    size: int = 5
    ramp: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("size", self.size)
        if not isinstance(self.ramp, int) or self.ramp < 2 * (self.size // 2):
            # with less, the long form's image ends where its results still count
            raise ValueError(f"ramp: expected a whole number of at least {2 * (self.size // 2)}, got {self.ramp!r}")

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"size": self.size, "ramp": self.ramp}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        radius, ramp = values["size"] // 2, values["ramp"]
        falling = 1 - torch.arange(1, radius + 1, dtype=image.dtype, device=image.device) / ramp
        height, width = image.shape[-2:]
        for dim, n in ((-2, height), (-1, width)):
            shape = (radius, 1) if dim == -2 else (radius,)
            first, last = image.narrow(dim, 0, 1), image.narrow(dim, n - 1, 1)
            image = torch.cat([first * falling.flip(0).reshape(shape), image, last * falling.reshape(shape)], dim)
        size = values["size"]
        return F.avg_pool2d(F.avg_pool2d(image[None], (size, 1), 1), (1, size), 1)[0]


def check_odd(name: str, size: Any) -> None:
    """Raise ValueError where ``size`` is no odd whole number."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
        raise ValueError(f"{name}: expected an odd whole number, got {size!r}")
