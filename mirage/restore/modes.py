"""The ways to restore an image (``attention``), and which of them memory leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

import mirage_kernels
from mirage.memory import format_bytes
from mirage.restore.budget import (
    IMAGES_AT_ONCE,
    LARGEST_TILE,
    NotEnoughMemory,
    Size,
    check_memory,
    check_parts,
    choose_tile,
    is_out_of_memory,
    memory_left,
    needed_memory,
    network_memory,
    release_memory,
)
from mirage.restore.pixels import Reader, Writer, restore_array, where_of
from mirage.restore.tiles import restore_tiles

if TYPE_CHECKING:
    from mirage.images import ImageHeader

__all__ = ["ATTENTION", "Settings", "check_image", "restore_image"]

ATTENTION = ("auto", "whole", "tile", "local", "global")
PARTS_SHARE = 0.8
"""Of the memory that is left, for what restores in parts; the rest is for what the allocator leaves unused."""
UNLIMITED = 4 << 30  # where the system tells of no bound
LARGEST_MAPS = (
    8 << 30
)  # of `global` and `local`, in memory: beyond it files, which the system keeps in memory as it can
WORKING_MEMORY = 256 << 20  # that `mirage.regional` takes besides what it is given: 200 MiB at 1600x1200, dim 12
LEAST_MAPS = 32 << 20  # less is no use to it
MOST_TILES = 8  # in one batch, on a GPU


@dataclass(frozen=True)
class Settings:
    """How to run; as of `mirage.Restorer`."""

    attention: str = "auto"
    memory: int | None = None
    tile: int | None = None
    overlap: int = 32
    window: int = 192
    scratch: str | os.PathLike[str] | None = None


def check_image(model: nn.Module, header: ImageHeader | Size, settings: Settings) -> None:
    """Ask before an image is decoded.

    Raises:
        NotEnoughMemory: it needs more than there is.
    """
    host = _host_budget(model, settings)
    if settings.attention == "whole" or (settings.attention == "auto" and _why_not_global(model) is not None):
        check_memory(model, header, host)
        _check_device(model, header)
    else:
        check_parts(header, host)


def restore_image(model: nn.Module, pixels: np.ndarray, settings: Settings, note: Callable[[str], None]) -> np.ndarray:
    """Restore one image, ``[H, W, C]``.

    Raises:
        TypeError, ValueError: the model does not fit the mode, or gave what is no image.
        NotEnoughMemory: there is too little for any part.
    """
    attention = settings.attention
    if attention == "auto":
        attention = "whole" if _fits(model, pixels, settings) or _why_not_global(model) else "global"
    if attention == "whole":
        try:
            return restore_array(model, pixels)
        except Exception as error:
            if settings.attention == "whole" or not is_out_of_memory(error) or _why_not_global(model):
                raise
        note("memory ran out; went on in strips (attention global)")
        release_memory()
        attention = "global"
    if attention == "tile":
        left = _left(model, pixels, settings)
        tile = settings.tile or choose_tile(model, left, pixels.shape[1])
        batch = _batch(model, tile, left)
        return restore_tiles(model, pixels, tile=tile, overlap=settings.overlap, batch=batch, note=note)
    return _restore_in_strips(model, pixels, settings, settings.window if attention == "local" else None)


def _restore_in_strips(model: nn.Module, pixels: np.ndarray, settings: Settings, window: int | None) -> np.ndarray:
    from mirage import regional

    left = _left(model, pixels, settings) - WORKING_MEMORY
    if left < LEAST_MAPS:
        raise NotEnoughMemory(
            f"not enough memory: {format_bytes(LEAST_MAPS - left)} more are needed to restore "
            f"{pixels.shape[1]}x{pixels.shape[0]} pixels in strips"
        )
    reader, writer = Reader(pixels), Writer(pixels)
    regional.run(
        model,
        reader.read,
        (reader.height, reader.width),
        writer.write,
        regional.Settings(
            memory=min(left, LARGEST_MAPS),
            scratch=settings.scratch,
            window=window,
            overlap=0.0 if window is None else 0.5,
        ),
    )
    return writer.out


def _why_not_global(model: nn.Module) -> str | None:
    """Why a model cannot run in strips; None where it can."""
    from mirage.regional.network import steps_of

    try:
        steps_of(model)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _host_budget(model: nn.Module, settings: Settings) -> int | None:
    """The budget, where it is one of the host's memory."""
    return settings.memory if where_of(model)[0].type == "cpu" else None


def _device_left(model: nn.Module, memory: int | None = None) -> int | None:
    """Bytes left on the GPU that a model is on; None for the CPU."""
    device = where_of(model)[0]
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free if memory is None else min(free, memory - torch.cuda.memory_allocated(device))


def _check_device(model: nn.Module, header: ImageHeader | Size) -> None:
    left = _device_left(model)
    needed = network_memory(model, header.pixels)
    if left is not None and needed > left:
        raise NotEnoughMemory(
            f"not enough memory on the GPU: {header.width}x{header.height} pixels need about {format_bytes(needed)}, "
            f"{format_bytes(left)} are free; attention tile or global needs less"
        )


def _fits(model: nn.Module, pixels: np.ndarray, settings: Settings) -> bool:
    """Whether memory is enough for one pass."""
    size = Size(pixels.shape[1], pixels.shape[0], pixels.shape[2], pixels.dtype.itemsize * 8)
    host = memory_left(_host_budget(model, settings))
    if host is not None and needed_memory(model, size) > host.bytes:
        return False
    device = _device_left(model, settings.memory)
    return device is None or network_memory(model, size.pixels) <= device


def _left(model: nn.Module, pixels: np.ndarray, settings: Settings) -> int:
    """Bytes for the network where it runs in parts: what is left once the result and its encoder have theirs."""
    device = _device_left(model, settings.memory)
    if device is not None:
        return int(device * PARTS_SHARE)
    mirage_kernels.release_workspace()  # of another image, so that it counts as left
    host = memory_left(settings.memory)
    total = UNLIMITED if host is None else host.bytes
    return int(total * PARTS_SHARE) - pixels.nbytes * (IMAGES_AT_ONCE - 1)


def _batch(model: nn.Module, tile: int, left: int) -> int:
    """Tiles that a GPU gets at once; a CPU is busy with one."""
    each = network_memory(model, min(tile, LARGEST_TILE) ** 2)
    if where_of(model)[0].type != "cuda" or each == 0:
        return 1
    return max(1, min(MOST_TILES, left // each))
