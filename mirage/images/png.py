"""PNG: its chunks apart from its picture, and together again.

Pillow decodes 8 bits, and silently drops the low byte of a 16-bit RGB image, so those go through imagecodecs (libpng).
Both see only what the picture is made of: no other chunk, however broken, keeps a sound picture from being read.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image as PIL
from PIL import PngImagePlugin

from mirage.images.convert import INCHES_IN_A_METRE
from mirage.images.metadata import Metadata, upright
from mirage.images.types import ImageError, ImageFile, ImageHeader

__all__ = ["SIGNATURE", "decode_png", "encode_png", "png_header"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOURS = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"pHYs")
EXIF = b"Exif\0\0"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
ANIMATION = b"acTL"
SRGB = (1, 13)  # as cICP has it: what a picture without any such chunk is taken for
XMP = b"XML:com.adobe.xmp"
RAW_PROFILE = b"Raw profile type "  # ImageMagick's way to keep a block, in hexadecimal, in a text
CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MOST_TEXT = 1 << 26  # bytes that a text or a profile may have, decompressed


@dataclass
class _Chunks:
    """What a file is made of; ``picture`` is the file without the rest."""

    picture: bytes = b""
    kept: list[tuple[bytes, bytes]] = field(default_factory=list)
    profile: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)


def png_header(data: bytes) -> ImageHeader | None:
    """What IHDR says of the picture; None where the file ends before it."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height, depth, colours = struct.unpack_from(">IIBB", data, 16)
    alpha = colours in (0, 2, 3) and data.find(b"tRNS", 33, max(33, data.find(b"IDAT", 33))) > 0
    return ImageHeader("png", height, width, CHANNELS.get(colours, 4) + alpha, 16 if depth == 16 else 8)


def decode_png(data: bytes) -> ImageFile:
    """Decode a PNG: 8 or 16 bits, palettes made RGB, transparency made alpha, upright."""
    found = _split(data)
    metadata = found.metadata
    orientation = metadata.settle()
    pixels = _decode_16_bits(found.picture) if data[24:25] == b"\x10" else _decode_8_bits(found.picture)
    chunks = tuple((kind, _turned(body) if kind == b"pHYs" and orientation > 4 else body) for kind, body in found.kept)
    return ImageFile(
        upright(pixels[..., None] if pixels.ndim == 2 else pixels, orientation),
        "png",
        icc_profile=found.profile,
        exif=metadata.exif,
        chunks=chunks,
        xmp=metadata.xmp,
        notes=tuple(metadata.notes),
        cicp=next(((body[0], body[1]) for kind, body in found.kept if kind == b"cICP" and len(body) == 4), None),
    )


def encode_png(image: ImageFile) -> tuple[bytes, tuple[str, ...]]:
    """The file, of the sample depth of the pixels, with what `ImageFile` has besides a JPEG's comment."""
    pixels = np.ascontiguousarray(image.pixels[..., 0] if image.pixels.shape[2] == 1 else image.pixels)
    if image.pixels.dtype == np.uint16:
        import imagecodecs

        data = bytes(imagecodecs.png_encode(pixels, level=6))
    else:
        buffer = io.BytesIO()
        PIL.fromarray(pixels).save(buffer, "PNG")
        data = buffer.getvalue()
    chunks = list(image.chunks)
    there = {kind for kind, _ in chunks}
    if image.icc_profile and b"iCCP" not in there:
        chunks.insert(0, (b"iCCP", b"ICC profile\0\0" + zlib.compress(image.icc_profile)))
    elif image.cicp not in (None, SRGB) and b"cICP" not in there and max(image.cicp or ()) < 256:
        chunks.insert(0, (b"cICP", bytes([*(image.cicp or ()), 0, 1])))
    if image.density is not None and b"pHYs" not in there:
        chunks.append((b"pHYs", _physical_size(image.density)))
    if image.exif:
        chunks.append((b"eXIf", image.exif))
    if image.xmp:
        chunks.append((b"iTXt", XMP + b"\0\0\0\0\0" + image.xmp))
    head = len(SIGNATURE) + 25  # the signature and IHDR; everything kept may stand right behind them
    return data[:head] + b"".join(_pack(kind, body) for kind, body in chunks) + data[head:], ()


def _decode_16_bits(picture: bytes) -> np.ndarray:
    import imagecodecs

    pixels = imagecodecs.png_decode(picture)
    if pixels.dtype != np.uint16:
        raise ImageError(f"expected 16-bit samples, the decoder gave {pixels.dtype}")
    return pixels


def _decode_8_bits(picture: bytes) -> np.ndarray:
    with PngImagePlugin.PngImageFile(io.BytesIO(picture)) as opened:
        opened.load()
        image: PIL.Image = opened
        if image.mode == "P" or "transparency" in image.info:
            grey = image.mode in ("1", "L")
            alpha = "transparency" in image.info
            image = image.convert(("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB"))
        elif image.mode not in MODES.values():
            image = image.convert("L" if image.mode in ("1", "I") else "RGB")
        return np.array(image)


def _split(data: bytes) -> _Chunks:
    """Take a file apart; from where it is no longer sound, it counts as the picture's."""
    found = _Chunks()
    picture = [SIGNATURE]
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if kind[0] & 0x20 and kind != b"tRNS":  # its name begins with a small letter: the picture does without
            body = data[at + 8 : end - 4]
            if struct.unpack_from(">I", data, end - 4)[0] == zlib.crc32(body, zlib.crc32(kind)):
                _take(found, kind, body)
            elif kind in (*COLOURS, *TEXTS, b"eXIf"):
                found.metadata.notes.append(f"{kind.decode()} left out: its checksum is wrong")
        else:
            picture.append(data[at:end])
        at = end
        if kind == b"IEND":
            break
    found.picture = b"".join([*picture, data[at:]])
    return found


def _take(found: _Chunks, kind: bytes, body: bytes) -> None:
    metadata = found.metadata
    if kind == b"eXIf":
        metadata.exif = body.removeprefix(EXIF)
    elif kind == b"iCCP":
        found.profile = _inflated(body.partition(b"\0")[2][1:])
        if found.profile is None:
            metadata.notes.append("colour profile left out: it cannot be decompressed")
        else:
            found.kept.append((kind, body))
    elif kind in COLOURS:
        found.kept.append((kind, body))
    elif kind == ANIMATION:
        metadata.notes.append("an animation: its first picture alone is read")
    elif kind in TEXTS:
        name = body.partition(b"\0")[0]
        if name == XMP and kind == b"iTXt":
            metadata.xmp = metadata.xmp or _international_text(body)
        elif name.startswith(RAW_PROFILE):
            _take_raw_profile(metadata, name.removeprefix(RAW_PROFILE), kind, body)
        else:
            found.kept.append((kind, body))


def _take_raw_profile(metadata: Metadata, name: bytes, kind: bytes, body: bytes) -> None:
    """EXIF or XMP as ImageMagick has it: name, length, and hexadecimal digits in lines."""
    stored = body.partition(b"\0")[2]
    text = (_inflated(stored[1:]) or b"") if kind == b"zTXt" else stored
    match = re.fullmatch(rb"\s*\S+\s+\d+\s+([0-9A-Fa-f\s]*)", text)
    digits = re.sub(rb"\s", b"", match[1]) if match else b""
    block = bytes.fromhex(digits.decode()) if len(digits) % 2 == 0 else b""
    if name in (b"exif", b"APP1") and block.startswith((EXIF, b"II*\0", b"MM\0*")):
        metadata.exif = metadata.exif or block.removeprefix(EXIF)
    elif name == b"xmp" and block:
        metadata.xmp = metadata.xmp or block


def _international_text(body: bytes) -> bytes | None:
    """The text of an iTXt chunk, UTF-8."""
    rest = body.partition(b"\0")[2]  # whether it is compressed, how, language, translated keyword, text
    text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _inflated(text) if rest[:1] == b"\1" else text


def _inflated(data: bytes) -> bytes | None:
    """What a zlib stream holds; None where it is broken or larger than any profile or text."""
    try:
        stream = zlib.decompressobj()
        out = stream.decompress(data, MOST_TEXT)
    except zlib.error:
        return None
    return out if stream.eof else None


def _physical_size(density: tuple[float, float, int]) -> bytes:
    """pHYs for a pixel density as `ImageFile` has it: pixels per metre."""
    x, y, unit = density
    per_metre = {0: 1.0, 1: 1 / INCHES_IN_A_METRE, 2: 100.0}[unit]
    return struct.pack(">IIB", round(x * per_metre), round(y * per_metre), 1 if unit else 0)


def _turned(physical_size: bytes) -> bytes:
    return physical_size[4:8] + physical_size[:4] + physical_size[8:]


def _pack(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
