"""The boxes of HEIF (ISO 23008-12), the container of AVIF and HEIC: what they say of the picture, and adding to it.

imagecodecs gives and takes pixels alone; pillow-heif decodes no AVIF, and stores XMP that is not UTF-8 as something
else. So both formats have their metadata read and written here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mirage.images.metadata import upright
from mirage.images.types import ImageError

__all__ = ["Heif", "add_metadata", "is_heif", "read_heif", "with_cicp", "without_metadata"]

EXIF, MIME, XMP_TYPE = b"Exif", b"mime", b"application/rdf+xml"
ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
CODECS = {b"av01": "avif", b"hvc1": "heic", b"hev1": "heic"}
BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
MOST_ITEMS = 65_536


@dataclass
class Heif:
    """The ``meta`` box: its items, their places, what refers to what, and properties in the order of each item."""

    data: bytes
    primary: int = 0
    items: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    item_types_at: dict[int, int] = field(default_factory=dict)
    places: dict[int, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)
    references: list[tuple[bytes, int, list[int]]] = field(default_factory=list)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    associated: dict[int, list[int]] = field(default_factory=dict)
    inline: tuple[int, int] = (0, 0)

    @property
    def format(self) -> str | None:
        """``"avif"`` or ``"heic"`` by the codec of the primary picture or of its tiles."""
        return CODECS.get(self.items.get(self._coded(), (b"", b""))[0])

    def of(self, item: int) -> Iterator[tuple[bytes, bytes]]:
        """Type and content of an item's properties, in order."""
        for index in self.associated.get(item, ()):
            if 0 < index <= len(self.properties):
                yield self.properties[index - 1]

    def first(self, kind: bytes, least: int = 0) -> bytes | None:
        """A property of the primary picture, else of the first of its tiles."""
        for item in (self.primary, self._coded()):
            for name, body in self.of(item):
                if name == kind and len(body) >= least:
                    return body
        return None

    def size(self) -> tuple[int, int, int, int] | None:
        """``(left, top, width, height)`` of what is to be shown of the stored picture."""
        body = next((body for kind, body in self.of(self.primary) if kind == b"ispe" and len(body) >= 12), None)
        if body is None:
            return None
        width, height = struct.unpack_from(">II", body, 4)
        clap = next((body for kind, body in self.of(self.primary) if kind == b"clap" and len(body) >= 32), None)
        return _aperture(clap, width, height) if clap else (0, 0, width, height)

    def depth_and_channels(self) -> tuple[int, int]:
        """Bits per sample, and 1 (grey), 2, 3 (colours) or 4."""
        depth, grey = 8, False
        av1, hevc = self.first(b"av1C", 4), self.first(b"hvcC", 19)
        if av1 is not None:
            depth = (12 if av1[2] & 0x20 else 10) if av1[2] & 0x40 else 8
            grey = bool(av1[2] & 0x10)
        elif hevc is not None:
            depth, grey = 8 + (hevc[17] & 7), hevc[16] & 3 == 0
        return depth, (1 if grey else 3) + self.has_alpha()

    def has_alpha(self) -> bool:
        """Whether another item is the transparency of the primary picture or of its tiles."""
        for kind, source, targets in self.references:
            if kind == b"auxl" and {self.primary, self._coded()} & set(targets):
                if any(name == b"auxC" and body[4:].startswith(ALPHA) for name, body in self.of(source)):
                    return True
        return False

    def orientation(self) -> int:
        """1 to 8, as in EXIF: what the turns and mirrors of the primary picture, in their order, come to."""
        seen = shape = np.arange(6).reshape(2, 3, 1)
        for kind, body in self.of(self.primary):
            if kind == b"irot" and body:
                seen = np.rot90(seen, body[0] & 3)  # anticlockwise
            elif kind == b"imir" and body:
                seen = seen[:, ::-1] if body[0] & 1 else seen[::-1]
        return next(i for i in range(1, 9) if np.array_equal(upright(shape, i), seen))

    def profile(self) -> bytes | None:
        """The colour profile."""
        for item in (self.primary, self._coded()):
            for kind, body in self.of(item):
                if kind == b"colr" and body[:4] in (b"prof", b"rICC"):
                    return body[4:]
        return None

    def cicp(self) -> tuple[int, int] | None:
        """Colour primaries and transfer function, where they are said."""
        for item in (self.primary, self._coded()):
            for kind, body in self.of(item):
                if kind == b"colr" and body[:4] == b"nclx" and len(body) >= 10:
                    primaries, transfer = struct.unpack_from(">HH", body, 4)
                    return (primaries, transfer) if (primaries, transfer) != (2, 2) else None
        return None

    def exif(self, notes: list[str]) -> bytes | None:
        """The EXIF block, from its TIFF header on."""
        body = self._metadata(EXIF, b"", notes)
        if body is None or len(body) < 4:
            return None
        skipped = int.from_bytes(body[:4], "big") + 4
        block = body[skipped:] if skipped < len(body) else body[4:]
        return block.removeprefix(b"Exif\0\0")

    def xmp(self, notes: list[str]) -> bytes | None:
        """The XMP packet."""
        return self._metadata(MIME, XMP_TYPE, notes)

    def _metadata(self, kind: bytes, content: bytes, notes: list[str]) -> bytes | None:
        found = [item for item, what in self.items.items() if what == (kind, content)]
        of_picture = [source for name, source, to in self.references if name == b"cdsc" and self.primary in to]
        found.sort(key=lambda item: item not in of_picture)
        if not found:
            return None
        body = self._content(found[0])
        if body is None:
            notes.append(f"{'XMP' if content else 'EXIF'} left out: its place lies outside the file")
        return body

    def _content(self, item: int) -> bytes | None:
        method, extents = self.places.get(item, (0, []))
        start, end = self.inline if method == 1 else (0, len(self.data))
        if method > 1 or not extents:
            return None
        parts = []
        for offset, length in extents:
            at = start + offset
            length = length or end - at
            if at + length > end:
                return None
            parts.append(self.data[at : at + length])
        return b"".join(parts)

    def _coded(self) -> int:
        """The primary picture, or the first of the tiles that it is made of."""
        if self.items.get(self.primary, (b"",))[0] in CODECS:
            return self.primary
        tiles = (targets for kind, source, targets in self.references if kind == b"dimg" and source == self.primary)
        return next((targets[0] for targets in tiles if targets), self.primary)


def is_heif(data: bytes) -> bool:
    """Whether the first bytes of a file are those of a HEIF, by its major brand."""
    return data[4:8] == b"ftyp" and data[8:12] in BRANDS


def read_heif(data: bytes) -> Heif | None:
    """What the ``meta`` box says; None where there is none, or it is cut off.

    Raises:
        ImageError: it is not what the standard says.
    """
    try:
        for kind, start, end in _boxes(data, 0, len(data)):
            if kind == b"meta":
                return _read_meta(data, start + 4, end)
    except (struct.error, IndexError) as error:
        raise ImageError(f"broken HEIF: {error}") from error
    return None


def without_metadata(heif: Heif) -> bytes:
    """The file with EXIF and XMP hidden from decoders, which may refuse a picture for them."""
    data = bytearray(heif.data)
    for item, (kind, _) in heif.items.items():
        if kind in (EXIF, MIME):
            data[heif.item_types_at[item] : heif.item_types_at[item] + 4] = b"skip"
    return bytes(data)


def with_cicp(data: bytes, cicp: tuple[int, int]) -> bytes:
    """A file that an encoder made, with the colour primaries and the transfer function that it says replaced."""
    at = data.find(b"colrnclx")
    return data if at < 0 else data[: at + 8] + struct.pack(">HH", *cicp) + data[at + 12 :]


def add_metadata(data: bytes, exif: bytes | None, xmp: bytes | None, profile: bytes | None) -> bytes:
    """A file that an encoder made, with EXIF, XMP and a colour profile of its primary picture added."""
    added = [(b"Exif\0", b"\0\0\0\0" + exif)] if exif else []
    added += [(b"mime\0" + XMP_TYPE + b"\0", xmp)] if xmp else []
    heif = read_heif(data)
    if heif is None:
        raise ImageError("the encoder's file has no meta box")
    if not added and not profile:
        return data
    start, end = next((start, end) for kind, start, end in _boxes(data, 0, len(data)) if kind == b"meta")
    numbers = [max(heif.items) + 1 + i for i in range(len(added))]
    grown = _new_meta(data, heif, start, end, added, numbers, profile, 0)
    growth = len(grown) - (end - start + 8)
    grown = _new_meta(data, heif, start, end, added, numbers, profile, growth)
    contents = b"".join(body for _, body in added)
    return data[: start - 8] + grown + data[end:] + _box(b"mdat", contents)


def _new_meta(data, heif, start, end, added, numbers, profile, growth) -> bytes:
    """The ``meta`` box with items and a property more; what lies behind it moves by ``growth``."""
    children, seen = [], set()
    for kind, at, upto in _boxes(data, start + 4, end):
        body = data[at:upto]
        seen.add(kind)
        if kind == b"iinf":
            named = zip(numbers, added, strict=True)
            infos = [_box(b"infe", struct.pack(">IHH", 2 << 24, number, 0) + what) for number, (what, _) in named]
            # version 0 counts in 16 bits, later ones in 32; the items' own names end in a zero
            head = 6 if body[0] == 0 else 8
            body = body[:4] + (len(heif.items) + len(added)).to_bytes(head - 4, "big") + body[head:] + b"".join(infos)
        elif kind == b"iloc":
            body = _new_iloc(heif, added, numbers, len(data) + 8 + growth, growth)
        elif kind == b"iref":
            body += b"".join(_described(n, heif.primary, body[0]) for n in numbers)
        elif kind == b"iprp" and profile:
            body = _new_properties(data, heif, at, upto, profile)
        children.append(_box(kind, body))
    if b"iref" not in seen:
        children.append(_box(b"iref", bytes(4) + b"".join(_described(n, heif.primary, 0) for n in numbers)))
    return _box(b"meta", data[start : start + 4] + b"".join(children))


def _new_iloc(heif: Heif, added, numbers, place: int, growth: int) -> bytes:
    out = [struct.pack(">IBBH", 1 << 24, 0x44, 0, len(heif.places) + len(added))]
    for item, (method, extents) in heif.places.items():
        out.append(struct.pack(">HHHH", item, method, 0, len(extents)))
        out += [struct.pack(">II", at + (growth if method == 0 else 0), length) for at, length in extents]
    for item, (_, body) in zip(numbers, added, strict=True):
        out.append(struct.pack(">HHHHII", item, 0, 0, 1, place, len(body)))
        place += len(body)
    return b"".join(out)


def _new_properties(data: bytes, heif: Heif, start: int, end: int, profile: bytes) -> bytes:
    """``iprp`` with the profile as a property of the primary picture, behind the others."""
    out = []
    for kind, at, upto in _boxes(data, start, end):
        body = data[at:upto]
        if kind == b"ipco":
            body += _box(b"colr", b"prof" + profile)
        elif kind == b"ipma":
            body = _new_association(body, heif.primary, len(heif.properties) + 1)
        out.append(_box(kind, body))
    return b"".join(out)


def _new_association(body: bytes, item: int, index: int) -> bytes:
    wide, long = body[3] & 1, body[0] > 0
    (entries,) = struct.unpack_from(">I", body, 4)
    at = 8
    for _ in range(entries):
        found = int.from_bytes(body[at : at + (4 if long else 2)], "big")
        at += 4 if long else 2
        count, end = body[at], at + 1 + body[at] * (2 if wide else 1)
        if found == item:
            more = struct.pack(">H" if wide else ">B", index)
            return body[:at] + bytes([count + 1]) + more + body[at + 1 :]  # transformations stay behind descriptions
        at = end
    raise ImageError("the encoder's file has no properties for its picture")


def _described(item: int, primary: int, version: int) -> bytes:
    layout = ">HHH" if version == 0 else ">IHI"
    return _box(b"cdsc", struct.pack(layout, item, 1, primary))


def _read_meta(data: bytes, start: int, end: int) -> Heif:
    heif = Heif(data)
    for kind, at, upto in _boxes(data, start, end):
        version = data[at]
        if kind == b"pitm":
            heif.primary = int.from_bytes(data[at + 4 : at + (6 if version == 0 else 8)], "big")
        elif kind == b"iinf":
            _read_items(heif, at + (6 if version == 0 else 8), upto)
        elif kind == b"iloc":
            _read_places(heif, at)
        elif kind == b"iref":
            layout = ">H" if version == 0 else ">I"
            for name, a, b in _boxes(data, at + 4, upto):
                _read_reference(heif, name, a, b, layout)
        elif kind == b"idat":
            heif.inline = (at, upto)
        elif kind == b"iprp":
            for name, a, b in _boxes(data, at, upto):
                if name == b"ipco":
                    heif.properties = [(what, data[c:d]) for what, c, d in _boxes(data, a, b)]
                elif name == b"ipma":
                    _read_associations(heif, a)
    return heif


def _read_items(heif: Heif, start: int, end: int) -> None:
    data = heif.data
    for kind, at, upto in _boxes(data, start, end):
        if kind != b"infe" or data[at] < 2:
            continue
        size = 2 if data[at] == 2 else 4
        item = int.from_bytes(data[at + 4 : at + 4 + size], "big")
        type_at = at + 4 + size + 2
        what = data[type_at : type_at + 4]
        content = data[type_at + 4 : upto].split(b"\0")[1:2] if what == MIME else []  # behind the item's name
        heif.items[item] = (what, content[0] if content else b"")
        heif.item_types_at[item] = type_at


def _read_places(heif: Heif, at: int) -> None:
    data, version = heif.data, heif.data[at]
    sizes = data[at + 4] >> 4, data[at + 4] & 15, data[at + 5] >> 4, data[at + 5] & 15 if version else 0
    number = 4 if version == 2 else 2
    at += 6

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(data):
            raise ImageError("broken HEIF: the places of its items are cut off")
        return int.from_bytes(data[at - size : at], "big")

    for _ in range(take(number)):
        item = take(number)
        method = take(2) & 15 if version else 0
        take(2)  # the file that it is in: this one
        base = take(sizes[2])
        extents = []
        for _ in range(take(2)):
            take(sizes[3])
            offset = take(sizes[0])
            extents.append((base + offset, take(sizes[1])))
        heif.places[item] = (method, extents)


def _read_reference(heif: Heif, kind: bytes, at: int, end: int, layout: str) -> None:
    size = struct.calcsize(layout)
    (source,) = struct.unpack_from(layout, heif.data, at)
    (number,) = struct.unpack_from(">H", heif.data, at + size)
    at += size + 2
    targets = [struct.unpack_from(layout, heif.data, a)[0] for a in range(at, min(at + number * size, end), size)]
    heif.references.append((kind, source, targets))


def _read_associations(heif: Heif, at: int) -> None:
    data = heif.data
    long, wide = data[at] > 0, data[at + 3] & 1
    (entries,) = struct.unpack_from(">I", data, at + 4)
    at += 8
    for _ in range(min(entries, MOST_ITEMS)):
        item = int.from_bytes(data[at : at + (4 if long else 2)], "big")
        at += 4 if long else 2
        count = data[at]
        at += 1
        for _ in range(count):
            index = (struct.unpack_from(">H", data, at)[0] & 0x7FFF) if wide else data[at] & 0x7F
            heif.associated.setdefault(item, []).append(index)
            at += 2 if wide else 1


def _aperture(clap: bytes, width: int, height: int) -> tuple[int, int, int, int]:
    """What a clean aperture leaves of a picture; all of it where it is not sound."""
    numbers = struct.unpack_from(">IIIIiIiI", clap)
    if not all(numbers[1::2]):
        return 0, 0, width, height
    shown_width, shown_height, x, y = (above / below for above, below in zip(numbers[::2], numbers[1::2], strict=True))
    left, top = round((width - shown_width) / 2 + x), round((height - shown_height) / 2 + y)
    shown = left, top, round(shown_width), round(shown_height)
    sound = left >= 0 and top >= 0 and 0 < shown[2] <= width - left and 0 < shown[3] <= height - top
    return shown if sound else (0, 0, width, height)


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the content of each box that is whole."""
    while at + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1 and at + 16 <= end:
            (length,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        length = length or end - at
        if length < head or at + length > end:
            return
        yield kind, at + head, at + length
        at += length


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body
