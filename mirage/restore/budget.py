"""What restoring takes of memory, what there is, and what to do where that is less."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

import mirage_kernels
from mirage.memory import available_memory, format_bytes
from mirage.model import MIRAGE

if TYPE_CHECKING:
    from mirage.images import ImageHeader

__all__ = ["NotEnoughMemory", "check_memory", "is_out_of_memory", "needed_memory", "parse_bytes", "release_memory"]

# What an image takes at its peak, in bytes: the most that was measured at 512x512 and 1024x1024 pixels, dims 12 to 30,
# by the rise of resident memory (VmHWM) around `restore_array`, and up to a tenth more.
BYTES_PER_PIXEL = 84  # float32 in, float64 out, and their clipping
BYTES_PER_SAMPLE_BYTE = 8  # the file, its decoding, turning, writing
BYTES_PER_HIDDEN_PIXEL = 64  # `fill_hidden`, of images with alpha
# The network's, per pixel and channel of its `dim`. PyTorch's own operators leave holes in the heap, of some hundred
# MiB at most, which weigh more in small images.
FAST_BYTES_PER_CHANNEL = 40  # 36 measured (MIRAGE-S), 17 in bfloat16
REFERENCE_BYTES_PER_CHANNEL = 220  # 201 measured at 640x448 (dim 12), 157 at 512x512 (MIRAGE-T)
REFERENCE_BYTES_PER_CHANNEL_LARGE, REFERENCE_HEAP = 160, 256 << 20  # 145 at 1024x1024, 165 at 768x768 (MIRAGE-T)

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
    """Bytes that one pass of a `mirage.MIRAGE` takes for as many pixels on its own device; 0 for other networks."""
    network = next((module for module in model.modules() if isinstance(module, MIRAGE)), None)
    if network is None:
        return 0
    from mirage import fast

    size = network.output.weight.element_size() / 4  # of a value, in float32's
    units = pixels * network.config["dim"]
    if isinstance(network, fast.MIRAGE):
        return int(units * FAST_BYTES_PER_CHANNEL * size)
    large = units * REFERENCE_BYTES_PER_CHANNEL_LARGE + REFERENCE_HEAP
    return int(min(units * REFERENCE_BYTES_PER_CHANNEL, large) * max(1, size))


def needed_memory(model: nn.Module, header: ImageHeader | Size) -> int:
    """Bytes of this machine's memory that reading, restoring and writing an image takes at once, more or less.

    Of a `mirage.MIRAGE` on the CPU it is what was measured, by the network's channels and with a margin; the pixels of
    a network on another device, and those of another network, do not count.
    """
    per_pixel = BYTES_PER_PIXEL + header.channels * header.depth // 8 * BYTES_PER_SAMPLE_BYTE
    if header.channels in (2, 4):
        per_pixel += BYTES_PER_HIDDEN_PIXEL
    on_cpu = next(model.parameters(), torch.empty(0)).device.type == "cpu"
    return header.pixels * per_pixel + (network_memory(model, header.pixels) if on_cpu else 0)


def check_memory(model: nn.Module, header: ImageHeader | Size) -> None:
    """Ask before memory is taken, also once what is kept has been given back.

    Raises:
        NotEnoughMemory: an image needs more than there is.
    """
    needed = needed_memory(model, header)
    available = available_memory()
    if available is not None and needed > available.bytes:
        release_memory()
        available = available_memory()
    if available is not None and needed > available.bytes:
        raise NotEnoughMemory(
            f"not enough memory: {header.width}x{header.height} pixels need about {format_bytes(needed)}, "
            f"{format_bytes(available.bytes)} are available ({available.bound}); --no-check-memory tries all the same"
        )


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
