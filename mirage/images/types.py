"""What an image file is here, which ones are known, and what can be wrong with one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

__all__ = ["FORMATS", "MAX_PIXELS", "SUFFIXES", "ImageError", "ImageFile", "ImageHeader", "ImageTooLarge"]

FORMATS = {"png": ".png", "jpeg": ".jpg"}
"""Formats that can be written, and the suffix each gets."""

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp")
SUFFIXES = {".png": "png", **dict.fromkeys(_JPEG, "jpeg")}
"""Suffixes that count as images in a folder, and the format each stands for."""

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused unless asked for: a file of some kilobytes can claim to have billions of them."""


class ImageError(ValueError):
    """A file that cannot be read as an image, or an image that cannot be written as asked."""


class ImageTooLarge(ImageError):
    """An image with more pixels than the limit."""


@dataclass(frozen=True)
class ImageHeader:
    """What the beginning of a file says: ``format`` (``"png"`` or ``"jpeg"``), ``height`` and ``width`` in pixels as
    stored, ``channels`` (1 to 4) and ``depth`` in bits per sample (8 or 16) once decoded."""

    format: str
    height: int
    width: int
    channels: int
    depth: int

    @property
    def pixels(self) -> int:
        """How many there are."""
        return self.height * self.width


@dataclass(frozen=True)
class ImageFile:
    """A decoded image.

    Attributes:
        pixels: ``[H, W, C]``, uint8 or uint16, upright; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
        format: ``"png"`` or ``"jpeg"``, what the file's content was, whatever its name.
        icc_profile: embedded colour profile, or None.
        exif: EXIF block (from its TIFF header on) as in the file, without an orientation that has been applied to the
            pixels; or None.
        chunks: PNG chunks ``(type, data)`` that describe the colours and the pixel size, and texts.
        density: pixel density of a JPEG, ``(x, y, unit)``; the unit is 0 (only x : y is known), 1 (inch) or 2 (cm).
        xmp: XMP packet as in the file, but for such an orientation, which is 1 here; or None.
        comment: comment of a JPEG, or None.
        notes: what of the file's metadata could not be read or is not carried over, for the user.
    """

    pixels: np.ndarray
    format: str = "png"
    icc_profile: bytes | None = None
    exif: bytes | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    density: tuple[int, int, int] | None = None
    xmp: bytes | None = None
    comment: bytes | None = None
    notes: tuple[str, ...] = ()

    def with_pixels(self, pixels: np.ndarray) -> ImageFile:
        """The same image with other pixels."""
        return replace(self, pixels=pixels)
