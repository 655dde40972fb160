"""AdaIR's splitting of an image into low and high frequencies, without its Fourier transforms.

Low are the frequencies of a rectangle around zero, of at most a hundred-and-twenty-eighth of the image's size to either
side: so few that products with their cosines and sines cost less than a transform of the whole image, and nothing has
to be rolled to the middle and back. High is what is left of the image.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirage_kernels._runtime.checks import under_autocast
from mirage_kernels._runtime.library import accumulator

__all__ = ["FrequencyModule"]

PARTS = 128
"""How many times the most frequencies to one side go into the image's size. AdaIR's own code has no other."""


class FrequencyModule(nn.Module):
    """AdaIR's `FreModule`: features y [B, C, H, W] attend to the low and to the high frequencies of an image, of any
    size, and to both together. How many frequencies are low is computed from each image."""

    conv1: nn.Module
    rate_conv: nn.Module
    channel_cross_l: nn.Module
    channel_cross_h: nn.Module
    channel_cross_agg: nn.Module
    frequency_refine: nn.Module
    para1: nn.Parameter
    para2: nn.Parameter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # The attention with "l" in its name is that of the high frequencies, and the other way round.
        high, low = split(self, nn.functional.interpolate(x, y.shape[2:], mode="bilinear"))
        high = self.channel_cross_l(high, y)
        low = self.channel_cross_h(low, y)
        mixed = self.frequency_refine(low, high)
        del high, low
        return self.channel_cross_agg(y, mixed) * self.para1 + y * self.para2


def split(module: Any, image: Tensor, parts: int = PARTS) -> tuple[Tensor, Tensor]:
    """What the module's `fft` returns: of the features of an image the magnitudes of high frequencies, and of low ones.

    Args:
        image: [B, channels of the image, H, W], of the features' size.
        parts: Low are at most H // parts and W // parts frequencies to either side of zero.

    Returns:
        Two tensors [B, C, H, W].
    """
    x = module.conv1(image)
    share = module.rate_conv(nn.functional.adaptive_avg_pool2d(x, 1)).sigmoid()
    height, width = x.shape[2:]
    counts = height // parts, width // parts
    if any(type(count) is int and count == 0 for count in counts):
        return x.abs(), torch.zeros_like(x)
    down, across = (_Waves.of(*size, x) for size in zip(x.shape[2:], counts, strict=True))
    rows, columns = ((count * share[:, i]).int() for i, count in enumerate(counts))
    chosen = down.among(rows)[..., :, None] & across.among(columns)[..., None, :]
    with torch.autocast(x.device.type, enabled=False) if under_autocast(x) else contextlib.nullcontext():
        real, imaginary = _low(x.to(accumulator(x.dtype)), down, across, chosen)
        low, high = _magnitude(real, imaginary), _magnitude(x - real, imaginary)
    return high.to(x.dtype), low.to(x.dtype)


class _Waves(NamedTuple):
    """Frequencies of which some are chosen [N], and their waves [N, size]."""

    frequencies: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, size: int, count: int, like: Tensor) -> _Waves:
        # A size in a trace, or one that may be any, is no int: what is recorded has to hold for all, so with room for
        # a frequency where none is low.
        most = count if type(count) is int else count + 1
        frequencies = torch.arange(-most, most, device=like.device)
        pixels = torch.arange(size, device=like.device)
        angles = frequencies.double()[:, None] * pixels * (2 * math.pi / size)
        dtype = accumulator(like.dtype)
        return cls(frequencies, angles.cos().to(dtype), angles.sin().to(dtype))

    def among(self, count: Tensor) -> Tensor:
        """Which of them lie from -count to count - 1, for counts of [B, 1, 1]: [B, 1, N]."""
        return (self.frequencies >= -count) & (self.frequencies < count)


def _low(x: Tensor, down: _Waves, across: _Waves, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the chosen frequencies of x: a rectangle from -n to n - 1 has no mirror image. In real
    numbers, which every compiler and exporter has."""
    real, imaginary = x @ across.cos.t(), -(x @ across.sin.t())
    scale = chosen.to(x.dtype) / (x.shape[2] * x.shape[3])
    real, imaginary = (
        (down.cos @ real + down.sin @ imaginary) * scale,
        (down.cos @ imaginary - down.sin @ real) * scale,
    )
    real, imaginary = down.cos.t() @ real - down.sin.t() @ imaginary, down.cos.t() @ imaginary + down.sin.t() @ real
    parts = torch.cat((real, imaginary), -1)
    return parts @ torch.cat((across.cos, -across.sin)), parts @ torch.cat((across.sin, across.cos))


def _magnitude(real: Tensor, imaginary: Tensor) -> Tensor:
    """A root has no derivative at zero, where that of a complex magnitude is zero."""
    if torch.is_grad_enabled():
        return torch.complex(real, imaginary).abs()
    return torch.addcmul(real.square(), imaginary, imaginary).sqrt()
