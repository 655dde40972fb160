"""Degradations with known parameters: blur, noise, JPEG, weather, ... of batches of images, on CPU and GPU.

    import mirage.degradations

    degradation = mirage.degradations.create("gaussian_blur", sigma=(2, 4))
    degraded, applied = degradation(images, generator)

`REGISTRY` has the kinds by id: the eleven of GRIDS (arXiv 2407.12273), and the four that CDD11 is composed of.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from mirage.degradations.base import Applied, Degradation, Range, apply, registered
from mirage.degradations.blur import DefocusBlur, GaussianBlur, MotionBlur, RichardsonLucy, Ringing
from mirage.degradations.mixing import CDD11, ELEVEN, Composition, Mixture, create, create_from, named
from mirage.degradations.noise import GaussianNoise, PoissonNoise, SaltAndPepper
from mirage.degradations.sampling import Inpainting, Jpeg, SuperResolution
from mirage.degradations.weather import Haze, LowLight, Rain, Snow

__all__ = [
    "CDD11",
    "ELEVEN",
    "REGISTRY",
    "Applied",
    "Composition",
    "DefocusBlur",
    "Degradation",
    "GaussianBlur",
    "GaussianNoise",
    "Haze",
    "Inpainting",
    "Jpeg",
    "LowLight",
    "Mixture",
    "MotionBlur",
    "PoissonNoise",
    "Rain",
    "Range",
    "RichardsonLucy",
    "Ringing",
    "SaltAndPepper",
    "Snow",
    "SuperResolution",
    "apply",
    "create",
    "create_from",
    "generator_of",
    "named",
]

REGISTRY: dict[str, type[Degradation]] = {
    **{kind: registered()[kind] for kind in ELEVEN},
    **{kind: cls for kind, cls in registered().items() if kind not in ELEVEN},
}
"""The kinds by id: `ELEVEN` in GRIDS' order, then ``LO``, ``RA``, ``SN`` and ``HA``."""


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator of the CPU for the image of this name, whatever the order of images.

    Args:
        name: such as the image's path below its folder, with ``/`` and without suffix.
    """
    state = np.random.default_rng([seed, zlib.crc32(name.encode())]).integers(2**63)
    return torch.Generator().manual_seed(int(state))
