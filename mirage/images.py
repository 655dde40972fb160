"""Image files as arrays and back: PNG with 8 and 16 bits per sample, and JPEG.

Pillow reads and writes JPEG and 8-bit PNG. It silently drops the low byte of a 16-bit RGB PNG, so those go through
imagecodecs (libpng). What describes the colours of a PNG (profile, gamma, chromaticities, pixel size, EXIF) is carried
over.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image as PIL
from PIL import ImageOps

__all__ = ["ImageFile", "ImageError", "SUFFIXES", "FORMATS", "read_image", "write_image"]

FORMATS = {"png": ".png", "jpeg": ".jpg"}
"""Formats that can be written, and the suffix each gets."""

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
"""Suffixes that count as images in a folder."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT_CHUNKS = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"eXIf")
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class ImageError(ValueError):
    """A file that cannot be read as an image, or an image that cannot be written as asked."""


@dataclass(frozen=True)
class ImageFile:
    """A decoded image.

    Attributes:
        pixels: ``[H, W, C]``, uint8 or uint16; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
        format: ``"png"`` or ``"jpeg"``, what the file's content was, whatever its name.
        icc_profile: embedded colour profile, or None.
        exif: EXIF block of a JPEG without its orientation, which has been applied to the pixels; or None.
        chunks: PNG chunks ``(type, data)`` that describe the colours and the pixel size.
    """

    pixels: np.ndarray
    format: str = "png"
    icc_profile: bytes | None = None
    exif: bytes | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()

    def with_pixels(self, pixels: np.ndarray) -> ImageFile:
        """The same image with other pixels."""
        return replace(self, pixels=pixels)


def read_image(path: str | os.PathLike[str]) -> ImageFile:
    """Decode a PNG (grey or RGB, with or without alpha, palette; 1 to 16 bits) or a JPEG (its EXIF orientation
    applied).

    Palettes become RGB, transparency becomes an alpha channel, fewer than 8 bits become 8, CMYK becomes RGB.

    Raises:
        ImageError: the file is missing, broken, truncated, or neither PNG nor JPEG; the message says which.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read: {error.strerror or error}") from error
    if data.startswith(PNG_SIGNATURE):
        kind = "png"
    elif data.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    else:
        what = "an empty file" if not data else f"a file that begins with {data[:8].hex(' ')}"
        raise ImageError(f"expected PNG or JPEG, got {what}")
    try:
        return _decode_png(data) if kind == "png" else _decode_jpeg(data)
    except ImageError:
        raise
    except Exception as error:  # decoders raise what they like, from SyntaxError to struct.error
        raise ImageError(f"broken {kind.upper()}: {error}") from error


def _decode_jpeg(data: bytes) -> ImageFile:
    with PIL.open(io.BytesIO(data), formats=("JPEG", "MPO")) as image:
        image.load()
        profile = image.info.get("icc_profile")
        image = ImageOps.exif_transpose(image)
        exif = image.getexif().tobytes() if len(image.getexif()) else None
        if image.mode not in ("L", "RGB"):
            image, profile = image.convert("RGB"), None
        return ImageFile(_as_hwc(np.array(image)), "jpeg", profile, exif)


def _decode_png(data: bytes) -> ImageFile:
    depth = data[24] if len(data) > 24 else 0
    chunks = tuple((kind, body) for kind, body in _iter_chunks(data) if kind in KEPT_CHUNKS)
    with PIL.open(io.BytesIO(data), formats=("PNG",)) as image:
        profile = image.info.get("icc_profile")
        if depth == 16:
            import imagecodecs

            pixels = imagecodecs.png_decode(data)
            if pixels.dtype != np.uint16:
                raise ImageError(f"expected 16-bit samples, the decoder gave {pixels.dtype}")
            return ImageFile(_as_hwc(pixels), "png", profile, None, chunks)
        image.load()
        if image.mode == "P" or "transparency" in image.info:
            grey = image.mode in ("1", "L")
            alpha = "transparency" in image.info
            image = image.convert(("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB"))
        elif image.mode not in _MODES.values():
            image = image.convert("L" if image.mode in ("1", "I") else "RGB")
        return ImageFile(_as_hwc(np.array(image)), "png", profile, None, chunks)


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
    if not known or pixels.ndim != 3 or pixels.shape[2] not in _MODES or not pixels.size:
        raise ImageError(f"pixels: expected [H, W, 1 to 4] of uint8 or uint16, got {list(pixels.shape)} {pixels.dtype}")
    return _encode_png(image) if format == "png" else _encode_jpeg(image, quality)


def _encode_png(image: ImageFile) -> bytes:
    if image.pixels.dtype == np.uint16:
        import imagecodecs

        data = bytes(imagecodecs.png_encode(np.ascontiguousarray(_squeeze(image.pixels)), level=6))
    else:
        buffer = io.BytesIO()
        _to_pil(image.pixels).save(buffer, "PNG")
        data = buffer.getvalue()
    chunks = image.chunks
    if not chunks and image.icc_profile:
        chunks = ((b"iCCP", b"ICC profile\0\0" + zlib.compress(image.icc_profile)),)
    head = len(PNG_SIGNATURE) + 25  # the signature and IHDR; everything kept may stand right behind them
    return data[:head] + b"".join(_pack_chunk(kind, body) for kind, body in chunks) + data[head:]


def _encode_jpeg(image: ImageFile, quality: int) -> bytes:
    pixels = image.pixels
    if pixels.shape[2] in (2, 4):
        raise ImageError("format: a JPEG has no alpha channel and this image has one; write PNG")
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    buffer = io.BytesIO()
    options = {"icc_profile": image.icc_profile} if image.icc_profile else {}
    if image.exif:
        options["exif"] = image.exif
    _to_pil(pixels).save(buffer, "JPEG", quality=quality, subsampling=0, **options)
    return buffer.getvalue()


def _iter_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG before its pixel data."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT" or at + 12 + length > len(data):
            return
        yield kind, data[at + 8 : at + 8 + length]
        at += 12 + length


def _pack_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _as_hwc(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _squeeze(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _to_pil(pixels: np.ndarray) -> PIL.Image:
    return PIL.fromarray(np.ascontiguousarray(_squeeze(pixels)))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
