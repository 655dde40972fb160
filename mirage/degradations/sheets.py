"""A contact sheet: one image, and every kind of degradation of it with what was drawn."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path

import numpy as np

from mirage.degradations import CDD11, REGISTRY, create, generator_of
from mirage.degradations.files import described
from mirage.whole_files import write_whole

__all__ = ["draw_sheet"]

WIDTH, HEIGHT = 240, 180  # of a picture, at most, in pixels; they are shown as they are, not scaled
GAP, HEAD = 8, 46
LETTERS = 40  # of a line below a title
COLUMNS = 6


def draw_sheet(path: str | Path, pixels: np.ndarray, seed: int = 0) -> None:
    """Write the PNG, whole or not at all: the clean image, the kinds of `REGISTRY`, and CDD11's compositions.

    The whole image is degraded, and the middle of it shown.

    Args:
        pixels: ``[H, W, 3]``, float32 in [0, 1].
        seed: what the parameters are drawn from.

    Raises:
        OSError: it cannot be written.
    """
    from PIL import Image, ImageDraw

    batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
    tiles = [("clean", f"{pixels.shape[1]} x {pixels.shape[0]} pixels", _middle(pixels))]
    for name in (*REGISTRY, *(name for name in CDD11 if "_" in name)):
        degradation = create(name)
        degraded, applied = degradation(batch, generator_of(seed, name))
        title = degradation.label if "_" in name else f"{name}  {degradation.label}"
        tiles.append((title, described(applied[0]), _middle(degraded[0].transpose(1, 2, 0))))
    height, width = tiles[0][2].shape[:2]
    cell = max(width, 160) + GAP, height + HEAD + GAP
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GAP, math.ceil(len(tiles) / COLUMNS) * cell[1] + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    fonts = [_font(size) for size in (13, 11)]
    for i, (title, text, picture) in enumerate(tiles):
        left, top = GAP + i % COLUMNS * cell[0], GAP + i // COLUMNS * cell[1]
        draw.text((left, top), title, "black", fonts[0])
        for row, line in enumerate(textwrap.wrap(text, LETTERS)[:2]):
            draw.text((left, top + 16 + 13 * row), line, "#555555", fonts[1])
        sheet.paste(Image.fromarray(np.rint(picture * 255).astype(np.uint8)), (left, top + HEAD))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_whole(path, file.getvalue())


def _middle(pixels: np.ndarray) -> np.ndarray:
    height, width = (min(n, most) for n, most in zip(pixels.shape[:2], (HEIGHT, WIDTH), strict=True))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _font(size: int):
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except TypeError:  # before Pillow 10.1, which has no sizes
        return ImageFont.load_default()
