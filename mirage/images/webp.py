"""WebP: its chunks apart from its picture, the picture through Pillow (libwebp).

libwebp refuses a picture for a chunk of metadata that is cut off, so it sees only what the picture is made of. Writing
is all its own: it carries EXIF, XMP and profile as they are.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image as PIL

from mirage.images.convert import exif_with_density
from mirage.images.metadata import Metadata, turned_density, upright
from mirage.images.types import ImageError, ImageFile, ImageHeader

__all__ = ["decode_webp", "encode_webp", "webp_header"]

PICTURE = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
EXIF = b"Exif\0\0"
METADATA_FLAGS = 0x20 | 0x08 | 0x04  # in VP8X: a profile, EXIF, XMP


def webp_header(data: bytes) -> ImageHeader | None:
    """What its first chunk says of the picture; None where the file ends before it."""
    for kind, body in _chunks(data):
        if kind == b"VP8X" and len(body) >= 10:
            width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (4, 7))
            return ImageHeader("webp", height, width, 4 if body[0] & 0x10 else 3, 8)
        if kind == b"VP8L" and len(body) >= 5:
            (packed,) = struct.unpack_from("<I", body, 1)
            size = ((packed >> 14) & 0x3FFF) + 1, (packed & 0x3FFF) + 1
            return ImageHeader("webp", *size, 4 if packed >> 28 & 1 else 3, 8)
        if kind == b"VP8 " and len(body) >= 10:
            width, height = struct.unpack_from("<HH", body, 6)
            return ImageHeader("webp", height & 0x3FFF, width & 0x3FFF, 3, 8)
    return None


def decode_webp(data: bytes) -> ImageFile:
    """Decode a WebP: RGB, with alpha where it has it, upright."""
    from PIL import WebPImagePlugin

    metadata, profile = Metadata(), None
    picture, lossless = [], True
    for kind, body in _chunks(data):
        if kind == b"EXIF":
            metadata.exif = metadata.exif or body.removeprefix(EXIF)
        elif kind == b"XMP ":
            metadata.xmp = metadata.xmp or body
        elif kind == b"ICCP":
            profile = profile or body
        elif kind == b"VP8X":
            picture.append((kind, bytes([body[0] & ~METADATA_FLAGS]) + body[1:]))
        elif kind in PICTURE:
            picture.append((kind, body))
            lossless &= kind not in (b"VP8 ", b"ALPH", b"ANMF")
    orientation = metadata.settle()
    packed = b"WEBP" + b"".join(_packed(kind, body) for kind, body in picture)
    with WebPImagePlugin.WebPImageFile(io.BytesIO(b"RIFF" + struct.pack("<I", len(packed)) + packed)) as opened:
        if opened.n_frames > 1:
            metadata.notes.append("an animation: its first picture alone is read")
        opened.load()
        image: PIL.Image = opened if opened.mode in ("RGB", "RGBA") else opened.convert("RGB")
        pixels = np.array(image)
    return ImageFile(
        upright(pixels, orientation),
        "webp",
        icc_profile=profile,
        exif=metadata.exif,
        density=turned_density(metadata.resolution(), orientation),
        xmp=metadata.xmp,
        notes=tuple(metadata.notes),
        lossless=lossless,
    )


def encode_webp(image: ImageFile, quality: int) -> tuple[bytes, tuple[str, ...]]:
    """The file: lossy, or lossless where the image came from a lossless WebP or ``quality`` is 100."""
    exif = exif_with_density(image)
    carried = {"exif": exif, "xmp": image.xmp, "icc_profile": image.icc_profile}
    lossless = quality == 100 or (image.lossless and image.format == "webp")
    buffer = io.BytesIO()
    PIL.fromarray(np.ascontiguousarray(image.pixels)).save(
        buffer,
        "WEBP",
        lossless=lossless,
        quality=75 if lossless else quality,  # of a lossless file: how hard to try
        exact=True,  # colours where nobody sees them are the caller's
        **{name: value for name, value in carried.items() if value},
    )
    return buffer.getvalue(), ()


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and body of each chunk that is whole; a cut-off one of the picture is an error."""
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > len(data):
            if kind in PICTURE:
                raise ImageError("broken WebP: image file is truncated")
            return
        yield kind, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _packed(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
