"""An image in overlapping tiles: each restored by itself, and blended with its neighbours.

Statistics over the whole image, which MIRAGE's attention has, become those of a tile; see docs/restore.md. Of a
network without such, whose results reach no further than a quarter of the overlap, nothing changes.

Rows of tiles are made from the top on. A strip as high as a tile is all that there is in floating point; what the next
row of tiles overlaps waits, and the rest is written. So it can go on with smaller tiles where memory runs out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mirage.restore.budget import SMALLEST_TILE, is_out_of_memory, release_memory
from mirage.restore.pixels import MULTIPLE, Reader, Writer, channels_of, check_output, multiple_of, where_of

__all__ = ["check_tile", "ramp", "resolve_overlap", "restore_tiles", "spans"]

Span = tuple[int, int]
OVERLAP = 32


def resolve_overlap(tile: int | None, overlap: int | None) -> int:
    """The overlap that is meant where none is given: 32 pixels, or half of a tile that is smaller than two of them.

    Raises:
        ValueError: as `check_tile`.
    """
    if overlap is None:
        check_tile(tile, 0)
        return OVERLAP if tile is None else min(OVERLAP, tile // 2)
    check_tile(tile, overlap)
    return overlap


def check_tile(tile: int | None, overlap: int) -> None:
    """Raise ValueError where tiles of this side cannot overlap by as much."""
    if not isinstance(overlap, int) or isinstance(overlap, bool) or overlap < 0:
        raise ValueError(f"overlap: expected a number of pixels from 0 on, got {overlap!r}")
    if tile is None:
        return
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < MULTIPLE or tile % MULTIPLE:
        raise ValueError(f"tile: expected a positive multiple of {MULTIPLE} pixels, got {tile!r}")
    if 2 * overlap > tile:
        raise ValueError(f"overlap: expected at most half of tile={tile}, got {overlap}")


def spans(size: int, tile: int, overlap: int, multiple: int = MULTIPLE) -> list[Span]:
    """Tiles along one axis: as few as there can be, all of one length, at multiples of 8.

    Args:
        size: of the axis, a multiple of 8.
        tile: the most that a tile may have, a multiple of 8.
        overlap: the least that neighbours share, at most half of ``tile``; rounded up to a multiple of 8.
        multiple: of a network that takes multiples of something else than 8.
    """
    if size <= tile:
        return [(0, size)]
    overlap = min(_up(overlap, multiple), tile // 2 // multiple * multiple)
    count = math.ceil((size - overlap) / (tile - overlap))
    length = _up(math.ceil((size + (count - 1) * overlap) / count), multiple)
    starts = [(size - length) // multiple * i // (count - 1) * multiple for i in range(count)]
    return [(start, start + length) for start in starts]


def ramp(overlap: int) -> Tensor:
    """How much of the later of two tiles there is at each of the pixels that they share: float32 ``[overlap]``.

    0 for a quarter and 1 for the last, where either tile lacks context; between them half a period of a cosine. What
    is missing to 1 is the earlier tile's.
    """
    margin = overlap // 4
    rising = overlap - 2 * margin
    rise = (torch.arange(rising) + 0.5) / max(1, rising)
    return torch.cat([torch.zeros(margin), 0.5 - 0.5 * torch.cos(math.pi * rise), torch.ones(margin)])


@torch.inference_mode()
def restore_tiles(
    model: nn.Module,
    pixels: np.ndarray,
    *,
    tile: int,
    overlap: int,
    batch: int = 1,
    note: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Restore one image in tiles.

    Where memory runs out the batch is halved, then the tile, from where it was; down to `SMALLEST_TILE`.

    Args:
        model: maps ``[B, 3, H, W]`` in [0, 1], H and W multiples of 8, to the same shape. Networks of
            `mirage.networks` get tiles at multiples of theirs, and may take one channel.
        pixels: ``[H, W, C]``, as of `restore_array`.
        tile, overlap: as of `spans`, for both axes.
        batch: how many tiles the network gets at once.
        note: called with a sentence where memory ran out.

    Returns:
        The same shape and type as ``pixels``.

    Raises:
        ValueError: the model returned another shape, or values that are not finite.
        MemoryError, RuntimeError: memory ran out with the smallest tiles.
    """
    multiple = multiple_of(model)
    tile = max(multiple, tile // multiple * multiple)
    reader, writer = Reader(pixels, multiple, channels_of(model)), Writer(pixels)
    rows, columns = (spans(side, tile, overlap, multiple) for side in (reader.height, reader.width))
    waiting: Tensor | None = None  # rows of the strip before that this one overlaps
    while rows:
        top, bottom = rows[0]
        try:
            strip = _strip(model, reader, rows[0], columns, batch)
        except Exception as error:
            side = max(bottom - top, columns[0][1] - columns[0][0])
            if not is_out_of_memory(error) or (batch == 1 and side <= min(tile, SMALLEST_TILE)):
                raise
            strip = None
        if strip is None:  # outside of the handler, whose traceback holds what did not fit
            release_memory()
            if batch > 1:
                batch //= 2
                continue
            tile = max(multiple, side // 2 // multiple * multiple)
            if waiting is not None and waiting.shape[1] > tile:  # more waits than a tile can take over
                top, waiting = 0, None
            rows = [(top + a, top + b) for a, b in spans(reader.height - top, tile, overlap, multiple)]
            columns = spans(reader.width, tile, overlap, multiple)
            if note is not None:
                note(f"memory ran out; went on with tiles of {tile} pixels")
            continue
        if waiting is not None:
            _blend(strip, waiting, axis=1)
        done = (rows[1][0] if len(rows) > 1 else bottom) - top
        writer.write(top, strip[:, :done])
        waiting = strip[:, done:].clone()
        rows = rows[1:]
    return writer.out


def _strip(model: nn.Module, reader: Reader, row: Span, columns: list[Span], batch: int) -> Tensor:
    """One row of tiles, blended: float32 ``[3, h, W]`` (or one channel) on the host."""
    device, dtype = where_of(model)
    strip = torch.empty(reader.channels, row[1] - row[0], reader.width)
    before: tuple[list[Span], Tensor] | None = None
    for first in range(0, len(columns), batch):
        chosen = columns[first : first + batch]
        x = torch.stack([reader.read(*row, *column) for column in chosen])
        if device.type == "cuda":
            x = x.pin_memory()
        x = x.to(device, dtype, non_blocking=True)
        y = check_output(model(x), x)
        if before is not None:  # a GPU is busy with the next tiles meanwhile
            _place(strip, *before, columns)
        before = (chosen, y)
        if device.type == "cpu":
            _place(strip, *before, columns)
            before = None
    if before is not None:
        _place(strip, *before, columns)
    return strip


def _place(strip: Tensor, chosen: list[Span], tiles: Tensor, columns: list[Span]) -> None:
    for (left, right), tile in zip(chosen, tiles.float().cpu(), strict=True):
        at = columns.index((left, right))
        shared = columns[at - 1][1] - left if at else 0
        if shared:
            tile = _blend(tile.clone(), strip[:, :, left : left + shared], axis=2)
        strip[:, :, left:right] = tile


def _blend(later: Tensor, earlier: Tensor, axis: int) -> Tensor:
    """Fade from ``earlier`` to the first rows (axis 1) or columns (axis 2) of ``later``, in place."""
    count = earlier.shape[axis]
    weight = ramp(count).view([-1 if i == axis else 1 for i in range(3)])
    part = later.narrow(axis, 0, count)
    part.copy_(torch.lerp(earlier, part, weight))
    return later


def _up(size: int, multiple: int) -> int:
    return size + -size % multiple
