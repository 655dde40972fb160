"""EXIF blocks, JPEG and PNG files written by hand, to the byte."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
from PIL import Image as PIL

BYTE, ASCII, SHORT, LONG, RATIONAL, SSHORT, SLONG = 1, 2, 3, 4, 5, 8, 9
MAKE, ORIENTATION, X_RESOLUTION, Y_RESOLUTION, UNIT, ARTIST = 0x010F, 0x0112, 0x011A, 0x011B, 0x0128, 0x013B
GPS = 0x8825
SIZES = {BYTE: 1, ASCII: 1, SHORT: 2, LONG: 4, RATIONAL: 8, SSHORT: 2, SLONG: 4}


def entry(tag: int, kind: int, value: bytes, count: int | None = None) -> tuple[int, int, int, bytes]:
    return tag, kind, len(value) // SIZES[kind] if count is None else count, value


def block(entries, order: str = "<", tail: bytes = b"") -> bytes:
    """A TIFF header, one directory, the values that do not fit into their entries, and ``tail``."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    data_at = 8 + 2 + 12 * len(entries) + 4
    directory, data = struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, count, value in entries:
        if len(value) > 4:
            place, data = struct.pack(f"{order}I", data_at + len(data)), data + value + bytes(len(value) % 2)
        else:
            place = value.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, count) + place
    return head + directory + bytes(4) + data + tail


def photograph(orientation: bytes | None, order: str = "<", kind: int = SHORT) -> bytes:
    """What a camera writes: maker, orientation, resolution, artist in UTF-8, GPS, a note of the maker's own."""
    gps_at = 0  # patched below
    entries = [
        entry(MAKE, ASCII, b"A maker\0"),
        *([entry(ORIENTATION, kind, orientation)] if orientation is not None else []),
        entry(X_RESOLUTION, RATIONAL, struct.pack(f"{order}II", 300, 1)),
        entry(Y_RESOLUTION, RATIONAL, struct.pack(f"{order}II", 300, 1)),
        entry(UNIT, SHORT, struct.pack(f"{order}H", 2)),
        entry(ARTIST, ASCII, "José\0".encode()),
        entry(0x8298, ASCII, b"whose\0"),
        entry(GPS, LONG, struct.pack(f"{order}I", gps_at)),
    ]
    gps_at = len(block(entries, order))
    entries[-1] = entry(GPS, LONG, struct.pack(f"{order}I", gps_at))
    gps = struct.pack(f"{order}H", 1) + struct.pack(f"{order}HHI", 1, ASCII, 2) + b"N\0\0\0" + bytes(4)
    return block(entries, order, gps + b"\x00\xff maker's own \x80 bytes")


def directory(exif: bytes) -> dict[int, bytes]:
    """The entries of the first directory as they lie there: type, count, value or its place."""
    order = "<" if exif[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (number,) = struct.unpack_from(f"{order}H", exif, start)
    places = range(start + 2, start + 2 + 12 * number, 12)
    return {struct.unpack_from(f"{order}H", exif, at)[0]: exif[at + 2 : at + 12] for at in places}


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(pixels: np.ndarray, *segments: bytes, jfif: bool = True) -> bytes:
    """Pillow's file of these pixels with segments behind its JFIF header, or in its place."""
    buffer = io.BytesIO()
    PIL.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    plain = buffer.getvalue()
    return plain[: 20 if jfif else 2] + b"".join(segments) + plain[20:]


def exif_segment(exif: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + exif)


def jpeg_segments(data: bytes) -> list[tuple[int, bytes]]:
    """Marker and body of every segment before the first scan."""
    found, at = [], 2
    while data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        found.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: np.ndarray, *chunks: bytes, late: bool = False) -> bytes:
    """libpng's file of these pixels, 8 or 16 bits, with chunks behind IHDR; ``late``: behind IDAT."""
    plain = bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels)))
    at = len(plain) - 12 if late else 33
    return plain[:at] + b"".join(chunks) + plain[at:]


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type and body of every chunk, checksums checked."""
    found, at = [], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        assert data[at + 8 + length : at + 12 + length] == struct.pack(">I", zlib.crc32(kind + body))
        found.append((kind, body))
        at += 12 + length
    assert at == len(data)
    return found
