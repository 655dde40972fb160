"""Images as arrays on the host, read and written by strips."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mirage.model import STRIDE
from mirage.padding import padding_sources

__all__ = ["check_image", "padded_size", "rows_from", "rows_to"]

DTYPES = (np.uint8, np.uint16, np.float32)


def check_image(name: str, array: np.ndarray, channels: int) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(array).__name__}")
    if array.dtype not in DTYPES:
        raise TypeError(f"{name}: expected uint8, uint16 or float32, got {array.dtype}")
    if array.ndim != 3 or array.shape[2] != channels or array.size == 0:
        raise ValueError(f"{name}: expected shape [H, W, {channels}], not empty, got {list(array.shape)}")


def padded_size(array: np.ndarray) -> tuple[int, int]:
    """Height and width as the network takes them."""
    height, width = (side + -side % STRIDE for side in array.shape[:2])
    return height, width


def rows_from(array: np.ndarray) -> Callable[[int, int], Tensor]:
    """Rows of an image in [0, 1] as float32 [channels, n, width], padded on the right and at the bottom to multiples of
    8 as `mirage.restore.pad_to_multiple` does."""
    height, width = padded_size(array)
    rows, columns = padding_sources(array.shape[0], height), padding_sources(array.shape[1], width)
    scale = 1.0 if array.dtype == np.float32 else float(np.iinfo(array.dtype).max)

    def read(first: int, stop: int) -> Tensor:
        inside = stop <= array.shape[0]
        strip = array[first:stop] if inside else array[rows[first:stop]]
        if width != array.shape[1]:
            strip = strip[:, columns]
        return torch.from_numpy(strip.astype(np.float32)).div_(scale).permute(2, 0, 1)

    return read


def rows_to(array: np.ndarray) -> Callable[[int, Tensor], None]:
    """Where restored rows go: clipped to [0, 1], rounded where the array is of integers; padding is left out."""
    scale = 1.0 if array.dtype == np.float32 else float(np.iinfo(array.dtype).max)

    def write(first: int, rows: Tensor) -> None:
        count = min(rows.shape[1], array.shape[0] - first)
        if count <= 0:
            return
        values = rows[:, :count, : array.shape[1]]
        if not torch.isfinite(values).all():
            raise ValueError("the model's output has values that are not finite")
        values = values.double().clamp_(0, 1).mul_(scale)
        if array.dtype != np.float32:
            values = values.round_()
        array[first : first + count] = values.permute(1, 2, 0).cpu().numpy()

    return write
