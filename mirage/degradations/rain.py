"""Rain on clean pictures: bright streaks of one direction, as in Rain100L. The trainer and `weather` draw it."""

from __future__ import annotations

import numpy as np

__all__ = ["rain_streaks"]

ANGLE = (-30.0, 30.0)  # degrees from the vertical
LENGTH = (8.0, 32.0)  # pixels
WIDTH = (0.4, 1.0)  # standard deviation across a streak, pixels
DENSITY = (0.5, 2.0)  # streaks that pass through a square of the streak's length
BRIGHTNESS = (0.3, 0.9)  # of the brightest streaks, added to a picture in [0, 1]


def rain_streaks(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Streaks to add to a picture in [0, 1]: float32 ``[height, width]``, not negative.

    Streaks of one picture have one direction, length and width; they begin anywhere, also outside of it, and differ in
    brightness by up to a factor of three.

    Args:
        height, width: of the picture, in pixels.
        rng: what direction, length, width, density, brightness and places are drawn from.
    """
    angle = np.deg2rad(rng.uniform(*ANGLE))
    length, thickness = rng.uniform(*LENGTH), rng.uniform(*WIDTH)
    probability = rng.uniform(*DENSITY) / length**2
    brightness = rng.uniform(*BRIGHTNESS)
    margin = int(np.ceil(length / 2 + 3 * thickness))
    size = (height + 2 * margin, width + 2 * margin)
    drops = (rng.random(size) < probability) * rng.uniform(1 / 3, 1, size)
    down, right = np.mgrid[-margin : margin + 1, -margin : margin + 1]
    along = down * np.cos(angle) + right * np.sin(angle)
    across = right * np.cos(angle) - down * np.sin(angle)
    streak = np.exp(-0.5 * (across / thickness) ** 2) * np.clip(length / 2 - np.abs(along) + 0.5, 0, 1)
    padded = [n + 2 * margin for n in size]
    product = np.fft.rfft2(drops, padded) * np.fft.rfft2(streak, padded)
    whole = np.fft.irfft2(product, padded)
    inside = whole[2 * margin : 2 * margin + height, 2 * margin : 2 * margin + width]
    return (brightness * np.clip(inside, 0, 1)).astype(np.float32)
