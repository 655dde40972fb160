"""Which group of degradations an image belongs to, and how far it lies from it (GRIDS, arXiv 2407.12273, Sec. 5.2).

No restorer runs for that: the distance is a forecast of the quality too. A photograph degraded by something that no
group was trained on lies far from all of them, and is called foreign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage.grids.features import MEMORY, Descriptor, descriptor_ggd
from mirage.grids.ggd import COMPONENTS, GGD, kl_divergence, scaled
from mirage.grids.pca import check_components

__all__ = ["CROPS", "FOREIGN", "PATCH", "Selection", "query_ggd", "select"]

CROPS = 800
"""Patches of a query, as many as of the references: sigma depends on their number."""

PATCH = 32
"""Side of a patch in pixels."""

FOREIGN = 4.0
"""Distance above which an image is foreign to all groups."""


@dataclass(frozen=True)
class Selection:
    """The nearest group.

    Attributes:
        group: its number.
        divergence: KL(group || query) in nats.
        distance: S(group, query), the same on the logarithmic scale.
        foreign: whether the distance passes the limit.
        distances: S of every group, in order.
    """

    group: int
    divergence: float
    distance: float
    foreign: bool
    distances: tuple[float, ...]


def select(groups: Sequence[GGD], query: GGD, *, foreign: float = FOREIGN) -> Selection:
    """The group with the least KL(group || query), the first of equal ones.

    Args:
        groups: the parameters of each group, such as `mean_ggd` of its members'.
        query: of the image, such as `query_ggd` of it, with patches and components as the references have.
        foreign: the distance above which no group is the image's.

    Raises:
        ValueError: there are no groups.
    """
    if not groups:
        raise ValueError("groups: expected at least one, got none")
    divergences = [kl_divergence(group, query) for group in groups]
    nearest = divergences.index(min(divergences))
    distances = tuple(scaled(each) for each in divergences)
    return Selection(nearest, divergences[nearest], distances[nearest], distances[nearest] > foreign, distances)


def query_ggd(
    image: Any, descriptor: Descriptor, crops: int = CROPS, components: int = COMPONENTS, seed: int = 0, *,
    patch: int = PATCH, memory: int = MEMORY,
) -> GGD:  # fmt: skip
    """The GGD of one image, from random crops of it.

    Args:
        image: an array ``[H, W, 3]`` or a tensor ``[3, H, W]``, floating point in [0, 1]. Sides below two patches are
            continued by reflection up to that.
        descriptor: the references' own.
        crops, components, patch: as of the references. Crops may overlap.
        seed: of their places.
        memory: bytes of features that are held at a time.

    Raises:
        ValueError: the image has another shape or values that are not finite, it is constant, or there are too few
            crops.
    """
    check_components(components, crops)
    return descriptor_ggd(descriptor, random_crops(image, crops, patch, seed), components, memory=memory)


def random_crops(image: Any, count: int, side: int, seed: int) -> Tensor:
    """``count`` squares of an image at random places, which a seed decides; float32 ``[count, 3, side, side]``."""
    pixels = image.detach().cpu().numpy().transpose(1, 2, 0) if isinstance(image, Tensor) and image.ndim == 3 else image
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size or not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"image: expected floating point [H, W, 3] in [0, 1], got {pixels.dtype} {list(pixels.shape)}")
    if not np.isfinite(pixels).all():
        raise ValueError(f"image: expected finite values, got {int((~np.isfinite(pixels)).sum())} others")
    if pixels.min() == pixels.max() or bool((pixels == pixels[:1, :1]).all()):
        raise ValueError("image: expected one with some structure, got the same colour everywhere: all crops are equal")
    missing = [max(0, 2 * side - length) for length in pixels.shape[:2]]
    pixels = np.pad(pixels, [*((gap // 2, gap - gap // 2) for gap in missing), (0, 0)], mode="reflect")
    rng = np.random.default_rng(seed)
    tops, lefts = (rng.integers(0, length - side + 1, count) for length in pixels.shape[:2])
    found = np.empty((count, 3, side, side), np.float32)
    for crop, top, left in zip(found, tops, lefts, strict=True):
        crop[...] = pixels[top : top + side, left : left + side].transpose(2, 0, 1)
    return torch.from_numpy(found)
