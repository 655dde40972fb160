"""Filters of images with borders: mirrored sides, convolution with any kernel, means of boxes, the guided filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["box_mean", "convolve", "guided_filter", "mirrored", "offsets"]


def offsets(radius: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of a kernel's taps from its centre, float64 ``[2 radius + 1, 1]`` and ``[1, 2 radius + 1]``."""
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return steps[:, None], steps[None, :]


def mirrored(image: Tensor, before: int, after: int | None = None) -> Tensor:
    """``[..., H, W]`` with ``before`` pixels above and left and ``after`` below and right, mirrored without repeating
    the border (``np.pad``'s ``reflect``), as often as it takes where the image is smaller than that."""
    after = before if after is None else after
    for dim in (-2, -1):
        size = image.shape[dim]
        period = max(1, 2 * (size - 1))
        places = torch.arange(-before, size + after, device=image.device).remainder(period)
        image = image.index_select(dim, torch.minimum(places, period - places) if size > 1 else places)
    return image


def convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """``[C, H, W]`` convolved with a kernel ``[k, k]``, ``k`` odd, borders mirrored.

    By Fourier transforms: what a kernel of 27x27 takes is little more than one of 3x3, in time and in memory.
    """
    radius = kernel.shape[-1] // 2
    height, width = image.shape[-2:]
    padded = mirrored(image, radius)
    size = [-(-n // 16) * 16 for n in padded.shape[-2:]]  # more than enough: what wraps around is cut off below
    spectrum = torch.fft.rfft2(padded, size) * torch.fft.rfft2(kernel.to(image.dtype).to(image.device), size)
    whole = torch.fft.irfft2(spectrum, size)
    return whole[..., 2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]


def box_mean(image: Tensor, size: int) -> Tensor:
    """Means of boxes ``size`` x ``size``, ``[C, H, W]``, borders mirrored; of an even size, the box reaches one pixel
    further up and left, as OpenCV's does."""
    padded = mirrored(image, size // 2, (size - 1) // 2)
    return F.avg_pool2d(F.avg_pool2d(padded[None], (size, 1), 1), (1, size), 1)[0]


def guided_filter(image: Tensor, guide: Tensor, size: int = 3, epsilon: float = 0.01) -> Tensor:
    """The guided filter (He, Sun and Tang, ECCV 2010) of ``image`` with a grey guide, both ``[1, H, W]``.

    In each box the image is a line in the guide, by least squares with ``epsilon`` beside the guide's variance; a pixel
    takes the mean of the lines of its boxes.
    """
    mean_guide, mean_image = box_mean(guide, size), box_mean(image, size)
    slope = (box_mean(guide * image, size) - mean_guide * mean_image) / (
        box_mean(guide * guide, size) - mean_guide.square() + epsilon
    )
    offset = mean_image - slope * mean_guide
    return box_mean(slope, size) * guide + box_mean(offset, size)
