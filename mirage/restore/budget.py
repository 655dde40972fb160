"""What restoring takes of memory, what there is, and what to do where that is less."""

from __future__ import annotations

import gc
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import mirage_kernels
from mirage.memory import AvailableMemory, available_memory, format_bytes
from mirage.model import MIRAGE
from mirage.networks.common import RestorationNetwork

if TYPE_CHECKING:
    from mirage.images import ImageHeader

__all__ = [
    "NotEnoughMemory",
    "Size",
    "anonymous_memory",
    "check_memory",
    "check_parts",
    "choose_tile",
    "is_out_of_memory",
    "memory_left",
    "needed_memory",
    "network_memory",
    "parse_bytes",
    "release_memory",
]

# What an image takes at its peak, in bytes: the most that was measured at 512x512 and 1024x1024 pixels, dims 12 to 30,
# by the rise of resident memory (VmHWM) around `restore_array`, and up to a tenth more.
BYTES_PER_PIXEL = 84  # float32 in, float64 out, and their clipping
BYTES_PER_SAMPLE_BYTE = 8  # the file, its decoding, turning, writing
BYTES_PER_HIDDEN_PIXEL = 64  # `fill_hidden`, of images with alpha
# The network's, per pixel and channel of its `dim`. PyTorch's own operators leave holes in the heap, of up to 260 MiB,
# which weigh more in small images, and differ from run to run: by how the threads' allocations happen to fall.
FAST_BYTES_PER_CHANNEL, FAST_AT_LEAST = 27, 8 << 20  # 24 at 384x384 and 512x768, 31 at 192x192 (MIRAGE-T and S)
REFERENCE_BYTES_PER_CHANNEL = 250  # 165 to 213 in seventy runs at 640x448 (dim 12), once 223; 157 at 512x512 (MIRAGE-T)
REFERENCE_BYTES_PER_CHANNEL_LARGE, REFERENCE_HEAP = 160, 320 << 20  # 145 at 1024x1024, 165 at 768x768 (MIRAGE-T)
SMALL_IMAGES = 1.4  # networks of `mirage.networks`: Restormer at 192x192 takes 1.33 times as much a pixel as at 384x384

# In parts: the pixels, the result, and what the encoder takes, in multiples of the image's own bytes; and of a strip as
# high as a tile, what waits for the next and what is converted, per pixel of it.
IMAGES_AT_ONCE = 5
STRIP_BYTES_PER_PIXEL = 36
LARGEST_TILE, SMALLEST_TILE = 1024, 64
"""Sides that are chosen from a budget."""
UNKNOWN_TILE = 512
"""Of networks whose memory is not known."""

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class NotEnoughMemory(ValueError):
    """An image needs more memory than there is; the message says how much of either."""


@dataclass(frozen=True)
class Size:
    """Of an image, as `mirage.images.ImageHeader` has it: what memory depends on."""

    width: int
    height: int
    channels: int
    depth: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


def parse_bytes(text: str | int) -> int:
    """Bytes from what people write: ``"2G"``, ``"1.5 GiB"``, ``"800MB"``, ``1 << 30``. All units are powers of 1024.

    Raises:
        ValueError: no number of bytes above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:i?B)?\s*", str(text), re.IGNORECASE)
    count = int(float(match[1]) * UNITS[match[2].upper()]) if match and not isinstance(text, bool) else 0
    if count <= 0:
        raise ValueError(f"memory: expected bytes such as 2G, 1.5GiB or 800M, got {text!r}")
    return count


def network_memory(model: nn.Module, pixels: int) -> int:
    """Bytes that one pass of a `mirage.MIRAGE` or a network of `mirage.networks` takes for as many pixels on its own
    device; 0 for other modules."""
    network = next((module for module in model.modules() if isinstance(module, MIRAGE | RestorationNetwork)), None)
    if network is None:
        return 0
    if isinstance(network, RestorationNetwork):
        size = next(network.parameters()).element_size() / 4
        units = pixels * network.bytes_per_pixel
        return int(min(units * SMALL_IMAGES, units + REFERENCE_HEAP) * max(1, size))
    from mirage import fast

    size = network.output.weight.element_size() / 4  # of a value, in float32's
    units = pixels * network.config["dim"]
    if isinstance(network, fast.MIRAGE):
        return int(units * FAST_BYTES_PER_CHANNEL * size) + FAST_AT_LEAST
    large = units * REFERENCE_BYTES_PER_CHANNEL_LARGE + REFERENCE_HEAP
    return int(min(units * REFERENCE_BYTES_PER_CHANNEL, large) * max(1, size))


def needed_memory(model: nn.Module, header: ImageHeader | Size) -> int:
    """Bytes of this machine's memory that reading, restoring and writing an image takes at once, more or less.

    Of a `mirage.MIRAGE` or a network of `mirage.networks` on the CPU it is what was measured, by the network's channels
    and with a margin; the pixels of a network on another device, and those of another module, do not count.
    """
    per_pixel = BYTES_PER_PIXEL + header.channels * header.depth // 8 * BYTES_PER_SAMPLE_BYTE
    if header.channels in (2, 4):
        per_pixel += BYTES_PER_HIDDEN_PIXEL
    on_cpu = next(model.parameters(), torch.empty(0)).device.type == "cpu"
    return header.pixels * per_pixel + (network_memory(model, header.pixels) if on_cpu else 0)


def anonymous_memory() -> int:
    """Bytes of this process's own memory (RssAnon: no files, nothing shared); 0 where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.M)
    return int(match[1]) * 1024 if match else 0


def memory_left(memory: int | None = None) -> AvailableMemory | None:
    """What this process may still take on the host: what the system has, and of a budget what is not taken yet."""
    available = available_memory()
    if memory is None:
        return available
    left = AvailableMemory(max(0, memory - anonymous_memory()), f"memory budget, {format_bytes(memory)}")
    return left if available is None or left.bytes < available.bytes else available


def check_memory(model: nn.Module, header: ImageHeader | Size, memory: int | None = None) -> None:
    """Ask before memory is taken for one pass, also once what is kept has been given back.

    Args:
        memory: a budget in bytes for this process's own memory.

    Raises:
        NotEnoughMemory: an image needs more than there is.
    """
    advice = "--no-check-memory tries all the same"
    if isinstance(model, RestorationNetwork):  # nothing else than tiles would be tried
        advice = f"attention tile needs less; {advice}"
    _ask(needed_memory(model, header), header, memory, advice)


def check_parts(header: ImageHeader | Size, memory: int | None = None) -> None:
    """What `check_memory` is where an image is restored in parts, and only its pixels are in memory.

    Raises:
        NotEnoughMemory: as there.
    """
    needed = header.pixels * header.channels * header.depth // 8 * IMAGES_AT_ONCE
    _ask(needed, header, memory, "--no-check-memory tries all the same")


def _ask(needed: int, header: ImageHeader | Size, memory: int | None, advice: str) -> None:
    left = memory_left(memory)
    if left is not None and needed > left.bytes:
        release_memory()
        left = memory_left(memory)
    if left is not None and needed > left.bytes:
        raise NotEnoughMemory(
            f"not enough memory: {header.width}x{header.height} pixels need about {format_bytes(needed)}, "
            f"{format_bytes(left.bytes)} are available ({left.bound}); {advice}"
        )


def choose_tile(model: nn.Module, left: int, width: int) -> int:
    """The side of the largest tiles, up to `LARGEST_TILE`, that ``left`` bytes are enough for in an image so wide.

    Raises:
        NotEnoughMemory: they are not enough for tiles of `SMALLEST_TILE`.
    """
    if network_memory(model, 1) == 0:
        return UNKNOWN_TILE
    least = network_memory(model, 0)
    area = (network_memory(model, 1 << 20) - least) / (1 << 20)  # bytes a pixel of a tile
    left -= least
    row = width * STRIP_BYTES_PER_PIXEL
    side = (math.sqrt(row * row + 4 * area * max(0, left)) - row) / (2 * area)
    if side < SMALLEST_TILE:
        needed = format_bytes(least + area * SMALLEST_TILE**2 + row * SMALLEST_TILE)
        raise NotEnoughMemory(
            f"not enough memory: the smallest tiles need about {needed}, {format_bytes(max(0, least + left))} are left"
        )
    return min(LARGEST_TILE, int(side) // 8 * 8)


def release_memory() -> None:
    """Give back what is kept for the next image: results in cycles, the kernels' workspace, a GPU's cache."""
    gc.collect()
    mirage_kernels.release_workspace()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, CUDA's, or that of PyTorch's allocator on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "can't allocate memory" in text)
