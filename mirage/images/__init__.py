"""Image files as upright arrays and back: PNG, JPEG, TIFF, WebP, AVIF and HEIC, each by what its content is.

An orientation is applied to the pixels when a file is read, and not carried. Carried from every format to every other:
EXIF, byte for byte but for the orientation (to and from TIFF: every entry, makers' notes at their place where they can
be); the colour profile; the pixel density; XMP, unless it describes parts of the file that are not carried over (a
video, a gain map) or is too long for a JPEG. Within PNG: gamma, chromaticities and texts; within JPEG: the comment. Not
carried: thumbnails outside EXIF, IPTC, further pictures of a file.

Metadata that cannot be read is left out or carried as it is, with a note; a sound picture is never refused for it.
Libraries are imported when a file of theirs is read or written; `FORMAT_SPECS` says which, and what a format can hold.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np

from mirage.images.boxes import is_heif
from mirage.images.convert import check_writable, fit
from mirage.images.types import (
    FORMAT_SPECS,
    FORMATS,
    KNOWN,
    MAX_PIXELS,
    SUFFIXES,
    FormatSpec,
    ImageError,
    ImageFile,
    ImageHeader,
    ImageTooLarge,
    require,
)
from mirage.whole_files import write_whole

__all__ = [
    "FORMATS",
    "FORMAT_SPECS",
    "KNOWN",
    "MAX_PIXELS",
    "SIDECAR",
    "SUFFIXES",
    "FormatSpec",
    "ImageError",
    "ImageFile",
    "ImageHeader",
    "ImageTooLarge",
    "begins_as_image",
    "check_size",
    "check_writable",
    "decode_image",
    "encode_image",
    "encode_with_notes",
    "read_bytes",
    "read_header",
    "read_image",
    "write_image",
]

_CODECS = {"png": "png", "jpeg": "jpeg", "tiff": "tiff", "webp": "webp", "avif": "heif", "heic": "heif"}
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SIDECAR = bytes.fromhex("00051607")
"""How an AppleDouble file begins: what macOS keeps of ``a.jpg`` in ``._a.jpg`` on other file systems."""
BEGINNING = 32
"""Bytes of a file that `begins_as_image` looks at."""


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Decode an image file, upright.

    Palettes become RGB, transparency becomes an alpha channel, fewer than 8 bits become 8, those between 8 and 16 the
    full range of 16, CMYK becomes RGB. Of several pictures the first (or primary) one is read, with a note.

    Args:
        max_pixels: an image with more pixels is refused.

    Raises:
        ImageTooLarge: the image has more pixels than ``max_pixels``.
        ImageError: the file is missing, broken, truncated, of a format or kind that is not read, or of one whose
            library is not installed; the message says which.
    """
    return decode_image(read_bytes(path), max_pixels=max_pixels)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file.

    Raises:
        ImageError: it is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read: {error.strerror or error}") from error


def read_header(data: bytes) -> ImageHeader:
    """What the content of a file says of the picture before it is decoded.

    Raises:
        ImageError: it is of a format or kind that is not read, or of one whose library is not installed, or ends too
            early.
    """
    kind = _format(data)
    try:
        header = _call("heif_header" if kind == "heif" else f"{kind}_header", kind, data)
    except ImageError:
        raise
    except Exception as error:  # a number where none can be
        raise ImageError(f"broken {_title(kind)}: {error}") from error
    if header is None:
        raise ImageError(f"broken {_title(kind)}: it ends before the size of its picture")
    require(header.format)
    return header


def check_size(header: ImageHeader, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageTooLarge for an image with more than ``max_pixels`` pixels."""
    if header.pixels > max_pixels:
        raise ImageTooLarge(
            f"too large: {header.width}x{header.height} are {header.pixels:,} pixels, the limit is {max_pixels:,} "
            "(raised by max_pixels, or --max-pixels on the command line)"
        )


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """What :func:`read_image` makes of the content of a file."""
    header = read_header(data)
    check_size(header, max_pixels)
    try:
        return _call(f"decode_{header.format}", header.format, data)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like, from SyntaxError to struct.error
        raise ImageError(f"broken {_title(header.format)}: {error}") from error


def write_image(
    path: str | os.PathLike[str], image: ImageFile, format: str | None = None, *, quality: int = 95
) -> tuple[str, ...]:
    """Write ``image``, whole or not at all: the bytes go to a temporary file beside ``path`` that is then renamed.

    Args:
        format: a key of `FORMATS`; the image's own by default.
        quality: of JPEG, WebP, AVIF and HEIC, 1 to 100. Colours are stored at half the resolution by WebP, and by AVIF
            and HEIC below 90. 100 is without loss in all of them but JPEG; so is WebP that comes from a lossless WebP.

    Returns:
        What the image loses by the format, for the user: bits, a profile of other colours, metadata without a place.

    Raises:
        ImageError: unknown format, one whose library is not installed, pixels of another shape or type than
            :class:`ImageFile` says, or that the format has no room for (`check_writable`).
        OSError: the file cannot be written.
    """
    path = Path(path)
    data, notes = encode_with_notes(image, format, quality=quality)
    write_whole(path, data)
    return notes


def encode_image(image: ImageFile, format: str | None = None, *, quality: int = 95) -> bytes:
    """The bytes :func:`write_image` would write."""
    return encode_with_notes(image, format, quality=quality)[0]


def encode_with_notes(
    image: ImageFile, format: str | None = None, *, quality: int = 95
) -> tuple[bytes, tuple[str, ...]]:
    """The bytes :func:`write_image` would write, and the notes it would return."""
    format = image.format if format is None else format
    pixels = image.pixels
    known = pixels.dtype in (np.uint8, np.uint16, np.float32)
    if not known or pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or not pixels.size:
        raise ImageError(
            f"pixels: expected [H, W, 1 to 4] of uint8, uint16 or float32, got {list(pixels.shape)} {pixels.dtype}"
        )
    check_writable(format, pixels.shape[2], *pixels.shape[:2])
    fitted, notes = fit(image, format)
    lossy = (quality,) if format not in ("png", "tiff") else ()
    data, more = _call(f"encode_{format}", format, fitted, *lossy)
    return data, notes + more


def begins_as_image(data: bytes) -> bool:
    """Whether the first `BEGINNING` bytes of a file are those of a format that is read."""
    return _sniff(data) is not None


def _sniff(data: bytes) -> str | None:
    """The format by a file's first bytes; ``"heif"`` for AVIF and HEIC, which have one container."""
    if data.startswith(_PNG):
        return "png"
    if data.startswith(_JPEG):
        return "jpeg"
    if data.startswith(_TIFF):
        return "tiff"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "heif" if is_heif(data) else None


def _format(data: bytes) -> str:
    found = _sniff(data)
    if found is not None:
        return found
    if data.startswith(SIDECAR):
        raise ImageError(f"expected {KNOWN}, got an AppleDouble sidecar, which has no picture")
    what = "an empty file" if not data else f"a file that begins with {data[:8].hex(' ')}"
    raise ImageError(f"expected {KNOWN}, got {what}")


def _call(function: str, format: str, *arguments):
    """A function of the module that reads and writes a format."""
    try:
        return getattr(importlib.import_module(f"mirage.images.{_CODECS.get(format, format)}"), function)(*arguments)
    except ImportError as error:  # a build of a library without this format
        raise ImageError(f"{_title(format)} cannot be read or written here: {error}") from error


def _title(format: str) -> str:
    return FORMAT_SPECS[format].title if format in FORMAT_SPECS else "HEIF"
