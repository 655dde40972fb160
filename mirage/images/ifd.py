"""Directories of TIFF and EXIF: taken out of a TIFF as an EXIF block, and put into one.

An EXIF block is a TIFF without a picture, so both ways nothing is rewritten that can stay: a TIFF is written behind the
block, whose bytes keep their places (makers' notes have places of their own inside, which nobody else knows), and a
block is taken from a TIFF with every value at its old place where that lies within the first 64 KiB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

__all__ = ["Directory", "Entry", "exif_of_tiff", "first_directory", "merge_into_tiff", "with_resolution"]

EXIF_IFD, GPS_IFD, INTEROPERABILITY_IFD = 0x8769, 0x8825, 0xA005
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128
RESOLUTION = frozenset((X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT))
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
IN_A_BLOCK = 65_000  # bytes: an EXIF block should fit into a JPEG's segment
MOST_ENTRIES = 4096

# What describes the picture of a TIFF itself, or has a place of its own in other formats (XMP, ICC, IPTC, Photoshop's
# blocks): none of an EXIF block's business.
_STRUCTURE = frozenset(
    (*range(0x00FE, 0x010D), 0x0111, 0x0112, *range(0x0115, 0x011A), 0x011C, *range(0x0120, 0x0126), 0x0129, 0x013D,
     *range(0x0140, 0x015C), *range(0x0200, 0x0210), *range(0x0211, 0x0215), 0x02BC, *range(0x80E3, 0x80E7), 0x83BB,
     0x8649, 0x8773, 0x935C)
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One entry: ``value`` has its bytes as they lie in the file, at ``place``."""

    tag: int
    kind: int
    count: int
    value: bytes
    place: int
    children: Directory | None = None


@dataclass(frozen=True)
class Directory:
    """A directory's entries whose values lie within the file, its place, and how many entries do not."""

    order: str
    place: int
    entries: tuple[Entry, ...]
    next: int
    lost: int = 0

    def get(self, tag: int) -> Entry | None:
        """The entry, or None."""
        return next((entry for entry in self.entries if entry.tag == tag), None)

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The whole numbers that an entry has."""
        entry = self.get(tag)
        letter = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}.get(entry.kind) if entry else None
        if entry is None or letter is None:
            return default
        return struct.unpack(f"{self.order}{entry.count}{letter}", entry.value)


def first_directory(data: bytes) -> Directory | None:
    """The first directory of a TIFF (a BigTIFF too) or an EXIF block; None where it is not there."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return None
    (version,) = struct.unpack_from(f"{order}H", data, 2)
    if version not in (42, 43):
        return None
    (place,) = struct.unpack_from(f"{order}{'Q' if version == 43 else 'I'}", data, 8 if version == 43 else 4)
    return read_directory(data, place, order, version == 43)


def read_directory(data: bytes, place: int, order: str, big: bool = False) -> Directory | None:
    """The directory at a place, without those below it; None where it lies outside."""
    counts, size, word, inline = ("Q", 20, "Q", 8) if big else ("H", 12, "I", 4)
    head = struct.calcsize(f"={counts}")
    if place < 8 or place + head > len(data):
        return None
    (number,) = struct.unpack_from(f"{order}{counts}", data, place)
    entries, lost = [], 0
    for i in range(min(number, MOST_ENTRIES)):
        at = place + head + i * size
        if at + size > len(data):
            lost += 1
            continue
        tag, kind, count = struct.unpack_from(f"{order}HH{word}", data, at)
        length = SIZES.get(kind, 0) * count
        where = at + size - inline
        if length > inline:
            (where,) = struct.unpack_from(f"{order}{word}", data, where)
        if kind not in SIZES or where + length > len(data):
            lost += 1
            continue
        entries.append(Entry(tag, kind, count, data[where : where + length], where))
    end = place + head + number * size
    following = int.from_bytes(data[end : end + inline], "little" if order == "<" else "big")
    return Directory(order, place, tuple(entries), following, lost + max(0, number - MOST_ENTRIES))


def exif_of_tiff(data: bytes, notes: list[str]) -> bytes | None:
    """The EXIF block that says what a TIFF's first directory does besides its picture; None where that is nothing."""
    directory = first_directory(data)
    if directory is None:
        return None
    if directory.lost:
        notes.append(f"EXIF left out in part: {directory.lost} of its first entries cannot be read")
    big = data[2:4] in (b"+\0", b"\0+")
    kept = _with_children(data, replace(directory, entries=tuple(filter(_describes, directory.entries))), big)
    entries = [entry for entry in kept.entries if entry.tag not in (EXIF_IFD, GPS_IFD) or entry.children is not None]
    if len(entries) < len(kept.entries):
        notes.append("EXIF left out in part: a directory of it lies outside the file")
    if all(entry.tag in RESOLUTION for entry in entries):
        return None
    kept = replace(kept, entries=tuple(entries))
    return _block_in_place(data, kept) if not big and _end(kept) <= IN_A_BLOCK else _packed_block(kept)


def merge_into_tiff(tiff: bytes, page: int, exif: bytes) -> tuple[bytes, int]:
    """Make a directory behind all others the TIFF's first: the picture's entries, and those of the EXIF block.

    Args:
        tiff: a file that begins with ``exif`` (but for its header).
        page: place of the picture's directory.

    Returns:
        The file, and how many entries of the block's first directory were left out because they lie outside it.
    """
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    described = first_directory(exif)
    entries = _raw_entries(tiff, page, order)
    lost = 0
    if described is not None:
        lost = described.lost
        raw = _raw_entries(exif, described.place, order)
        for entry in filter(_describes, described.entries):
            entries.setdefault(entry.tag, raw[entry.tag])
    place = len(tiff) + len(tiff) % 2
    packed = b"".join(entries[tag] for tag in sorted(entries))
    directory = struct.pack(f"{order}H", len(entries)) + packed + bytes(4)
    header = tiff[:4] + struct.pack(f"{order}I", place)
    return header + tiff[8:] + bytes(len(tiff) % 2) + directory, lost


def with_resolution(exif: bytes | None, x: float, y: float, unit: int) -> bytes:
    """An EXIF block that says the resolution: a new one, or one whose first directory, where it does not say any, is
    written anew behind all else. ``unit``: 1 (inch) or 2 (cm)."""
    exif = exif or b"MM\0*" + struct.pack(">IHI", 8, 0, 0)
    directory = first_directory(exif + bytes(16))
    if directory is None or directory.lost or any(entry.tag in RESOLUTION for entry in directory.entries):
        return exif
    order = directory.order
    entries = _raw_entries(exif, directory.place, order)
    values = len(exif) + len(exif) % 2
    rationals = b"".join(struct.pack(f"{order}II", *_rational(number)) for number in (x, y))
    for i, tag in enumerate((X_RESOLUTION, Y_RESOLUTION)):
        entries[tag] = struct.pack(f"{order}HHII", tag, 5, 1, values + 8 * i)
    entries[RESOLUTION_UNIT] = struct.pack(f"{order}HHIHH", RESOLUTION_UNIT, 3, 1, unit + 1, 0)
    packed = b"".join(entries[tag] for tag in sorted(entries))
    new = struct.pack(f"{order}H", len(entries)) + packed + struct.pack(f"{order}I", directory.next)
    return exif[:4] + struct.pack(f"{order}I", values + 16) + exif[8:] + bytes(len(exif) % 2) + rationals + new


def _rational(number: float) -> tuple[int, int]:
    from fractions import Fraction

    fraction = Fraction(number).limit_denominator(10_000)
    return fraction.numerator, fraction.denominator


def _raw_entries(data: bytes, place: int, order: str) -> dict[int, bytes]:
    """The 12 bytes of each entry of a classic directory, the first of each tag."""
    found: dict[int, bytes] = {}
    (number,) = struct.unpack_from(f"{order}H", data, place)
    for at in range(place + 2, min(place + 2 + 12 * number, len(data) - 11), 12):
        found.setdefault(struct.unpack_from(f"{order}H", data, at)[0], data[at : at + 12])
    return found


def _describes(entry: Entry) -> bool:
    """Whether an entry says something of the photograph rather than of how it is stored."""
    return entry.tag not in _STRUCTURE and entry.kind <= 13 and len(entry.value) <= IN_A_BLOCK


def _with_children(data: bytes, directory: Directory, big: bool, depth: int = 0) -> Directory:
    """The directory with those that its entries point to."""
    entries = []
    for entry in directory.entries:
        points = entry.tag in ((EXIF_IFD, GPS_IFD) if depth == 0 else (INTEROPERABILITY_IFD,))
        if points and depth < 2:
            places = directory.numbers(entry.tag)
            child = read_directory(data, places[0], directory.order, big) if places else None
            entry = replace(entry, children=child and _with_children(data, child, big, depth + 1))
        entries.append(entry)
    return replace(directory, entries=tuple(entries))


def _ranges(directory: Directory, root: bool = True) -> list[tuple[int, int]]:
    """Where a directory, its values and those below it lie; of the first one, only the values."""
    length = 2 + 12 * (len(directory.entries) + directory.lost) + 4
    found = [] if root else [(directory.place, directory.place + length)]
    for entry in directory.entries:
        if len(entry.value) > 4:
            found.append((entry.place, entry.place + len(entry.value)))
        if entry.children is not None:
            found += _ranges(entry.children, root=False)
    return found


def _end(directory: Directory) -> int:
    return max((end for _, end in _ranges(directory)), default=8)


def _block_in_place(data: bytes, directory: Directory) -> bytes:
    """A block with every byte at its old place, but for the first directory, which comes last."""
    order = directory.order
    place = _end(directory) + _end(directory) % 2
    block = bytearray(place)
    for start, end in _ranges(directory):
        block[start:end] = data[start:end].ljust(end - start, b"\0")
    block[:8] = data[:4] + struct.pack(f"{order}I", place)
    raw = _raw_entries(data, directory.place, order)
    entries = sorted({entry.tag for entry in directory.entries})
    block += struct.pack(f"{order}H", len(entries)) + b"".join(raw[tag] for tag in entries) + bytes(4)
    return bytes(block)


def _packed_block(directory: Directory) -> bytes:
    """A block with all values moved together."""
    order = directory.order
    block = bytearray({"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8))
    _append(block, directory)
    return bytes(block)


def _append(block: bytearray, directory: Directory) -> None:
    order = directory.order
    entries = [entry for entry in directory.entries if entry.kind <= 13]
    at = len(block)
    block += struct.pack(f"{order}H", len(entries)) + bytes(12 * len(entries) + 4)
    for i, entry in enumerate(entries):
        slot = at + 2 + 12 * i
        kind, value = entry.kind, entry.value
        if entry.children is not None:
            kind, value = 4, struct.pack(f"{order}I", len(block))
            _append(block, entry.children)
        struct.pack_into(f"{order}HHI", block, slot, entry.tag, kind, 1 if entry.children else entry.count)
        if len(value) > 4:
            block[slot + 8 : slot + 12] = struct.pack(f"{order}I", len(block))
            block += value + bytes(len(value) % 2)
        else:
            block[slot + 8 : slot + 8 + len(value)] = value
