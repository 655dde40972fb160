"""What the page does with a picture, without the page: bytes to bytes, with limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirage.images import FORMATS, ImageError, decode_image, encode_with_notes, read_header

__all__ = ["MODES", "Limits", "Refused", "Restored", "Studio"]

MODES = {
    "auto": "Automatic: whole where the memory is enough, else global",
    "whole": "Whole: the network sees all of the picture at once",
    "tile": "Tiles: the least memory, each tile by itself",
    "local": "Local: every pixel by its neighbourhood, as in training",
    "global": "Global: as whole, in less memory",
}
"""How the modes of `mirage.Restorer` are called on the page."""

PREVIEW = 1600
"""Longest side of the pictures in the slider, in pixels; the download has all of them."""


class Refused(ValueError):
    """A picture that is not restored; the message is a sentence for the page."""


@dataclass(frozen=True)
class Limits:
    """What a picture may have: ``pixels``, and ``bytes`` of its file."""

    pixels: int = 50_000_000
    bytes: int = 100 << 20


@dataclass(frozen=True)
class Restored:
    """A restored picture.

    Attributes:
        data: the file, in the format of the input, with its metadata.
        name: a name for it.
        before, after: previews ``[h, w, 3]``, uint8, of one size.
        width, height: in pixels.
        seconds: of restoring.
        notes: what of the metadata could not be carried over.
    """

    data: bytes
    name: str
    before: np.ndarray
    after: np.ndarray
    width: int
    height: int
    seconds: float
    notes: tuple[str, ...]


class Studio:
    """Networks by name, each loaded when it is first asked for; the last one is kept.

    Args:
        weights: what the page lists: a name, then a checkpoint or the name of packaged weights.
        limits: of the pictures.
        options: further arguments of `mirage.Restorer`.
    """

    def __init__(self, weights: Mapping[str, str | Path], limits: Limits, options: Mapping[str, Any]):
        if not weights:
            raise ValueError("weights: expected one or more, got none")
        self.weights, self.limits, self.options = dict(weights), limits, dict(options)
        self._last: tuple[tuple[str, str], Any] | None = None
        self._turn = threading.Lock()

    @property
    def modes(self) -> Sequence[str]:
        """The modes that `mirage.Restorer` has."""
        from mirage.restore.restorer import ATTENTION

        return ATTENTION

    def restore(self, path: str | Path, weights: str, mode: str) -> Restored:
        """Restore a file.

        Args:
            path: in a format that `mirage.images` reads.
            weights: one of the names.
            mode: one of `modes`.

        Raises:
            Refused: the picture is broken, too large, or needs more memory than there is; or the weights cannot be
                read. The message says so in a sentence.
        """
        from mirage.restore.budget import NotEnoughMemory

        try:
            return self._restore(Path(path), weights, mode)
        except Refused:
            raise
        except ImageError as error:
            raise Refused(_sentence(f"This picture cannot be read: {error}")) from error
        except (MemoryError, NotEnoughMemory) as error:
            raise Refused("There is not enough memory for this picture in this mode; tiles need the least.") from error
        except Exception as error:  # a page must say something, whatever happened
            raise Refused(_sentence(f"Restoring failed: {error or type(error).__name__}")) from error

    def _restore(self, path: Path, weights: str, mode: str) -> Restored:
        size = path.stat().st_size
        if size > self.limits.bytes:
            raise Refused(f"This file has {size / 1e6:,.1f} MB; the limit is {self.limits.bytes / 1e6:,.1f} MB.")
        data = path.read_bytes()
        header = read_header(data)
        if header.pixels > self.limits.pixels:
            raise Refused(
                f"This picture has {header.width} x {header.height} = {header.pixels:,} pixels; "
                f"the limit is {self.limits.pixels:,}."
            )
        image = decode_image(data, max_pixels=self.limits.pixels)
        restorer = self._restorer(weights, mode)
        start = time.perf_counter()
        restored = image.with_pixels(restorer(image.pixels))
        seconds = time.perf_counter() - start
        suffix = path.suffix if path.suffix else FORMATS[image.format]
        data, notes = encode_with_notes(restored)
        return Restored(
            data,
            f"{path.stem}-restored{suffix}",
            preview(image.pixels),
            preview(restored.pixels),
            image.pixels.shape[1],
            image.pixels.shape[0],
            seconds,
            (*image.notes, *notes),
        )

    def _restorer(self, weights: str, mode: str) -> Callable[[np.ndarray], np.ndarray]:
        import mirage

        if weights not in self.weights:
            raise Refused(f"There are no weights called {weights!r}.")
        if mode not in self.modes:
            raise Refused(f"There is no mode called {mode!r}.")
        with self._turn:
            if self._last is None or self._last[0] != (weights, mode):
                self._last = None  # the former network goes before the next one comes
                restorer = mirage.Restorer(self.weights[weights], attention=mode, **self.options)
                self._last = ((weights, mode), restorer)
            return self._last[1]


def preview(pixels: np.ndarray) -> np.ndarray:
    """``[h, w, 3]`` of uint8, at most 1600 pixels long, of ``[H, W, C]`` of uint8, uint16 or float32 in [0, 1];
    transparent on white."""
    from PIL import Image

    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype == np.float32:
        pixels = (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    colours = pixels[..., : pixels.shape[2] - (pixels.shape[2] in (2, 4))]
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        colours = ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    colours = np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))
    longest = max(colours.shape)
    if longest <= PREVIEW:
        return colours
    height, width = (max(1, round(side * PREVIEW / longest)) for side in colours.shape[:2])
    return np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.LANCZOS))


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
