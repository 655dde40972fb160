"""Scores on principal components, exactly, of features that need not fit in memory.

A patch has a million features, and there are only hundreds of patches: the principal components follow from the Gram
matrix of the centred features, ``[N, N]``, which is a sum over features. They are taken in blocks of columns, each
centred by itself, so that no more than a block has to be there at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["centred_gram", "gram_scores", "pca_scores"]

COLUMNS = 4096
"""Columns of one product: their sums are of the features' dtype, sums over such blocks of float64."""

ROWS = 200  # of the symmetric product that are computed at once


def pca_scores(features: Any, components: int) -> np.ndarray:
    """Scores of features on their first principal components.

    The sign of a component is arbitrary; here its score of the largest magnitude is positive, so that results depend on
    neither the library that decomposes nor the order of patches or features.

    Args:
        features: ``[N, D]``, floating point.
        components: at most D, and below N.

    Returns:
        float64 ``[N, components]``: the centred features times the components' unit vectors.

    Raises:
        ValueError: a shape is another one, a value is not finite, or there are too few patches or features.
    """
    x = torch.as_tensor(features).detach()
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"features: expected floating point [patches, features], got {x.dtype} {list(x.shape)}")
    check_components(components, *x.shape)
    if x.shape[1] > x.shape[0]:
        return gram_scores(centred_gram([x], torch.float64), components)
    dtype, x = x.dtype, x.double()
    means = x.mean(0)
    _check_finite(x, means)
    x = x - means
    _check_spread(float(x.square().sum()), len(x) * float(means.square().sum()), dtype)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return _signed((u * s)[:, :components].cpu().numpy())


def check_components(components: int, patches: int, features: int | None = None) -> None:
    """Refuse more components than there can be."""
    if components < 1:
        raise ValueError(f"components: expected at least 1, got {components}")
    if patches <= components:
        raise ValueError(
            f"components: {components} of them need at least {components + 1} patches, got {patches}; "
            "take more patches, or ask for fewer components"
        )
    if features is not None and features < components:
        raise ValueError(f"components: expected at most as many as features, {features}, got {components}")


def _check_finite(block: Tensor, means: Tensor) -> None:
    """Refuse values that are not finite, by the means of their columns: one would make every score so."""
    if bool(torch.isfinite(means).all()):
        return
    bad = (~torch.isfinite(block).all(1)).nonzero().ravel().tolist()
    raise ValueError(
        f"features: expected finite numbers, got others in {len(bad)} of {len(block)} patches, the first of them "
        f"patch {bad[0]}"
    )


def _check_spread(spread: float, means: float, dtype: torch.dtype) -> None:
    """Refuse features that differ by rounding errors: what is fitted would be the noise of those.

    Args:
        spread, means: sums of squares over patches, of what is left when the means are off, and of the means.
        dtype: that features were computed in.
    """
    noise = 1e-13 if dtype == torch.float64 else 1e-5
    if spread <= noise**2 * means:
        raise ValueError("features: expected patches that differ, got the same features of all (are they constant?)")


@torch.no_grad()
def centred_gram(blocks: Iterable[Tensor], dtype: torch.dtype | None = None) -> np.ndarray:
    """The Gram matrix of features with each column's mean taken off, summed over blocks of columns.

    Args:
        blocks: each ``[N, any number of columns]`` with all patches, floating point; none is
            looked at once the next one is asked for.
        dtype: of products; without it the blocks' own, or float32 of 16-bit ones.

    Returns:
        float64 ``[N, N]``: products of at most 4096 columns are summed in their dtype, and all those in float64.

    Raises:
        ValueError: there is no block, their rows differ in number, a value is not finite, or all patches have the same
            features, but for rounding errors.
    """
    total: np.ndarray | None = None
    mean_power, given = 0.0, torch.float64
    for block in blocks:
        if block.ndim != 2 or total is not None and len(block) != len(total):
            rows = "N" if total is None else len(total)
            raise ValueError(f"blocks: expected [{rows}, columns], got {list(block.shape)}")
        total = np.zeros((len(block), len(block))) if total is None else total
        for columns in block.split(COLUMNS, 1):
            part = columns.to(dtype or (torch.float64 if columns.dtype == torch.float64 else torch.float32))
            means = part.mean(0, dtype=torch.float64)
            _check_finite(part, means)
            mean_power += len(part) * float(means.square().sum())
            total += _lower_product(part - means.to(part.dtype))
        given = block.dtype
    if total is None:
        raise ValueError("blocks: expected at least one, got none")
    _check_spread(float(total.trace()), mean_power, given)
    return np.tril(total) + np.tril(total, -1).T


def _lower_product(part: Tensor) -> np.ndarray:
    """The lower triangle of ``part part^T``, and some of what is above it: a few rows at a time, for less work."""
    result = part.new_zeros(len(part), len(part))
    for start in range(0, len(part), ROWS):
        result[start:, start : start + ROWS] = part[start:] @ part[start : start + ROWS].T
    return result.cpu().numpy()


def gram_scores(gram: np.ndarray, components: int) -> np.ndarray:
    """Scores from the Gram matrix of centred features: its eigenvectors times the roots of its eigenvalues.

    Args:
        gram: ``[N, N]``, symmetric.
        components: below N.

    Returns:
        float64 ``[N, components]``, the largest component first.

    Raises:
        ValueError: there are too few patches.
    """
    check_components(components, len(gram))
    values, vectors = np.linalg.eigh(gram)
    largest = slice(-1, -components - 1, -1)
    return _signed(vectors[:, largest] * np.sqrt(np.maximum(values[largest], 0)))  # rounding leaves some below 0


def _signed(scores: np.ndarray) -> np.ndarray:
    extremes = np.take_along_axis(scores, np.abs(scores).argmax(0)[None], 0)
    return np.where(extremes < 0, -scores, scores)
