"""Noise: Gaussian, Poisson, salt and pepper. It is added in floating point, with the strength that is stated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

__all__ = ["GaussianNoise", "PoissonNoise", "SaltAndPepper"]


@register
@dataclass(frozen=True)
class GaussianNoise(Degradation):
    """White Gaussian noise of its own in each channel.

    Args:
        sigma: standard deviation, in units of 1/255.
    """

    id = "GN"
    name = "gaussian_noise"
    sigma: Range = ranged(10, 50, least=0, most=1e4)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"sigma": draw_uniform(generator, self.sigma), "seed": draw_seed(generator)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        random = field_generator(values["seed"], image)
        noise = torch.randn(image.shape, generator=random, dtype=image.dtype, device=image.device)
        return image + values["sigma"] / 255 * noise


@register
@dataclass(frozen=True)
class PoissonNoise(Degradation):
    """Counts of photons, each channel by itself: ``Poisson(peak x) / peak`` with ``peak = 10^level``.

    Args:
        level: decimal logarithm of the mean count in white.
    """

    id = "PO"
    name = "poisson_noise"
    level: Range = ranged(2, 2, least=-2, most=6)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"level": draw_uniform(generator, self.level), "seed": draw_seed(generator)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        peak = 10.0 ** values["level"]
        random = field_generator(values["seed"], image)
        return torch.poisson(image.clamp(min=0) * peak, generator=random) / peak


@register
@dataclass(frozen=True)
class SaltAndPepper(Degradation):
    """Single pixels, in all channels at once, become white or black with equal chance.

    Args:
        amount: the part of the pixels.
    """

    id = "SP"
    name = "salt_and_pepper"
    amount: Range = ranged(0.05, 0.05, least=0, most=1)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"amount": draw_uniform(generator, self.amount), "seed": draw_seed(generator)}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        random = field_generator(values["seed"], image)
        chance = torch.rand(image.shape[-2:], generator=random, device=image.device)
        amount = values["amount"]
        salted = torch.where(chance < amount / 2, torch.ones_like(image), image)
        return torch.where((chance >= amount / 2) & (chance < amount), torch.zeros_like(image), salted)
