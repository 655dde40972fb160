"""Gaussian noise that anyone can make again: one generator per image, whatever the order of images."""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["KINDS", "add_noise", "noise_generator"]

KINDS = {
    "float": "clipped to [0, 1], not rounded",
    "truncated": "clipped and truncated to 8 bits, as in the released code",
}


def noise_generator(seed: int, name: str) -> np.random.Generator:
    """NumPy's default generator (PCG64), seeded by ``[seed, crc32(name)]``.

    Args:
        name: of the image: its path below its set's folder of targets, with ``/`` and without suffix.
    """
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def add_noise(image: np.ndarray, sigma: float, generator: np.random.Generator, kind: str = "float") -> np.ndarray:
    """``image`` with white Gaussian noise, drawn by ``generator.standard_normal(image.shape)`` in float64.

    Args:
        image: ``[H, W, 3]`` in [0, 1], floating point.
        sigma: standard deviation in units of 1/255.
        kind: a key of `KINDS`. ``"float"`` clips the sum; ``"truncated"`` clips it in units of 1/255 and drops the
            fraction, which darkens the image by half a unit on average.

    Returns:
        The shape of ``image``, float64 in [0, 1].

    Raises:
        ValueError: an unknown kind, or a negative sigma.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not sigma >= 0:
        raise ValueError(f"sigma: expected a number not below 0, got {sigma}")
    noise = generator.standard_normal(image.shape)
    image = image.astype(np.float64)
    if kind == "float":
        return np.clip(image + sigma / 255 * noise, 0, 1)
    return np.floor(np.clip(np.round(image * 255, 9) + sigma * noise, 0, 255)) / 255
