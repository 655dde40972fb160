"""What an image file is here, which formats are known and what each can hold, and what can be wrong with a file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mirage.extras import is_there

__all__ = [
    "FORMATS",
    "FORMAT_SPECS",
    "KNOWN",
    "MAX_PIXELS",
    "SUFFIXES",
    "FormatSpec",
    "ImageError",
    "ImageFile",
    "ImageHeader",
    "ImageTooLarge",
    "require",
]


@dataclass(frozen=True)
class FormatSpec:
    """What a format of files can hold, and what reading and writing it takes.

    Attributes:
        title: its name in sentences.
        suffixes: of its files; the first is what a written file gets.
        read_depths, write_depths: bits per sample; 32 is float32. Pixels of another depth are rounded to one of them.
        grey: whether a picture may have no colours (otherwise a grey one is written as RGB).
        alpha: whether it has transparency.
        most: pixels that a side may have.
        modules: Python modules it needs, and the ``extra`` of this package that installs them.
        orientation: where a file says which way up its picture is.
    """

    title: str
    suffixes: tuple[str, ...]
    read_depths: tuple[int, ...]
    write_depths: tuple[int, ...]
    grey: bool
    alpha: bool
    most: int
    modules: tuple[str, ...]
    extra: str
    orientation: str


_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp")
_BOTH = ("PIL", "imagecodecs")
_EXIF_OR_XMP, _BOXES = "EXIF, else XMP", "irot and imir"

FORMAT_SPECS = {
    "png": FormatSpec("PNG", (".png",), (8, 16), (8, 16), True, True, 2**31 - 1, _BOTH, "images", _EXIF_OR_XMP),
    "jpeg": FormatSpec("JPEG", _JPEG, (8,), (8,), True, False, 65_500, ("PIL",), "images", _EXIF_OR_XMP),
    "tiff": FormatSpec("TIFF", (".tif", ".tiff"), (8, 16, 32), (8, 16, 32), True, True, 2**31 - 1,
                       ("PIL", "imagecodecs", "tifffile"), "images", "its own tag"),
    "webp": FormatSpec("WebP", (".webp",), (8,), (8,), False, True, 16_383, ("PIL",), "images", _EXIF_OR_XMP),
    "avif": FormatSpec("AVIF", (".avif",), (8, 10, 12), (8, 10, 12), True, True, 65_536, _BOTH, "images", _BOXES),
    "heic": FormatSpec("HEIC", (".heic", ".heif", ".hif"), (8, 10, 12), (8, 10, 12), True, True, 16_384,
                       ("PIL", "pillow_heif"), "heif", _BOXES),
}  # fmt: skip
"""The formats that are read and written, by the names that `write_image` takes."""

FORMATS = {name: spec.suffixes[0] for name, spec in FORMAT_SPECS.items()}
"""Formats that can be written, and the suffix each gets."""

SUFFIXES = {suffix: name for name, spec in FORMAT_SPECS.items() for suffix in spec.suffixes}
"""Suffixes that count as images in a folder, and the format each stands for."""

_TITLES = [spec.title for spec in FORMAT_SPECS.values()]
KNOWN = f"{', '.join(_TITLES[:-1])} or {_TITLES[-1]}"
"""The formats' names, for sentences."""

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused unless asked for: a file of some kilobytes can claim to have billions of them."""


class ImageError(ValueError):
    """A file that cannot be read as an image, or an image that cannot be written as asked."""


class ImageTooLarge(ImageError):
    """An image with more pixels than the limit."""


def require(format: str) -> None:
    """Raise ImageError, saying what to install, where a library that ``format`` needs is not there."""
    spec = FORMAT_SPECS[format]
    missing = [name for name in spec.modules if not is_there(name)]
    if missing:
        raise ImageError(
            f"{spec.title} needs {', '.join(missing)}, not installed; try: pip install 'mirage-kernels[{spec.extra}]'"
        )


@dataclass(frozen=True)
class ImageHeader:
    """What the beginning of a file says: ``format`` (a key of `FORMATS`), ``height`` and ``width`` in pixels as
    stored, ``channels`` (1 to 4) and ``depth`` in bits per sample (8, 16, or 32 for float32) once decoded."""

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
        pixels: ``[H, W, C]``, uint8, uint16 or float32 (in [0, 1]), upright; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or
            4 (RGB, alpha).
        format: a key of `FORMATS`: what the file's content was, whatever its name.
        icc_profile: embedded colour profile, or None.
        exif: EXIF block (from its TIFF header on) as in the file, without an orientation that has been applied to the
            pixels; or None.
        chunks: PNG chunks ``(type, data)`` that describe the colours and the pixel size, and texts.
        density: pixel density, ``(x, y, unit)``; the unit is 0 (only x : y is known), 1 (inch) or 2 (cm).
        xmp: XMP packet as in the file, but for such an orientation, which is 1 here; or None.
        comment: comment of a JPEG, or None.
        notes: what of the file could not be read or is not carried over, for the user.
        depth: bits per sample in the file, where they are others than those of ``pixels`` (10 or 12 as uint16).
        lossless: whether the file is known to be compressed without loss; WebP is then written back so.
        compression: of a TIFF: ``"none"``, ``"lzw"`` or ``"deflate"``.
        cicp: colour primaries and transfer function by their numbers in ITU-T H.273, where there is no profile.
    """

    pixels: np.ndarray
    format: str = "png"
    icc_profile: bytes | None = None
    exif: bytes | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    density: tuple[float, float, int] | None = None
    xmp: bytes | None = None
    comment: bytes | None = None
    notes: tuple[str, ...] = ()
    depth: int | None = None
    lossless: bool = False
    compression: str | None = None
    cicp: tuple[int, int] | None = None

    def with_pixels(self, pixels: np.ndarray) -> ImageFile:
        """The same image with other pixels."""
        return replace(self, pixels=pixels)

    def colours(self) -> np.ndarray:
        """Grey or RGB without alpha, ``[H, W, 1 or 3]``, float64: integers in units of their type's largest, floats as
        they are."""
        colours = self.pixels[..., : 1 if self.pixels.shape[2] <= 2 else 3]
        return colours / (float(np.iinfo(colours.dtype).max) if colours.dtype.kind == "u" else 1.0)
