"""Image files as upright arrays and back: PNG with 8 and 16 bits per sample, and JPEG.

An orientation (EXIF's, or XMP's where EXIF has none) is applied to the pixels when a file is read, and not carried.
Carried from either format to either: EXIF, byte for byte but for the orientation; the colour
profile; the pixel density (in whole pixels per inch to a JPEG); XMP, unless it describes parts of the file that are not
carried over (a video, a gain map) or is too long for a JPEG. Within PNG: gamma, chromaticities and texts; within JPEG:
the comment. Not carried: thumbnails outside EXIF, IPTC, further pictures of a file.

Metadata that cannot be read is left out or carried as it is, with a note; a sound picture is never refused for it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from mirage.images.jpeg import decode_jpeg, encode_jpeg, jpeg_header
from mirage.images.png import MODES, SIGNATURE, decode_png, encode_png, png_header
from mirage.images.types import (
    FORMATS,
    MAX_PIXELS,
    SUFFIXES,
    ImageError,
    ImageFile,
    ImageHeader,
    ImageTooLarge,
)

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "SIDECAR",
    "SUFFIXES",
    "ImageError",
    "ImageFile",
    "ImageHeader",
    "ImageTooLarge",
    "begins_as_image",
    "check_size",
    "decode_image",
    "encode_image",
    "read_bytes",
    "read_header",
    "read_image",
    "write_image",
]

JPEG_SIGNATURE = b"\xff\xd8\xff"
SIDECAR = bytes.fromhex("00051607")
"""How an AppleDouble file begins: what macOS keeps of ``a.jpg`` in ``._a.jpg`` on other file systems."""


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Decode a PNG (grey or RGB, with or without alpha, palette; 1 to 16 bits) or a JPEG, upright.

    Palettes become RGB, transparency becomes an alpha channel, fewer than 8 bits become 8, CMYK becomes RGB.

    Args:
        max_pixels: an image with more pixels is refused.

    Raises:
        ImageTooLarge: the image has more pixels than ``max_pixels``.
        ImageError: the file is missing, broken, truncated, or neither PNG nor JPEG; the message says which.
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
        ImageError: it is neither PNG nor JPEG, or ends too early.
    """
    kind = _format(data)
    header = png_header(data) if kind == "png" else jpeg_header(data)
    if header is None:
        raise ImageError(f"broken {kind.upper()}: it ends before the size of its picture")
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
        return decode_png(data) if header.format == "png" else decode_jpeg(data)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like, from SyntaxError to struct.error
        raise ImageError(f"broken {header.format.upper()}: {error}") from error


def write_image(
    path: str | os.PathLike[str], image: ImageFile, format: str | None = None, *, quality: int = 95
) -> None:
    """Write ``image``, whole or not at all: the bytes go to a temporary file beside ``path`` that is then renamed.

    A PNG has the sample depth of the pixels. A JPEG has 8 bits (16-bit samples are rounded) and no chroma subsampling.

    Args:
        format: ``"png"`` or ``"jpeg"``; the image's own by default.
        quality: of a JPEG, 1 to 100.

    Raises:
        ImageError: unknown format, pixels of another shape or type than :class:`ImageFile` says, or alpha in a JPEG.
        OSError: the file cannot be written.
    """
    path = Path(path)
    data = encode_image(image, format, quality=quality)
    descriptor, name = tempfile.mkstemp(prefix=".restored-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def encode_image(image: ImageFile, format: str | None = None, *, quality: int = 95) -> bytes:
    """The bytes :func:`write_image` would write."""
    format = image.format if format is None else format
    if format not in FORMATS:
        raise ImageError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    pixels = image.pixels
    known = pixels.dtype in (np.uint8, np.uint16)
    if not known or pixels.ndim != 3 or pixels.shape[2] not in MODES or not pixels.size:
        raise ImageError(f"pixels: expected [H, W, 1 to 4] of uint8 or uint16, got {list(pixels.shape)} {pixels.dtype}")
    return encode_png(image) if format == "png" else encode_jpeg(image, quality)


def begins_as_image(data: bytes) -> bool:
    """Whether the first 8 bytes of a file are those of a PNG or a JPEG."""
    return data.startswith((SIGNATURE, JPEG_SIGNATURE))


def _format(data: bytes) -> str:
    if begins_as_image(data):
        return "png" if data.startswith(SIGNATURE) else "jpeg"
    if data.startswith(SIDECAR):
        raise ImageError("expected PNG or JPEG, got an AppleDouble sidecar, which has no picture")
    what = "an empty file" if not data else f"a file that begins with {data[:8].hex(' ')}"
    raise ImageError(f"expected PNG or JPEG, got {what}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
