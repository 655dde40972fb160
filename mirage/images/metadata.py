"""Which way up an image is, and its metadata with that set right: EXIF and XMP, patched and never rewritten.

Of an EXIF block nothing is read but the orientation and the resolution, by their entries in the first directory. All
else may be wrong in whatever way: it is carried over as it is, and no picture is refused for it. An orientation that
has been applied to the pixels is taken out of the directory, and nothing else in the block moves.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Metadata", "turned_density", "upright"]

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x011A, 0x011B, 0x0128
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # TIFF's types of whole numbers
_RATIONAL = 5
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation\s*(?:=\s*[\"']|>)\s*)([1-8])(?=\s*[\"'<])")
_XMP_OF_PARTS = re.compile(rb"MicroVideo|MotionPhoto|GContainer|Container:Directory|hdrgm:|HasExtendedXMP")


@dataclass
class Metadata:
    """The EXIF block and the XMP packet of a file, as it was read.

    `settle` finds the orientation and makes both say that the picture is upright; `notes` says what was not read.
    ``stored`` is the orientation that the format itself has a place for (TIFF's tag, the boxes of AVIF and HEIC), which
    goes before both; None where it has no such place, or nothing there.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    notes: list[str] = field(default_factory=list)
    stored: int | None = None

    def settle(self) -> int:
        """The orientation, 1 to 8, to be applied to the pixels."""
        orientation: int | None = None
        entries: list[tuple[int, str]] = []
        if self.exif and _order(self.exif) is None:
            self.notes.append(f"EXIF left out: no TIFF header, but {self.exif[:8]!r}")
            self.exif = None
        self.exif = self.exif or None
        if self.exif is not None:
            orientation, entries = self._find_orientation(self.exif)
        if self.xmp is not None and _XMP_OF_PARTS.search(self.xmp):
            self.notes.append("XMP left out: it describes other parts of the file (a video, a gain map), which are too")
            in_xmp, self.xmp = _XMP_ORIENTATION.search(self.xmp), None
        else:
            in_xmp = _XMP_ORIENTATION.search(self.xmp) if self.xmp is not None else None
        if orientation is None:
            orientation = int(in_xmp[2]) if in_xmp and not entries else 1
        said = orientation
        if self.stored is not None:
            orientation = self.stored
            if said not in (1, self.stored):
                self.notes.append(f"orientation {said} of EXIF or XMP not applied: the file's own says {self.stored}")
        if said != 1 or orientation != 1:
            for at, layout in reversed(entries):
                self.exif = _without_entry(self.exif or b"", at, layout)
            if self.xmp is not None:
                self.xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", self.xmp)
        return orientation

    def resolution(self) -> tuple[float, float, int] | None:
        """EXIF's resolution as `ImageFile.density` has it, in whole dots per inch or cm; None where it has none."""
        if self.exif is None:
            return None
        unit, found = 1, {}
        order = _order(self.exif)
        for at, tag, kind, count in _entries(self.exif):
            if tag == RESOLUTION_UNIT and kind == 3 and count == 1:
                unit = {2: 1, 3: 2}.get(struct.unpack_from(f"{order}H", self.exif, at + 8)[0], 0)
            elif tag in (X_RESOLUTION, Y_RESOLUTION) and kind == _RATIONAL and count == 1:
                (place,) = struct.unpack_from(f"{order}I", self.exif, at + 8)
                if place + 8 <= len(self.exif):
                    above, below = struct.unpack_from(f"{order}II", self.exif, place)
                    found[tag] = round(above / below) if below else 0
        x, y = found.get(X_RESOLUTION, 0), found.get(Y_RESOLUTION, 0)
        return (x, y, unit) if unit and 0 < x < 65536 and 0 < y < 65536 else None

    def _find_orientation(self, exif: bytes) -> tuple[int | None, list[tuple[int, str]]]:
        """The orientation where an entry has one, and the places of its entries, with how they are stored.

        An entry that says nothing (a number outside 1 to 8) counts as 1 and stays; so does what is no single number.
        """
        values: list[int] = []
        entries: list[tuple[int, str]] = []
        if not _has_directory(exif):
            self.notes.append("EXIF orientation not read: its directory lies outside the block")
        for at, tag, kind, count in _entries(exif):
            if tag != ORIENTATION:
                continue
            if kind in _INTEGERS and count == 1:
                layout = f"{_order(exif)}{_INTEGERS[kind]}"
                values.append(struct.unpack_from(layout, exif, at + 8)[0])
                entries.append((at, layout))
            else:
                self.notes.append(f"EXIF orientation not read: expected one number, got type {kind}, {count} values")
        if not values:
            return None, entries
        return (values[0] if 1 <= values[0] <= 8 else 1), entries


def turned_density(density: tuple[float, float, int] | None, orientation: int) -> tuple[float, float, int] | None:
    """A pixel density with x and y exchanged where the orientation exchanges width and height."""
    if density is None or orientation <= 4:
        return density
    return density[1], density[0], density[2]


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn ``[H, W, C]`` as the orientation asks for: 1 to 8, as in TIFF and EXIF."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _order(exif: bytes) -> str | None:
    """The byte order of a TIFF header, as `struct` has it; None where there is no header."""
    return {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4]) if len(exif) >= 8 else None


def _has_directory(exif: bytes) -> bool:
    (start,) = struct.unpack_from(f"{_order(exif)}I", exif, 4)
    return 8 <= start <= len(exif) - 2


def _entries(exif: bytes) -> Iterator[tuple[int, int, int, int]]:
    """``(place, tag, type, count)`` of each entry of the first directory that lies within the block."""
    order = _order(exif)
    if order is None or not _has_directory(exif):
        return
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (number,) = struct.unpack_from(f"{order}H", exif, start)
    for at in range(start + 2, min(start + 2 + 12 * number, len(exif) - 11), 12):
        yield (at, *struct.unpack_from(f"{order}HHI", exif, at))


def _without_entry(exif: bytes, at: int, layout: str) -> bytes:
    """Close the gap that an entry leaves in its directory; where the directory's end is missing, make the entry a 1."""
    order = _order(exif)
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (number,) = struct.unpack_from(f"{order}H", exif, start)
    end = start + 2 + 12 * number + 4  # behind the entries, the place of the next directory
    if end > len(exif):
        one = struct.pack(layout, 1)
        return exif[: at + 8] + one + exif[at + 8 + len(one) :]
    count = struct.pack(f"{order}H", number - 1)
    return exif[:start] + count + exif[start + 2 : at] + exif[at + 12 : end] + bytes(12) + exif[end:]
