"""TIFF: its first picture through tifffile and imagecodecs, its tags as an EXIF block (`mirage.images.ifd`).

Pillow writes no RGB of 16 bits; no library puts an EXIF block into a TIFF with its directories and makers' notes whole.
tifffile can add a picture to a file that begins with the block, so it does.
"""

from __future__ import annotations

import io
import logging
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mirage.images.convert import density_of, rgb_of_cmyk, scaled, unmultiplied
from mirage.images.ifd import Directory, exif_of_tiff, first_directory, merge_into_tiff
from mirage.images.metadata import (
    ORIENTATION,
    RESOLUTION_UNIT,
    X_RESOLUTION,
    Y_RESOLUTION,
    Metadata,
    turned_density,
    upright,
)
from mirage.images.types import ImageError, ImageFile, ImageHeader

__all__ = ["decode_tiff", "encode_tiff", "tiff_header"]

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT = 256, 257, 258, 259, 262, 277, 339
SUB_FILE, OFFSETS, ROWS_PER_STRIP, BYTE_COUNTS, TILE_OFFSETS, TILE_BYTE_COUNTS = 254, 273, 278, 279, 324, 325
PLANES, TILE_WIDTH, TILE_LENGTH = 284, 322, 323
EXTRA_SAMPLES, INK_SET, SUB_DIRECTORIES, SUBSAMPLING, XMP, PROFILE, DNG_VERSION = 338, 332, 330, 530, 700, 34675, 50706
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
KINDS = {
    4: "a transparency mask", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*",
    32803: "a raw file (colour filter array)", 32844: "LogL", 32845: "LogLuv", 34892: "a raw file (linear)",
}  # fmt: skip
ASSOCIATED, UNASSOCIATED = 1, 2
OUTSIDE = 0.1  # how far from [0, 1] floating-point samples may lie to be taken for overshoot
MOST_BYTES = (1 << 32) - (1 << 20)  # places in a TIFF are of 32 bits
JPEG_INSIDE = (6, 7, 34892)  # compressions whose decoders give RGB
COMPRESSIONS = {1: "none", 5: "lzw", 8: "deflate", 32946: "deflate"}
_this_thread = threading.local()
SCHEMES = {"none": None, "lzw": "lzw", "deflate": "zlib"}


def tiff_header(data: bytes) -> ImageHeader | None:
    """What the first directory says of the picture; None where it is not there.

    Raises:
        ImageError: it says something that is not read: a raw file, L*a*b*, samples that are neither whole numbers of up
            to 16 bits nor floating point.
    """
    directory = first_directory(data)
    if directory is None:
        return None
    return _header(directory)


def decode_tiff(data: bytes) -> ImageFile:
    """Decode a TIFF's first picture: grey or RGB, palettes, CMYK and YCbCr made RGB, upright."""
    directory = first_directory(data)
    if directory is None:
        raise ImageError("broken TIFF: its first directory is not there")
    header = _header(directory)
    _check_whole(directory, header, len(data))
    metadata = Metadata()
    metadata.exif = exif_of_tiff(data, metadata.notes)
    metadata.xmp = _bytes(directory, XMP)
    stored = directory.numbers(ORIENTATION)
    metadata.stored = (stored[0] if 1 <= stored[0] <= 8 else 1) if len(stored) == 1 else None
    profile = _bytes(directory, PROFILE)
    pixels, profile = _pixels(data, directory, profile, metadata.notes)
    if pixels.shape != (header.height, header.width, header.channels):
        raise ImageError(f"broken TIFF: {list(pixels.shape)} came out of {header.width}x{header.height} pixels")
    orientation = metadata.settle()
    return ImageFile(
        upright(pixels, orientation),
        "tiff",
        icc_profile=profile,
        exif=metadata.exif,
        density=turned_density(_density(directory), orientation),
        xmp=metadata.xmp,
        notes=tuple(metadata.notes),
        compression=COMPRESSIONS.get(directory.numbers(COMPRESSION, (1,))[0]),
    )


def encode_tiff(image: ImageFile) -> tuple[bytes, tuple[str, ...]]:
    """The file, of the depth of the pixels, compressed as the image was or by deflate; and what it could not carry."""
    import tifffile

    pixels = np.ascontiguousarray(image.pixels)
    if pixels.nbytes > MOST_BYTES:
        raise ImageError(f"format: a TIFF has at most 4 GiB, and this picture {pixels.nbytes / 2**30:.1f} GiB")
    exif, notes = image.exif, []
    if exif is not None and first_directory(exif + bytes(16)) is None:
        notes.append("EXIF left out: its directory lies outside the block")
        exif = None
    order = ">" if exif is not None and exif[:2] == b"MM" else "<"
    buffer = io.BytesIO(_empty_page(exif or {"<": b"II*\0", ">": b"MM\0*"}[order] + bytes(4), order))
    scheme = SCHEMES[image.compression or "deflate"]
    density = density_of(image) or Metadata(exif=exif).resolution()  # tifffile says 1 dot where it is told nothing
    grey = pixels.shape[2] <= 2
    with tifffile.TiffWriter(buffer, append=True) as writer:
        writer.write(
            pixels[..., 0] if pixels.shape[2] == 1 else pixels,
            photometric="minisblack" if grey else "rgb",
            planarconfig="contig" if pixels.shape[2] > 1 else None,
            extrasamples=["unassalpha"] if pixels.shape[2] in (2, 4) else None,
            compression=scheme,
            predictor=scheme is not None,
            rowsperstrip=max(1, (1 << 20) // max(1, pixels[0].nbytes)),
            metadata=None,
            software=False,
            iccprofile=image.icc_profile,
            resolution=density[:2] if density else None,
            resolutionunit=density[2] + 1 if density else None,
            extratags=[(XMP, 1, len(image.xmp), image.xmp, True)] if image.xmp else (),
        )
    data = buffer.getvalue()
    written, lost = merge_into_tiff(data, _second_page(data, order), exif or b"")
    if lost:
        notes.append(f"EXIF left out in part: {lost} entries lie outside the block")
    return written, tuple(notes)


def _header(directory: Directory) -> ImageHeader:
    (width,), (height,) = directory.numbers(WIDTH, (0,)), directory.numbers(LENGTH, (0,))
    kind = _kind(directory)
    bits, floating = _sample(directory)
    if not width or not height:
        raise ImageError("broken TIFF: it does not say the size of its picture")
    colours = 1 if kind in (WHITE_IS_ZERO, BLACK_IS_ZERO) else 3
    depth = 32 if floating else 16 if bits > 8 and kind not in (PALETTE, CMYK) else 8
    return ImageHeader("tiff", height, width, colours + (_alpha(directory) is not None), depth)


def _kind(directory: Directory) -> int:
    """The photometric interpretation, of those that are read."""
    kind = directory.numbers(PHOTOMETRIC, (BLACK_IS_ZERO,))[0]
    thumbnail = directory.numbers(SUB_FILE, (0,))[0] & 1 and directory.get(SUB_DIRECTORIES) is not None
    if directory.get(DNG_VERSION) is not None or thumbnail:
        raise ImageError("a camera's raw file (TIFF inside): develop it first")
    if kind not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR):
        raise ImageError(f"a TIFF of {KINDS.get(kind, f'photometric interpretation {kind}')} is not read")
    if kind == CMYK and directory.numbers(INK_SET, (1,))[0] != 1:
        raise ImageError("a TIFF of inks other than CMYK is not read")
    return kind


def _sample(directory: Directory) -> tuple[int, bool]:
    """Bits of a sample, and whether they are floating point."""
    bits = directory.numbers(BITS, (1,))
    formats = set(directory.numbers(SAMPLE_FORMAT, (1,)))
    kind = directory.numbers(PHOTOMETRIC, (BLACK_IS_ZERO,))[0]
    floating = formats == {3}
    if len(set(bits)) > 1 or not (formats <= {1, 4} or floating):
        raise ImageError(f"a TIFF with samples of {bits} bits, formats {sorted(formats)}, is not read")
    if bits[0] > 16 and not floating or floating and (bits[0] not in (16, 32, 64) or kind in (PALETTE, CMYK, YCBCR)):
        raise ImageError(f"a TIFF with {'floating-point ' * floating}samples of {bits[0]} bits is not read")
    if kind in (CMYK, YCBCR) and bits[0] != 8:
        raise ImageError(f"a TIFF of {'CMYK' if kind == CMYK else 'YCbCr'} with {bits[0]} bits per sample is not read")
    return bits[0], floating


def _alpha(directory: Directory) -> int | None:
    """Which of the extra samples is transparency; None where none is."""
    kind = directory.numbers(PHOTOMETRIC, (BLACK_IS_ZERO,))[0]
    extra = directory.numbers(EXTRA_SAMPLES)
    if kind in (PALETTE, CMYK, YCBCR):
        return None
    return next((i for i, meaning in enumerate(extra) if meaning in (ASSOCIATED, UNASSOCIATED)), None)


def _check_whole(directory: Directory, header: ImageHeader, length: int) -> None:
    """Raise ImageError where strips or tiles are missing or cut off: tifffile makes them black."""
    tiled = directory.get(TILE_OFFSETS) is not None
    places = directory.numbers(TILE_OFFSETS if tiled else OFFSETS)
    counts = directory.numbers(TILE_BYTE_COUNTS if tiled else BYTE_COUNTS) or (1,) * len(places)
    down = directory.numbers(TILE_LENGTH if tiled else ROWS_PER_STRIP, (header.height,))[0]
    across = directory.numbers(TILE_WIDTH, (header.width,))[0] if tiled else header.width
    planes = directory.numbers(SAMPLES, (1,))[0] if directory.numbers(PLANES, (1,))[0] == 2 else 1
    if not down or not across:
        raise ImageError("broken TIFF: its strips or tiles have no size")
    needed = -(-header.height // min(down, header.height)) * -(-header.width // across) * planes
    if len(places) < needed or len(counts) != len(places):
        raise ImageError(f"broken TIFF: {min(len(places), len(counts))} strips or tiles of {needed} are there")
    if any(place + count > length for place, count in zip(places, counts, strict=True)):
        raise ImageError("broken TIFF: image file is truncated")


def _pixels(
    data: bytes, directory: Directory, profile: bytes | None, notes: list[str]
) -> tuple[np.ndarray, bytes | None]:
    """``[H, W, C]`` as stored, and the colour profile that fits it."""
    import tifffile

    kind, (bits, floating) = _kind(directory), _sample(directory)
    with _quiet(), tifffile.TiffFile(io.BytesIO(data)) as opened:
        page: Any = opened.pages[0]
        pages = _number_of(opened.pages.__len__)
        if pages > 1:
            notes.append(f"{pages} pictures: the first alone is read")
        if int(page.compression) not in tifffile.TIFF.DECOMPRESSORS:
            raise ImageError(f"a TIFF with compression {int(page.compression)} is not read")
        samples = page.asarray()
        if page.planarconfig == 2 and samples.ndim == 3:
            samples = samples.transpose(1, 2, 0)
        colour_map = page.colormap
    if samples.ndim == 2:
        samples = samples[..., None]
    if kind == YCBCR and directory.numbers(COMPRESSION, (1,))[0] not in JPEG_INSIDE:
        samples = _rgb_of_ycbcr(samples, directory)
    if kind == PALETTE:
        if colour_map is None:
            raise ImageError("broken TIFF: a palette without colours")
        return (colour_map[:, samples[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0), profile
    if kind == CMYK:
        from PIL import Image as PIL

        return rgb_of_cmyk(PIL.fromarray(np.ascontiguousarray(samples[..., :4]), "CMYK"), profile, notes), None
    colours = 1 if kind in (WHITE_IS_ZERO, BLACK_IS_ZERO) else 3
    alpha = _alpha(directory)
    further = samples.shape[2] - colours - (alpha is not None)
    if further > 0:
        notes.append(f"{further} further channel{'s' * (further > 1)} left out: not transparency")
    if floating:
        samples = _in_range(samples[..., : colours if alpha is None else None].astype(np.float32), notes)
    elif bits not in (8, 16):
        samples = scaled(samples, 8 if bits < 8 else 16, bits)
    if kind == WHITE_IS_ZERO:
        most = 1 if floating else np.iinfo(samples.dtype).max
        samples = np.concatenate([most - samples[..., :1], samples[..., 1:]], axis=2)
    if alpha is None:
        return samples[..., :colours], profile
    picture = samples[..., [*range(colours), colours + alpha]]
    if directory.numbers(EXTRA_SAMPLES)[alpha] == ASSOCIATED:
        notes.append("colours multiplied by alpha divided by it, and written so")
        picture = unmultiplied(picture)
    return picture, profile


def _rgb_of_ycbcr(samples: np.ndarray, directory: Directory) -> np.ndarray:
    """RGB of BT.601 colours that no JPEG decoder has turned into it."""
    from PIL import Image as PIL

    if set(directory.numbers(SUBSAMPLING, (2, 2))) != {1}:
        raise ImageError("a TIFF of YCbCr with subsampled colours, not compressed as JPEG, is not read")
    return np.array(PIL.fromarray(np.ascontiguousarray(samples[..., :3]), "YCbCr").convert("RGB"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep tifffile from logging, in this thread, what it thinks of tags that the picture does without."""
    logging.getLogger("tifffile").addFilter(_heard)  # once, however often
    _this_thread.quiet = True
    try:
        yield
    finally:
        _this_thread.quiet = False


def _heard(record: logging.LogRecord) -> bool:
    return not getattr(_this_thread, "quiet", False)


def _in_range(samples: np.ndarray, notes: list[str]) -> np.ndarray:
    low, high = float(samples.min()), float(samples.max())
    if not (-OUTSIDE <= low and high <= 1 + OUTSIDE):  # NaN too
        raise ImageError(f"a TIFF with floating-point samples from {low:g} to {high:g}: expected 0 to 1")
    if low < 0 or high > 1:
        notes.append(f"samples from {low:g} to {high:g} clipped to 0 to 1")
    return samples.clip(0, 1)


def _density(directory: Directory) -> tuple[float, float, int] | None:
    unit = {1: 0, 2: 1, 3: 2}.get(directory.numbers(RESOLUTION_UNIT, (2,))[0])
    found = []
    for tag in (X_RESOLUTION, Y_RESOLUTION):
        entry = directory.get(tag)
        if entry is None or entry.kind != 5 or entry.count != 1:
            return None
        above, below = struct.unpack(f"{directory.order}II", entry.value)
        found.append(above / below if below else 0.0)
    x, y = found
    return (x, y, unit) if unit is not None and x > 0 and y > 0 and (unit or x != y) else None


def _bytes(directory: Directory, tag: int) -> bytes | None:
    entry = directory.get(tag)
    return entry.value if entry is not None and entry.value else None


def _number_of(pages: Callable[[], int]) -> int:
    """How many pictures there are; 1 where their chain is broken."""
    try:
        return pages()
    except Exception:  # of the pictures behind the first nothing else is wanted
        return 1


def _empty_page(exif: bytes, order: str) -> bytes:
    """The block with a picture of one pixel behind it as its only directory, for tifffile to go on from."""
    place = len(exif) + len(exif) % 2
    size, kind = ((WIDTH, 1), (LENGTH, 1)), ((BITS, 8), (COMPRESSION, 1), (PHOTOMETRIC, 1))
    tags = (*size, *kind, (OFFSETS, 0), (ROWS_PER_STRIP, 1), (BYTE_COUNTS, 1))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return exif[:4] + struct.pack(f"{order}I", place) + exif[8:] + bytes(len(exif) % 2) + directory


def _second_page(data: bytes, order: str) -> int:
    first = first_directory(data)
    if first is None or not first.next:
        raise ImageError("the TIFF that was written has no picture")
    return first.next
