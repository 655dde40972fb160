"""Clean patches that degradations are measured on: random crops of photographs, which a seed decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CROP", "sample_patches"]

CROP = 128
"""Side of a clean patch in pixels: large enough for lines and blurs, whose middle is looked at."""


def sample_patches(
    images: str | Path | Iterable[Any], count: int = 800, size: int = CROP, seed: int = 0,
    skip: Callable[[str, str], None] | None = None,
) -> Tensor:  # fmt: skip
    """Random square crops of images, each image as often as any other but for one crop.

    Args:
        images: a folder, whose photographs and those of folders below it are meant; or files, folders and arrays
            ``[H, W, 3]``, floating point in [0, 1].
        count: crops.
        size: of their sides, in pixels.
        seed: of the order of images and of the places of crops.
        skip: called with the name of each image that is left out, and why: smaller than a crop, or not readable. By
            default a warning says it.

    Returns:
        float32 ``[count, 3, size, size]`` in [0, 1].

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: ``count`` or ``size`` is no positive number, or no image will do.
    """
    for name, value in (("count", count), ("size", size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    sources = _sources(images)
    order = np.random.default_rng(seed).permutation(len(sources)).tolist()
    found = np.empty((count, 3, size, size), np.float32)
    filled, turn = 0, 0
    left_out: set[int] = set()
    while filled < count:
        usable = [number for number in order if number not in left_out]
        if not usable:
            raise ValueError(f"images: expected some of at least {size}x{size} pixels, got none among {len(order)}")
        each = -(-(count - filled) // len(usable))  # all its crops at once, so that an image is read once
        for number in usable:
            try:
                pixels = _pixels(sources[number], size)
            except ValueError as error:
                left_out.add(number)
                _tell(_name(sources[number], number), str(error), skip)
                continue
            rng = np.random.default_rng([seed, number, turn])
            for _ in range(min(each, count - filled)):
                top, left = (int(rng.integers(length - size + 1)) for length in pixels.shape[:2])
                found[filled] = pixels[top : top + size, left : left + size].transpose(2, 0, 1)
                filled += 1
        turn += 1
    return torch.from_numpy(found)


def _sources(images: Any) -> list[Any]:
    given = [images] if isinstance(images, (str, Path)) else list(images)
    sources: list[Any] = []
    for each in given:
        if not isinstance(each, (str, Path)):
            sources.append(each)
        elif Path(each).is_dir():
            from mirage.inputs import photographs_in

            sources += photographs_in(Path(each), lambda *_: None)
        elif Path(each).is_file():
            sources.append(Path(each))
        else:
            raise FileNotFoundError(f"images: no file or folder {str(each)!r}")
    if not sources:
        raise ValueError(f"images: expected some, got none in {', '.join(map(str, given)) or 'an empty list'}")
    return sources


def _pixels(source: Any, size: int) -> np.ndarray:
    """An image as floating point ``[H, W, 3]``, at least as large as a crop.

    Raises:
        ValueError: it cannot be read, or is smaller.
    """
    if isinstance(source, Path):
        from mirage.evaluate.run import read_rgb
        from mirage.images import ImageError

        try:
            pixels = read_rgb(source)
        except (ImageError, OSError) as error:
            raise ValueError(str(error)) from error
    else:
        pixels = np.asarray(source)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or not np.issubdtype(pixels.dtype, np.floating):
            raise TypeError(f"images: expected arrays [H, W, 3] of floating point, got {pixels.dtype} {pixels.shape}")
    if min(pixels.shape[:2]) < size:
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, smaller than a crop of {size}x{size}")
    return pixels


def _name(source: Any, number: int) -> str:
    return str(source) if isinstance(source, Path) else f"array {number}"


def _tell(name: str, reason: str, skip: Callable[[str, str], None] | None) -> None:
    if skip is not None:
        skip(name, reason)
    else:
        warnings.warn(f"left out {name}: {reason}", stacklevel=3)
