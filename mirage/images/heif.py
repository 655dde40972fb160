"""AVIF and HEIC: pixels through imagecodecs (libavif) and pillow-heif (libheif), all else by `mirage.images.boxes`.

The container's own turns and mirrors decide which way up a picture is; an EXIF orientation beside them is what some
camera noted, and no viewer goes by it. libavif leaves them to its caller, libheif applies them.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from mirage.images.boxes import Heif, add_metadata, read_heif, with_cicp, without_metadata
from mirage.images.convert import exif_with_density, scaled, unmultiplied
from mirage.images.metadata import Metadata, turned_density, upright
from mirage.images.types import ImageError, ImageFile, ImageHeader

__all__ = ["decode_avif", "decode_heic", "encode_avif", "encode_heic", "heif_header"]

SEQUENCES = (b"avis", b"msf1", b"hevc", b"hevx", b"hevm", b"hevs")
FULL_CHROMA = 90  # the quality from which the colours are not stored at half the resolution
SPEED = 8  # of libavif, 0 to 10; the default of imagecodecs takes a hundred times as long for 0.4 dB at the same size
SRGB = (1, 13)
BT601, IDENTITY = 6, 0  # matrices: YCbCr as JPEG has it; the colours themselves


def heif_header(data: bytes) -> ImageHeader | None:
    """What the ``meta`` box says of the picture; None where the file ends before it.

    Raises:
        ImageError: its picture is neither AV1 nor HEVC.
    """
    heif = read_heif(data)
    size = None if heif is None else heif.size()
    if heif is None or heif.primary not in heif.items:
        return None
    if heif.format is None:
        codec = heif.items[heif.primary][0].decode("latin1")
        raise ImageError(f"a HEIF whose picture is neither AVIF nor HEIC, but {codec!r}, is not read")
    if size is None:
        return None
    depth, channels = heif.depth_and_channels()
    return ImageHeader(heif.format, size[3], size[2], channels, 8 if depth == 8 else 16)


def decode_avif(data: bytes) -> ImageFile:
    """Decode an AVIF of 8, 10 or 12 bits, upright; more than 8 bits become the full range of uint16."""
    import imagecodecs

    heif = _parsed(data)
    depth, channels = heif.depth_and_channels()
    if data[8:12] == b"avis":
        raise ImageError("an AVIF sequence (an animation) is not read")
    pixels = imagecodecs.avif_decode(without_metadata(heif))
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = _grey(pixels, channels)
    left, top, width, height = heif.size() or (0, 0, *pixels.shape[1::-1])
    pixels = pixels[top : top + height, left : left + width]
    orientation, metadata = _settled(heif, data)
    return _image(heif, "avif", upright(_full_range(pixels, depth), orientation), orientation, metadata, depth)


def decode_heic(data: bytes) -> ImageFile:
    """Decode a HEIC of 8, 10 or 12 bits, upright; more than 8 bits become the full range of uint16."""
    import pillow_heif

    heif = _parsed(data)
    opened = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    picture = opened[opened.primary_index]
    depth, channels = heif.depth_and_channels()
    pixels = np.asarray(picture)
    if pixels.dtype == np.uint16:
        pixels = pixels >> (16 - depth)  # pillow-heif shifts samples to the top of their 16 bits
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = _full_range(pixels, depth)
    if picture.mode.split(";")[0].endswith("a"):
        pixels = unmultiplied(pixels)
    pixels = _grey(pixels, channels)
    orientation, metadata = _settled(heif, data)
    if len(opened) > 1:
        metadata.notes.append(f"{len(opened)} pictures: the primary one alone is read")
    return _image(heif, "heic", np.ascontiguousarray(pixels), orientation, metadata, depth)


def encode_avif(image: ImageFile, quality: int) -> tuple[bytes, tuple[str, ...]]:
    """The file, of ``image.depth`` bits; ``quality`` 100 is without loss, below 90 colours have half the resolution."""
    import imagecodecs

    depth, grey = image.depth or 8, image.pixels.shape[2] <= 2
    pixels = _samples(image.pixels, depth)
    encoded = imagecodecs.avif_encode(
        pixels[..., 0] if pixels.shape[2] == 1 else pixels,
        level=quality,
        speed=SPEED,
        bitspersample=depth,
        pixelformat=None if grey else "444" if quality >= FULL_CHROMA else "420",
    )
    data = with_cicp(bytes(encoded), image.cicp or SRGB)
    return add_metadata(data, exif_with_density(image), image.xmp, image.icc_profile), ()


def encode_heic(image: ImageFile, quality: int) -> tuple[bytes, tuple[str, ...]]:
    """The file, of ``image.depth`` bits; ``quality`` 100 is without loss, below 90 colours have half the resolution."""
    import pillow_heif

    depth, channels = image.depth or 8, image.pixels.shape[2]
    pixels = _samples(image.pixels, depth)
    if depth > 8:
        pixels = pixels << (16 - depth)
    primaries, transfer = image.cicp or SRGB
    lossless = quality == 100
    options: dict[str, Any] = {
        "quality": -1 if lossless else quality,
        "chroma": "444" if quality >= FULL_CHROMA else "420",
        "color_primaries": primaries,
        "transfer_characteristics": transfer,
        "matrix_coefficients": IDENTITY if lossless and channels > 2 else BT601,
        "full_range_flag": 1,
        **({"bit_depth": depth} if depth > 8 else {}),
    }
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels] + (";16" if depth > 8 else "")
    buffer = io.BytesIO()
    pillow_heif.encode(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes(), buffer, **options)
    return add_metadata(buffer.getvalue(), exif_with_density(image), image.xmp, image.icc_profile), ()


def _parsed(data: bytes) -> Heif:
    heif = read_heif(data)
    if heif is None:
        raise ImageError("broken HEIF: it has no meta box")
    return heif


def _settled(heif: Heif, data: bytes) -> tuple[int, Metadata]:
    """The orientation that the boxes say, and the metadata with it set right."""
    metadata = Metadata(stored=heif.orientation())
    metadata.exif, metadata.xmp = heif.exif(metadata.notes), heif.xmp(metadata.notes)
    if data[8:12] in SEQUENCES:
        metadata.notes.append("a sequence of pictures: the first alone is read")
    return metadata.settle(), metadata


def _image(heif: Heif, format: str, pixels: np.ndarray, orientation: int, metadata: Metadata, depth: int) -> ImageFile:
    return ImageFile(
        pixels,
        format,
        icc_profile=heif.profile(),
        exif=metadata.exif,
        density=turned_density(metadata.resolution(), orientation),
        xmp=metadata.xmp,
        notes=tuple(metadata.notes),
        depth=depth,
        cicp=heif.cicp(),
    )


def _full_range(pixels: np.ndarray, depth: int) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else scaled(pixels, 16, depth)


def _grey(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Grey as such, where a decoder made colours of it."""
    if channels > 2 or pixels.shape[2] <= 2:
        return pixels
    return pixels[..., [0, 3]] if channels == 2 else pixels[..., :1]


def _samples(pixels: np.ndarray, depth: int) -> np.ndarray:
    """Whole numbers of ``depth`` bits, of what `fit` made."""
    return np.ascontiguousarray(pixels if pixels.dtype == np.uint8 else scaled(pixels, depth))
