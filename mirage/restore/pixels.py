"""Images between arrays on the host and what the network takes and gives.

A `Reader` gives rectangles of an image as the network takes them, a `Writer` takes restored rows from the top on; every
mode of restoring lies between the two, so neither needs the whole image as floating-point numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mirage.networks.common import RestorationNetwork
from mirage.padding import padding_sources

__all__ = [
    "MULTIPLE",
    "Reader",
    "Writer",
    "as_image",
    "channels_of",
    "check_output",
    "fill_hidden",
    "multiple_of",
    "pad_to_multiple",
    "restore_array",
]

MULTIPLE = 8
"""The sides of the network's input are multiples of this, but for those of `mirage.networks`, which say theirs."""
ROWS = 64  # that a Writer converts at once
RANGE_MARGIN = 1e-3  # what rounding may leave outside of [0, 1] in float32 images


def pad_to_multiple(x: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Pad ``[B, C, H, W]`` on the right and at the bottom until H and W are multiples of ``multiple``.

    By reflection, as far as that goes; along a side not longer than its pad, by replicating the edge.
    """
    for axis, pad_of in ((3, lambda n: (0, n, 0, 0)), (2, lambda n: (0, 0, 0, n))):
        size = x.shape[axis]
        pad = -size % multiple
        if pad:
            x = nn.functional.pad(x, pad_of(pad), mode="reflect" if pad < size else "replicate")
    return x


def as_image(array: np.ndarray) -> np.ndarray:
    """``array`` as ``[H, W, C]``.

    Args:
        array: ``[H, W]`` or ``[H, W, C]``, not empty, C from 1 to 4; uint8, uint16, or float32 in [0, 1].

    Raises:
        TypeError: no array, or of another type.
        ValueError: another shape, or floating-point values that are not finite or not in [0, 1].
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"array: expected a numpy array, got {type(array).__name__}")
    if array.dtype not in (np.uint8, np.uint16, np.float32):
        raise TypeError(f"array: expected uint8, uint16 or float32, got {array.dtype}")
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or not pixels.size or pixels.shape[2] > 4:
        raise ValueError(f"array: expected [H, W] or [H, W, 1 to 4], not empty, got {list(array.shape)}")
    if pixels.dtype == np.float32:
        least, most = float(pixels.min()), float(pixels.max())  # NaN where there is one
        if not (np.isfinite(least) and np.isfinite(most)):
            raise ValueError("array: expected finite values, got NaN or infinity")
        if least < -RANGE_MARGIN or most > 1 + RANGE_MARGIN:
            raise ValueError(f"array: expected float32 values in [0, 1], got {least:g} to {most:g}")
    return pixels


def colours_of(pixels: np.ndarray) -> int:
    """Channels that are not alpha."""
    return pixels.shape[2] - (pixels.shape[2] in (2, 4))


def scale_of(dtype: np.dtype) -> float:
    """What stands for 1 in an image of this type."""
    return 1.0 if dtype == np.float32 else float(np.iinfo(dtype).max)


def multiple_of(model: nn.Module) -> int:
    """What the sides of a part of an image have to be multiples of for a model."""
    return model.multiple if isinstance(model, RestorationNetwork) else MULTIPLE


def channels_of(model: nn.Module) -> int:
    """Channels of the images that a model takes: 3, or 1 of a network for grey ones."""
    return int(model.config["in_channels"]) if isinstance(model, RestorationNetwork) else 3


class Reader:
    """Rectangles of an image as the network takes them: three channels in [0, 1], padded to multiples of 8.

    Args:
        pixels: ``[H, W, C]``, as `as_image` gives it. Colours where alpha is 0 are replaced by what their neighbours
            have (in a copy), unless all of it is hidden.
        multiple: another one than 8.
        channels: 1 for a network that takes grey images alone.

    Attributes:
        height, width: of the padded image.

    Raises:
        ValueError: the network takes grey images alone, and this is none.
    """

    def __init__(self, pixels: np.ndarray, multiple: int = MULTIPLE, channels: int = 3) -> None:
        colours = colours_of(pixels)
        if channels == 1 and colours != 1:
            raise ValueError("the network restores grey images alone, this one has colours")
        self.channels = channels
        hidden = pixels[..., colours:] == 0  # empty without alpha
        self.pixels = pixels[..., :colours]
        if hidden.any() and not hidden.all():
            self.pixels = _without_hidden(self.pixels, hidden)
        self.scale = scale_of(pixels.dtype)
        self.height, self.width = (side + -side % multiple for side in pixels.shape[:2])
        self._rows = padding_sources(pixels.shape[0], self.height)
        self._columns = padding_sources(pixels.shape[1], self.width)

    def read(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> Tensor:
        """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of the padded image: float32 ``[3, h, w]``, or
        ``[1, h, w]`` for grey networks."""
        right = self.width if right is None else right
        height, width = self.pixels.shape[:2]
        rows = slice(top, bottom) if bottom <= height else self._rows[top:bottom]
        part = self.pixels[rows]
        part = part[:, left:right] if right <= width else part[:, self._columns[left:right]]
        x = torch.from_numpy(part.astype(np.float32)).div_(self.scale)
        return x.clamp_(0, 1).permute(2, 0, 1).expand(self.channels, -1, -1)


class Writer:
    """Takes restored rows, and makes them what the image was: clipped, rounded, grey, with its own alpha.

    Args:
        pixels: the image before, ``[H, W, C]``.

    Attributes:
        out: the restored image, of the shape and type of ``pixels``.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.colours = pixels, colours_of(pixels)
        self.scale = scale_of(pixels.dtype)
        self.out = np.empty(pixels.shape, pixels.dtype)

    def write(self, top: int, rows: Tensor) -> None:
        """Rows from ``top`` on: floating point ``[3, n, w]``, or ``[1, n, w]`` of grey networks, on any device; what
        lies in the padding is left out.

        Raises:
            ValueError: there are values that are not finite.
        """
        height, width = self.pixels.shape[:2]
        rows = rows[:, : max(0, height - top), :width]
        for first in range(0, rows.shape[1], ROWS):
            self._convert(top + first, rows[:, first : first + ROWS])

    def _convert(self, top: int, rows: Tensor) -> None:
        y = rows.cpu().double()  # 16-bit samples and their means, rounded once
        if not torch.isfinite(y).all():
            raise ValueError("the model's output has values that are not finite")
        y = y.mean(0, keepdim=True) if self.colours == 1 else y
        y = y.clamp_(0, 1).mul_(self.scale)
        if self.pixels.dtype != np.float32:
            y.round_()
        before = self.pixels[top : top + y.shape[1]]
        out = self.out[top : top + y.shape[1]]
        out[..., : self.colours] = y.permute(1, 2, 0).numpy()
        if self.colours < before.shape[2]:
            hidden = before[..., self.colours :] == 0
            np.copyto(out[..., : self.colours], before[..., : self.colours], where=hidden)
            out[..., self.colours :] = before[..., self.colours :]


@torch.inference_mode()
def restore_array(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Restore one image in one pass.

    Args:
        model: maps ``[1, 3, H, W]`` in [0, 1], H and W multiples of 8, to the same shape; runs on its own device and
            dtype. A network of `mirage.networks` pads as it needs itself, and may take one channel.
        pixels: ``[H, W, C]``; uint8, uint16, or float32 in [0, 1]; C is 1, 2, 3 or 4, the last of 2 and 4 being alpha.

    Returns:
        The same shape and type; results outside [0, 1] are clipped; alpha, and colours where it is 0, are the input's.

    Raises:
        TypeError: ``pixels`` is of another type.
        ValueError: ``pixels`` is of another shape; the model returned one, or values that are not finite.
    """
    pixels = as_image(pixels)
    reader = Reader(pixels, 1 if isinstance(model, RestorationNetwork) else MULTIPLE, channels_of(model))
    x = reader.read(0, reader.height)[None].to(*where_of(model))
    y = check_output(model(x), x)
    del x
    writer = Writer(pixels)
    writer.write(0, y[0])
    return writer.out


def where_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's first parameter; the CPU and float32 without any."""
    parameter = next(model.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


def check_output(y: object, x: Tensor) -> Tensor:
    """``y``, what a model made of ``x``.

    Raises:
        ValueError: it is no tensor of the shape of ``x``.
    """
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"model: expected an image of shape {list(x.shape)}, got {got}")
    return y


def fill_hidden(x: Tensor, hidden: Tensor) -> Tensor:
    """``x`` with the values of hidden pixels made up from the nearest visible ones.

    Args:
        x: ``[1, C, H, W]``, floating point.
        hidden: ``[1, 1, H, W]``, bool, not all of it True.

    Returns:
        ``[1, C, H, W]``: visible pixels as they are; a hidden one is the mean of the visible ones in the smallest of
        the squares of 2, 4, 8, ... pixels around it that have any, interpolated between such squares.
    """
    weight = (~hidden).to(x.dtype)
    value = x * weight
    levels = []
    while (weight == 0).any():
        levels.append((value, weight))
        value, weight = (nn.functional.avg_pool2d(v, 2, ceil_mode=True) for v in (value, weight))
    filled = value / weight
    for value, weight in reversed(levels):
        above = nn.functional.interpolate(filled, size=value.shape[2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, value / weight.clamp_min(torch.finfo(x.dtype).tiny), above)
    return torch.where(hidden, filled, x)


def _without_hidden(colours: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """A copy of ``[H, W, C]`` with what is hidden filled, channel by channel, which takes a third of the memory."""
    out = np.empty(colours.shape, colours.dtype)
    where = torch.from_numpy(hidden).permute(2, 0, 1)[None]
    for channel in range(colours.shape[2]):
        x = torch.from_numpy(colours[None, None, ..., channel].astype(np.float32))
        filled = fill_hidden(x, where)[0, 0]
        out[..., channel] = (filled if colours.dtype == np.float32 else filled.round_()).numpy()
    return out
