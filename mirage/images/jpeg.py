"""JPEG: its segments apart from its picture, and together again.

Pillow sees only what the picture is made of. What else a file has is read and written here, so that no broken entry of
it keeps a sound picture from being read, and what is carried over stays the same to the byte.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field

import numpy as np
from PIL import Image as PIL
from PIL import JpegImagePlugin

from mirage.images.convert import density_of, rgb_of_cmyk
from mirage.images.metadata import Metadata, turned_density, upright
from mirage.images.types import ImageError, ImageFile, ImageHeader

__all__ = ["decode_jpeg", "encode_jpeg", "jpeg_header"]

EXIF, XMP, ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
APP0, APP1, APP2, APP14, APP15, COM, SOS = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE, 0xDA
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
MOST = 65533  # bytes in a segment
TIFF_HEADERS = (b"II*\0", b"MM\0*")


@dataclass
class _Segments:
    """What a file is made of; ``picture`` is the file without the rest."""

    picture: bytes = b""
    header: ImageHeader | None = None
    depth: int = 8
    density: tuple[int, int, int] | None = None
    profile: dict[int, bytes] = field(default_factory=dict)
    profile_parts: int = 0
    comment: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)


def jpeg_header(data: bytes) -> ImageHeader | None:
    """What the frame says of the picture; None where the file ends before it."""
    return _split(data).header


def decode_jpeg(data: bytes) -> ImageFile:
    """Decode a JPEG: grey or RGB, CMYK made RGB, upright."""
    found = _split(data)
    if found.depth != 8:
        raise ImageError(f"a JPEG of {found.depth} bits per sample is not read")
    metadata = found.metadata
    orientation = metadata.settle()
    profile = _joined_profile(found)
    with JpegImagePlugin.JpegImageFile(io.BytesIO(found.picture)) as opened:
        opened.load()
        if opened.mode in ("L", "RGB"):
            pixels = np.array(opened)
        else:
            pixels, profile = rgb_of_cmyk(opened, profile, metadata.notes), None
    density: tuple[float, float, int] | None = found.density
    if density is None or density[2] == 0:
        density = metadata.resolution() or density
    return ImageFile(
        upright(pixels[..., None] if pixels.ndim == 2 else pixels, orientation),
        "jpeg",
        icc_profile=profile,
        exif=metadata.exif,
        density=turned_density(density, orientation),
        xmp=metadata.xmp,
        comment=found.comment,
        notes=tuple(metadata.notes),
    )


def encode_jpeg(image: ImageFile, quality: int) -> tuple[bytes, tuple[str, ...]]:
    """The file, without chroma subsampling, with what `ImageFile` has besides texts; and what it could not carry."""
    pixels, notes = image.pixels, []
    buffer = io.BytesIO()
    squeezed = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    PIL.fromarray(np.ascontiguousarray(squeezed)).save(buffer, "JPEG", quality=quality, subsampling=0)
    plain = buffer.getvalue()
    end = 4 + struct.unpack_from(">H", plain, 4)[0]  # of the JFIF segment, which Pillow writes first
    jfif = bytearray(plain[:end])
    density = density_of(image)
    if density is not None:
        x, y, unit = round(density[0]), round(density[1]), density[2]
        if 0 < x < 65536 and 0 < y < 65536:
            struct.pack_into(">BHH", jfif, 13, unit, x, y)
    segments = [*_parts(APP1, EXIF, image.exif or b""), *_profile_segments(image.icc_profile or b"")]
    if image.xmp and len(XMP) + len(image.xmp) <= MOST:
        segments.append(_segment(APP1, XMP + image.xmp))
    elif image.xmp:
        notes.append(f"XMP left out: a JPEG has room for {MOST - len(XMP):,} bytes, and it has {len(image.xmp):,}")
    if image.comment:
        segments.append(_segment(COM, image.comment[:MOST]))
    return bytes(jfif) + b"".join(segments) + plain[end:], tuple(notes)


def _split(data: bytes) -> _Segments:
    """Take a file apart up to its first scan; from where it is no longer sound, it counts as the picture's."""
    found = _Segments()
    kept = [data[:2]]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = 0 if marker in BARE else struct.unpack_from(">H", data, at + 2)[0]
        end = at + 2 + length
        if marker == SOS or (marker not in BARE and length < 2) or end > len(data):
            break
        if not _take(found, marker, data[at + 4 : end]):
            kept.append(data[at:end])
        at = end
    found.picture = b"".join([*kept, data[at:]])
    return found


def _take(found: _Segments, marker: int, body: bytes) -> bool:
    """Note what a segment says; whether it is not part of the picture."""
    if marker in FRAMES and len(body) >= 6:
        depth, height, width, components = struct.unpack_from(">BHHB", body)
        found.depth = depth
        found.header = ImageHeader("jpeg", height, width, 1 if components == 1 else 3, 8)
    elif marker == APP0 and body.startswith(b"JFIF\0") and len(body) >= 12:
        unit, x, y = struct.unpack_from(">BHH", body, 7)
        if unit <= 2 and x and y and (unit or x != y):
            found.density = (x, y, unit)
    elif marker == APP1 and body.startswith(EXIF):
        _take_exif(found.metadata, body[len(EXIF) :])
        return True
    elif marker == APP1 and body.startswith(XMP):
        found.metadata.xmp = found.metadata.xmp or body[len(XMP) :]
        return True
    elif marker == APP2 and body.startswith(ICC) and len(body) > len(ICC) + 2:
        found.profile_parts = body[len(ICC) + 1]
        found.profile.setdefault(body[len(ICC)], body[len(ICC) + 2 :])
        return True
    elif marker == COM:
        found.comment = found.comment or body
        return True
    else:
        return APP0 <= marker <= APP15 and not (marker == APP14 and body.startswith(b"Adobe"))
    return False


def _take_exif(metadata: Metadata, part: bytes) -> None:
    """A block longer than a segment goes on in the next one; a second block is not read."""
    if metadata.exif is None:
        metadata.exif = part
    elif not part.startswith(TIFF_HEADERS):
        metadata.exif += part


def _joined_profile(found: _Segments) -> bytes | None:
    if not found.profile:
        return None
    if sorted(found.profile) != list(range(1, found.profile_parts + 1)):
        found.metadata.notes.append("colour profile left out: some of its parts are missing")
        return None
    return b"".join(part for _, part in sorted(found.profile.items()))


def _profile_segments(profile: bytes) -> list[bytes]:
    size = MOST - len(ICC) - 2
    parts = [profile[at : at + size] for at in range(0, len(profile), size)]
    return [_segment(APP2, ICC + bytes([i, len(parts)]) + part) for i, part in enumerate(parts, 1)]


def _parts(marker: int, name: bytes, data: bytes) -> list[bytes]:
    size = MOST - len(name)
    return [_segment(marker, name + data[at : at + size]) for at in range(0, len(data), size)]


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
