"""From patches to the GGD of their features, whatever the number of features, in bounded memory.

800 patches with 1,048,576 features each are 3.4 GB of float32. They are never there at once: a descriptor that can tell
the features of all patches a block of columns at a time does so (`BlockDescriptor`), and those of any other lie in a
temporary file where they pass the memory that is allowed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mirage.grids.ggd import CLIP, COMPONENTS, GGD, fit_values
from mirage.grids.pca import centred_gram, check_components, gram_scores

__all__ = ["BlockDescriptor", "Descriptor", "descriptor_ggd", "feature_gram"]

MEMORY = 2**29
"""Bytes of features that are held at a time."""


@runtime_checkable
class Descriptor(Protocol):
    """What tells degradations apart: features of small images."""

    def features(self, images: Tensor, /) -> Tensor:
        """``[N, 3, H, W]``, float32 in [0, 1], to ``[N, D]``, floating point."""
        ...


@runtime_checkable
class BlockDescriptor(Descriptor, Protocol):
    """A descriptor that can give the features of many images a block of columns at a time."""

    def feature_blocks(self, images: Tensor, memory: int, /) -> Iterator[Tensor]:
        """The columns of ``features(images)``, in any order, in blocks ``[N, columns]`` of about ``memory`` bytes.

        A block may be written to when the next one is asked for.
        """
        ...


def descriptor_ggd(
    descriptor: Descriptor, images: Tensor, components: int = COMPONENTS, *, clip: float | None = CLIP,
    refine: bool = False, memory: int = MEMORY, scratch: str | Path | None = None,
) -> GGD:  # fmt: skip
    """The GGD of images: `fit_ggd` of their features, which need not fit in memory.

    Args:
        descriptor: see `Descriptor`.
        images: ``[N, 3, H, W]``, float32 in [0, 1], N above ``components``.
        components, clip, refine: as for `fit_ggd`.
        memory: bytes of features that are held at a time; beside them there is room for the descriptor's own work.
        scratch: folder for the temporary file of a descriptor that gives no blocks; the system's by default.

    Raises:
        ValueError: as `fit_ggd`; or what the descriptor returns is no ``[N, D]``.
    """
    if images.ndim != 4:
        raise ValueError(f"images: expected [N, 3, H, W], got {list(images.shape)}")
    check_components(components, len(images))
    gram = feature_gram(descriptor, images, least=components, memory=memory, scratch=scratch)
    return fit_values(gram_scores(gram, components), clip=clip, refine=refine)


@torch.no_grad()
def feature_gram(
    descriptor: Descriptor, images: Tensor, *, least: int = 1, batch: int = 16, memory: int = MEMORY,
    scratch: str | Path | None = None,
) -> np.ndarray:  # fmt: skip
    """The Gram matrix ``[N, N]`` of the features, each with its mean over the images taken off; float64.

    Args:
        least: features that there must be.
        batch: images that a descriptor without blocks sees at once.
        descriptor, images, memory, scratch: as for `descriptor_ggd`.

    Raises:
        ValueError: a feature is not finite, there are too few, or the descriptor returns no ``[N, D]``.
        OSError: there is no room for the temporary file.
    """
    if isinstance(descriptor, BlockDescriptor):
        return centred_gram(_counted(descriptor.feature_blocks(images, memory), least))
    first = _features(descriptor, images[:batch])
    check_components(least, len(images), first.shape[1])
    row = first.shape[1] * first.element_size()
    if len(images) * row <= memory:
        parts = [first, *(_features(descriptor, part, first) for part in images[batch:].split(batch))]
        return centred_gram([torch.cat(parts)])
    with tempfile.TemporaryFile(dir=scratch) as file:
        widths = _widths(first.shape[1], max(1, memory // (len(images) * first.element_size())))
        _store(file, first, 0, len(images), widths)
        for start in range(batch, len(images), batch):
            part = _features(descriptor, images[start : start + batch], first)
            _store(file, part, start, len(images), widths)
        file.flush()
        return centred_gram(_blocks(file, len(images), widths, first.dtype))


def _counted(blocks: Iterator[Tensor], least: int) -> Iterator[Tensor]:
    columns = images = 0
    for block in blocks:
        images, columns = len(block), columns + block.shape[1]
        yield block
    check_components(least, images, columns)


def _features(descriptor: Descriptor, images: Tensor, like: Tensor | None = None) -> Tensor:
    """Features on the CPU, float64 or float32, checked."""
    found: Any = descriptor.features(images)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images) or not found.is_floating_point():
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"descriptor: expected floating-point features [{len(images)}, D], got {got}")
    if like is not None and found.shape[1] != like.shape[1]:
        raise ValueError(f"descriptor: expected {like.shape[1]} features as of the first images, got {found.shape[1]}")
    dtype = torch.float64 if found.dtype == torch.float64 else torch.float32
    return found.detach().to("cpu", dtype)


def _widths(columns: int, width: int) -> list[int]:
    """Columns of each block, at most ``width``."""
    return [min(width, columns - start) for start in range(0, columns, width)]


def _store(file: BinaryIO, part: Tensor, start: int, images: int, widths: list[int]) -> None:
    """Write rows from ``start`` on to each block's region, so that a block is read in one piece."""
    offset = 0
    for block, width in zip(part.split(widths, 1), widths, strict=True):
        file.seek((offset * images + start * width) * part.element_size())
        file.write(block.contiguous().numpy().tobytes())
        offset += width


def _blocks(file: BinaryIO, images: int, widths: list[int], dtype: torch.dtype) -> Iterator[Tensor]:
    file.seek(0)
    kind = np.float64 if dtype == torch.float64 else np.float32
    for width in widths:
        block = np.empty((images, width), kind)
        if file.readinto(block.data.cast("B")) != block.nbytes:  # type: ignore[attr-defined]
            raise OSError("the temporary file of features ended early")
        yield torch.from_numpy(block)
