"""CDD11's four degradations by its public recipe (OneRestore): low light, rain, snow and haze.

The recipe's inputs - illumination, rain, snow and depth - are maps that a caller gives. Those that are not given are
made up (`rain`, `scenes`, and the brightest channel for the illumination); that part is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage.degradations.base import (
    Degradation,
    Range,
    draw_seed,
    draw_uniform,
    field_generator,
    ranged,
    register,
)
from mirage.degradations.filters import box_mean, guided_filter
from mirage.degradations.rain import rain_streaks
from mirage.degradations.scenes import made_up_depth, snow_flakes

__all__ = ["Haze", "LowLight", "Rain", "Snow"]

SMALL = 1e-7  # keeps black pixels from a division by 0
GREY = (0.299, 0.587, 0.114)  # of ITU-R BT.601
DEPTH_BOX = 22  # pixels over which depth is smoothed
FURTHEST = 0.7  # distance from which haze grows no thicker


def _map(name: str, image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor],
         make: Callable[[int, int, np.random.Generator], np.ndarray]) -> Tensor:  # fmt: skip
    """The given map, ``[1, H, W]``, or the one made up from the record's seed."""
    if name in maps:
        return maps[name]
    height, width = image.shape[-2:]
    made = make(height, width, np.random.default_rng(values["seed"]))
    return torch.from_numpy(made)[None].to(image)


@register
@dataclass(frozen=True)
class LowLight(Degradation):
    """Darker, as by a lower illumination, with noise: ``x / L' * L'^gamma + noise``, where ``L'`` is the grey image in
    the guided filter (3x3, epsilon 0.01) whose guide is the illumination.

    Args:
        gamma: exponent of the illumination.
        noise: standard deviation of the Gaussian noise, in units of the image's range.
    """

    id = "LO"
    name = "low"
    takes = ("illumination",)
    gamma: Range = ranged(2, 3, least=0, most=100)
    noise: Range = ranged(0.03, 0.08, least=0, most=10)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        gamma, noise = draw_uniform(generator, self.gamma), draw_uniform(generator, self.noise)
        return {"gamma": gamma, "noise": noise, "seed": draw_seed(generator)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        illumination = maps["illumination"] if "illumination" in maps else image.amax(0, keepdim=True)
        weights = torch.tensor(GREY, dtype=image.dtype, device=image.device)[:, None, None]
        # below 0, where the filter overshoots, a power is no number
        light = guided_filter((image * weights).sum(0, keepdim=True), illumination).clamp(min=0) + SMALL
        random = field_generator(values["seed"], image)
        noise = torch.randn(image.shape, generator=random, dtype=image.dtype, device=image.device)
        return image / light * light ** values["gamma"] + values["noise"] * noise


@register
@dataclass(frozen=True)
class Rain(Degradation):
    """Bright streaks, added: ``x + rain``. Those that are made up are the trainer's (``rain: true``)."""

    id = "RA"
    name = "rain"
    takes = ("rain",)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"seed": draw_seed(generator)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        return image + _map("rain", image, values, maps, rain_streaks)


@register
@dataclass(frozen=True)
class Snow(Degradation):
    """White flakes over the image: ``x (1 - snow) + snow``."""

    id = "SN"
    name = "snow"
    takes = ("snow",)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"seed": draw_seed(generator)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        snow = _map("snow", image, values, maps, snow_flakes)
        return image * (1 - snow) + snow


@register
@dataclass(frozen=True)
class Haze(Degradation):
    """Light scattered on the way: ``x t + A (1 - t)``, ``t = exp(-beta min(1 - depth, 0.7))``, with ``depth`` (1 is
    near) smoothed over boxes of 22x22.

    Args:
        beta: thickness of the haze.
        light: ``A``, brightness of what it scatters.
    """

    id = "HA"
    name = "haze"
    takes = ("depth",)
    beta: Range = ranged(1, 2, least=0, most=100)
    light: Range = ranged(0.6, 0.9, least=0, most=1)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        beta, light = draw_uniform(generator, self.beta), draw_uniform(generator, self.light)
        return {"beta": beta, "light": light, "seed": draw_seed(generator)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        depth = _map("depth", image, values, maps, made_up_depth)
        distance = (1 - box_mean(depth, DEPTH_BOX)).clamp(max=FURTHEST)
        through = torch.exp(-values["beta"] * distance)
        return image * through + values["light"] * (1 - through)
