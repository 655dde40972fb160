"""MIRAGE on images whose feature maps do not fit in memory, and with statistics of windows instead of the whole image.

The network's attention runs over channels: every pixel's result depends on sums over the whole image, so a tile that is
restored by itself is not a tile of the restored image. `run_global` computes what one pass over the whole image
computes, at any size. `run_local` takes the sums from windows of the size that the network was trained on (test-time
local conversion).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from torch import nn

from mirage.regional.arrays import check_image, padded_size, rows_from, rows_to
from mirage.regional.network import steps_of
from mirage.regional.sweeps import Settings, run

__all__ = ["Settings", "run", "run_global", "run_local"]

DEFAULT_MEMORY = 1 << 30


def run_global(
    model: nn.Module,
    image: np.ndarray,
    out: np.ndarray | None = None,
    *,
    memory: int = DEFAULT_MEMORY,
    scratch: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Restore an image in strips, with the result of one pass over all of it.

    Each block is a sweep over strips of rows: it applies the block with the sums over the whole map that the sweep
    before has made, and sums up for the next. The result differs from that of the whole pass by the rounding of sums
    taken in another order (some 1e-7 in float32). Feature maps lie in files without a name, as far as they do not fit
    in `memory`: 11.5 values of the network's dtype for each pixel of the image and channel of its `dim`, which are 6.6
    GB for 24 million pixels and MIRAGE-T in float32.

    Args:
        model: a `mirage.MIRAGE` that `mirage.fast.accelerate` has replaced the blocks of, in evaluation mode.
        image: [H, W, 3], uint8, uint16 or float32 in [0, 1]; read by strips, so it may be memory-mapped.
        out: where the result goes, of the shape of `image`; a new array of its dtype by default.
        memory: bytes that strips of feature maps, and the maps themselves as far as they go, may take. The
            process takes some 100 MiB of working memory besides.
        scratch: a folder for the files; the system's for temporary files by default. A folder in memory
            (``/dev/shm``) is as good as more `memory`, a slow disk makes the whole run slow.
        progress: called with the number of sweeps that are done and of all.

    Returns:
        `out`: the restored image, clipped to [0, 1], rounded for integers.

    Raises:
        TypeError, ValueError: an argument is wrong, or `model` has a module, named, that cannot be run so.
        OSError: there is not enough room in the scratch folder (errno ENOSPC, with bytes needed and available).
    """
    return _run(model, image, out, Settings(memory=memory, scratch=scratch, progress=progress))


def run_local(
    model: nn.Module,
    image: np.ndarray,
    out: np.ndarray | None = None,
    *,
    window: int,
    overlap: float = 0.5,
    memory: int = DEFAULT_MEMORY,
    scratch: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Restore an image with the attention's statistics taken from windows around each pixel.

    A network that was trained on patches meets other statistics in a whole image. The test-time local converter (TLC,
    Chu et al., ECCV 2022) takes them from windows of about the training patch's size. Here as in its conversion of
    Restormer's channel attention, windows lie on a regular grid, each of `window` pixels over the level's scale, the
    last ones shifted so that all are inside the map; what several of them cover is the average of their results. With
    ``overlap=0`` the attention is that of TLC's code in every digit that float64 keeps (1e-16 was measured on maps that
    windows cover evenly and unevenly). What is different:

    - Sums are taken once for each cell between the windows' edges and added up. TLC cuts overlapping windows out of q,
      k and v and computes each by itself.
    - Matrices are averaged, not results: the same, as results are linear in them.
    - The kernels that the gated CNN generates from an average follow the same windows, and what comes behind the
      convolution sees the averaged one. TLC pools around each pixel instead, which would ask for kernels at each pixel.
    - Windows share half of themselves with the next by default. TLC's share what the size of the image leaves.

    Convolutions read beyond a window's edge, as they do in TLC. An image that is not larger than the window gives the
    result of :func:`run_global`.

    Args:
        model, image, out, memory, scratch, progress: as of :func:`run_global`.
        window: side of a window in pixels of the image, a multiple of 8. TLC takes one and a half times the side of
            the training patches.
        overlap: the least part of a window that it shares with its neighbour on each side, in [0, 1).

    Returns:
        `out`: the restored image, clipped to [0, 1], rounded for integers.

    Raises:
        TypeError, ValueError, OSError: as :func:`run_global`.
    """
    if not isinstance(window, int) or window <= 0 or window % 8:
        raise ValueError(f"window: expected a positive multiple of 8, got {window!r}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: expected a number from 0 to below 1, got {overlap!r}")
    settings = Settings(memory=memory, scratch=scratch, progress=progress, window=window, overlap=overlap)
    return _run(model, image, out, settings)


def _run(model: nn.Module, image: np.ndarray, out: np.ndarray | None, settings: Settings) -> np.ndarray:
    channels = steps_of(model)[0].weight.shape[1]  # type: ignore[union-attr]
    check_image("image", image, channels)
    if out is None:
        out = np.empty(image.shape, image.dtype)
    check_image("out", out, channels)
    if out.shape != image.shape:
        raise ValueError(f"out: expected shape {list(image.shape)} like image, got {list(out.shape)}")
    run(model, rows_from(image), padded_size(image), rows_to(out), settings)
    return out
