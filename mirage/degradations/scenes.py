"""Depth and snow of scenes of which nothing is known: made up from a seed, the same on every device.

CDD11's recipe takes depth, snow and rain from elsewhere. What stands here (and in `rain`) is ours: plausible, and no
more.
"""

from __future__ import annotations

import numpy as np

__all__ = ["made_up_depth", "snow_flakes"]

HORIZON = (0.1, 0.5)  # part of the height at which the ground ends
RELIEF = 0.25  # of what stands on the ground, in units of depth
LAYERS = (  # of snow, far to near: radius of flakes in pixels, flakes in 1000 pixels, opacity
    ((0.5, 0.9), (4.0, 10.0), (0.25, 0.5)),
    ((0.9, 1.6), (2.0, 6.0), (0.5, 0.85)),
    ((1.8, 3.2), (0.2, 0.8), (0.6, 0.95)),
)
FALL = (0.0, 4.0)  # pixels that the nearest flakes move in, during the exposure; further ones less
WIND = (-40.0, 40.0)  # degrees from the vertical


def made_up_depth(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Nearness, 0 (far) to 1 (near): float32 ``[height, width]``.

    Ground that comes nearer from a horizon down, far away above it, and smooth hills over all.
    """
    horizon = rng.uniform(*HORIZON)
    row = (np.arange(height) + 0.5) / height
    ground = np.clip((row - horizon) / (1 - horizon), 0, 1)
    hills = _smooth(height, width, rng.uniform(-1, 1, (6, 8)))
    return np.clip(ground[:, None] + RELIEF * hills, 0, 1).astype(np.float32)


def snow_flakes(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """How much of each pixel snow covers: float32 ``[height, width]`` in [0, 1].

    Three layers, of many small and faint flakes to few large ones, that fall in one direction.
    """
    angle = np.deg2rad(rng.uniform(*WIND))
    fall = rng.uniform(*FALL)
    clear = np.ones((height, width))
    for radii, densities, opacities in LAYERS:
        radius, opacity = rng.uniform(*radii), rng.uniform(*opacities)
        probability = rng.uniform(*densities) / 1000
        length = fall * radius / LAYERS[-1][0][1]
        margin = int(np.ceil(radius + length / 2 + 2))
        size = (height + 2 * margin, width + 2 * margin)
        flakes = (rng.random(size) < probability) * rng.uniform(0.4, 1, size)
        whole = _convolved(flakes, _flake(radius, length, angle, margin))
        inside = whole[margin : margin + height, margin : margin + width]
        clear *= 1 - opacity * np.clip(inside, 0, 1)
    return (1 - clear).astype(np.float32)


def _flake(radius: float, length: float, angle: float, margin: int) -> np.ndarray:
    """A soft disc drawn along a short line, 1 in its middle: ``[2 margin + 1, 2 margin + 1]``."""
    down, right = np.mgrid[-margin : margin + 1, -margin : margin + 1]
    along = down * np.cos(angle) + right * np.sin(angle)
    across = right * np.cos(angle) - down * np.sin(angle)
    distance = np.hypot(np.maximum(np.abs(along) - length / 2, 0), across)
    return np.clip(radius + 0.5 - distance, 0, 1)


def _convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """``[H, W]`` convolved with an odd kernel, nothing outside of it."""
    size = [n + k for n, k in zip(image.shape, kernel.shape, strict=True)]
    whole = np.fft.irfft2(np.fft.rfft2(image, size) * np.fft.rfft2(kernel, size), size)
    top, left = (k // 2 for k in kernel.shape)
    return whole[top : top + image.shape[0], left : left + image.shape[1]]


def _smooth(height: int, width: int, coarse: np.ndarray) -> np.ndarray:
    """A coarse grid at full size, by cosines between its points."""
    for axis, n in enumerate((height, width)):
        coarse = np.moveaxis(coarse, axis, 0)
        place = (np.arange(n) + 0.5) / n * (len(coarse) - 1)
        below = np.minimum(place.astype(int), len(coarse) - 2)
        part = (1 - np.cos(np.pi * (place - below))) / 2
        mixed = coarse[below] * (1 - part)[:, None] + coarse[below + 1] * part[:, None]
        coarse = np.moveaxis(mixed, 0, axis)
    return coarse
