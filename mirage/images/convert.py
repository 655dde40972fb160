"""Making a picture fit into a format: sample depths, grey and colour, profiles that belong to other colours."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from typing import Any

import numpy as np

from mirage.images.ifd import with_resolution
from mirage.images.types import FORMAT_SPECS, ImageError, ImageFile, require

__all__ = [
    "INCHES_IN_A_METRE",
    "check_writable",
    "density_of",
    "depth_of",
    "exif_with_density",
    "fit",
    "rgb_of_cmyk",
    "scaled",
    "unmultiplied",
]

INCHES_IN_A_METRE = 0.0254
ORDINARY_PRIMARIES = (1, 2)  # BT.709, which are sRGB's, and "not said"
ORDINARY_TRANSFERS = (1, 2, 6, 13, 14, 15)  # sRGB's, and the video curves that viewers take for it


def check_writable(format: str, channels: int, height: int = 1, width: int = 1) -> None:
    """Whether such a picture can be written: to be asked before the time is spent that making it takes.

    Raises:
        ImageError: ``format`` is unknown, its library is not installed, it has no alpha channel and the picture has
            one, or its sides may not be that long.
    """
    if format not in FORMAT_SPECS:
        raise ImageError(f"format: expected one of {', '.join(FORMAT_SPECS)}, got {format!r}")
    spec = FORMAT_SPECS[format]
    article = "an" if spec.title == "AVIF" else "a"
    if channels in (2, 4) and not spec.alpha:
        raise ImageError(f"format: {article} {spec.title} has no alpha channel and this image has one; write PNG")
    if max(height, width) > spec.most:
        raise ImageError(
            f"format: {article} {spec.title} has at most {spec.most} pixels a side, not {width}x{height}"
        )
    require(format)


def fit(image: ImageFile, format: str) -> tuple[ImageFile, tuple[str, ...]]:
    """The image as ``format`` can hold it, and notes on what it loses by that.

    Its pixels are of a depth that the format has: uint8; or uint16, of which ``depth`` says how many bits are written;
    or float32.
    """
    spec = FORMAT_SPECS[format]
    notes: list[str] = []
    depth = depth_of(image)
    target = _nearest(depth, spec.write_depths, most=10 if format == "heic" else 32)
    pixels = image.pixels
    if target < depth:
        what = "float32" if depth == 32 else f"{depth} bits"
        notes.append(f"samples of {what} rounded to {target} bits, for {spec.title}")
    if pixels.dtype == np.float32 and target != 32:
        pixels = scaled(pixels, target)
        pixels = pixels if target in (8, 16) else scaled(pixels, 16, target)
    elif target == 8 and pixels.dtype == np.uint16:
        pixels = scaled(pixels, 8)
    if pixels.shape[2] <= 2 and not spec.grey:
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
        notes.append(f"grey written as RGB: {spec.title} has no grey")
    grey, profile, chunks = pixels.shape[2] <= 2, image.icc_profile, image.chunks
    space = _space(profile)
    odd_but_theirs = space == b"RGB " and grey and format == image.format  # as it came
    if space not in (None, b"GRAY" if grey else b"RGB ") and not odd_but_theirs:
        picture = "grey" if grey else "RGB"
        notes.append(f"colour profile left out: it is for {_text(space)}, and the picture is {picture}")
        profile, chunks = None, tuple(chunk for chunk in chunks if chunk[0] != b"iCCP")
    cicp = image.cicp
    if cicp is not None and format in ("jpeg", "tiff", "webp") and profile is None and _unusual(cicp):
        notes.append(f"colours left unsaid: {spec.title} cannot say primaries {cicp[0]}, transfer function {cicp[1]}")
    return replace(image, pixels=pixels, depth=target, icc_profile=profile, chunks=chunks), tuple(notes)


def depth_of(image: ImageFile) -> int:
    """Bits per sample that the pixels have: of uint16 those of the file, where they are fewer."""
    if image.pixels.dtype == np.uint16:
        return image.depth if image.depth is not None and 8 < image.depth < 16 else 16
    return 8 if image.pixels.dtype == np.uint8 else 32


def scaled(pixels: np.ndarray, bits: int, given: int | None = None) -> np.ndarray:
    """Samples as whole numbers of ``bits`` bits (1 to 16), rounded to the nearest.

    Args:
        pixels: whole numbers of ``given`` bits, by default those of their type, or float32, of which what lies outside
            [0, 1] is clipped.

    Returns:
        uint8 up to 8 bits, else uint16; the largest value stays the largest.
    """
    dtype, most = np.uint8 if bits <= 8 else np.uint16, (1 << bits) - 1
    if pixels.dtype.kind == "f":
        return np.rint(np.clip(pixels, 0, 1) * np.float32(most)).astype(dtype)
    full = (1 << (given or 8 * pixels.dtype.itemsize)) - 1
    if full == most:
        return pixels.astype(dtype, copy=False)
    return ((pixels.astype(np.uint32) * np.uint32(most) + np.uint32(full // 2)) // np.uint32(full)).astype(dtype)


def density_of(image: ImageFile) -> tuple[float, float, int] | None:
    """Pixel density as ``image.density`` has it; a PNG's own, in whole dots per inch where it comes to some."""
    if image.density is not None:
        return image.density
    body = next((body for kind, body in image.chunks if kind == b"pHYs" and len(body) == 9), None)
    if body is None:
        return None
    x, y, unit = struct.unpack(">IIB", body)
    if not x or not y or unit > 1:
        return None
    return (_per_inch(x), _per_inch(y), 1) if unit == 1 else (x, y, 0)


def exif_with_density(image: ImageFile) -> bytes | None:
    """EXIF for formats that have no other place for the pixel density."""
    density = density_of(image)
    return with_resolution(image.exif, *density) if density is not None and density[2] else image.exif


def rgb_of_cmyk(picture: Any, profile: bytes | None, notes: list[str]) -> np.ndarray:
    """``[H, W, 3]`` uint8 of Pillow's CMYK picture: sRGB by its colour profile, else by the plain formula."""
    from PIL import ImageCms

    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            notes.append("CMYK made sRGB by the file's colour profile")
            return np.array(converted)
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    notes.append("CMYK made RGB without a colour profile: its colours are approximate")
    return np.array(picture.convert("RGB"))


def unmultiplied(picture: np.ndarray) -> np.ndarray:
    """``[H, W, C]`` whose colours were multiplied by alpha, its last channel, without that."""
    most = 1.0 if picture.dtype == np.float32 else float(np.iinfo(picture.dtype).max)
    alpha = picture[..., -1:].astype(np.float64)
    colours = np.divide(picture[..., :-1] * most, alpha, out=np.zeros(picture[..., :-1].shape), where=alpha > 0)
    colours = colours.clip(0, most)
    rounded = colours if picture.dtype == np.float32 else np.rint(colours)
    return np.concatenate([rounded.astype(picture.dtype), picture[..., -1:]], axis=2)


def _per_inch(per_metre: int) -> float:
    exact = per_metre * INCHES_IN_A_METRE
    whole = round(exact)
    return whole if whole and round(whole / INCHES_IN_A_METRE) == per_metre else exact


def _nearest(depth: int, held: tuple[int, ...], most: int) -> int:
    """The depth that holds ``depth`` bits, or the largest that a 16-bit picture is written with."""
    return next((bits for bits in held if bits >= depth), max(bits for bits in held if bits <= most))


def _space(profile: bytes | None) -> bytes | None:
    """The colour space that a profile is for; None where it is no profile."""
    return profile[16:20] if profile and profile[36:40] == b"acsp" else None


def _text(space: bytes | None) -> str:
    return (space or b"").decode("latin1").strip()


def _unusual(cicp: tuple[int, int]) -> bool:
    return cicp[0] not in ORDINARY_PRIMARIES or cicp[1] not in ORDINARY_TRANSFERS
