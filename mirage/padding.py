"""How images are padded to the multiples that the network takes."""

from __future__ import annotations

import numpy as np

__all__ = ["padding_sources"]


def padding_sources(size: int, padded: int) -> np.ndarray:
    """Of each position along a padded side, which one its value is of: int ``[padded]``.

    Mirrored at the end, as far as that goes; along a side not longer than its padding, the last one again. It is what
    `mirage.restore.pad_to_multiple` does, for those who read an image part by part.
    """
    positions = np.arange(padded)
    if padded - size < size:
        return np.where(positions < size, positions, 2 * (size - 1) - positions)
    return np.minimum(positions, size - 1)
