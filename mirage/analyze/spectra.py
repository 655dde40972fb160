"""Statistics of channels over all pixels of all images, gathered image by image in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Moments", "Spectrum"]


class Moments:
    """Count, mean and centred second moments of ``channels`` channels, merged pairwise as pixels come.

    Attributes:
        count: pixels so far.
        mean: ``[C]``.
        scatter: ``[C, C]``, the sum over pixels of ``(x - mean)(x - mean)^T``.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = np.zeros(channels)
        self.scatter = np.zeros((channels, channels))

    def add(self, features: np.ndarray) -> None:
        """Take in the features of one image, ``[C, H, W]`` or ``[C, N]``."""
        x = features.reshape(len(features), -1).astype(np.float64)
        count, mean = x.shape[1], x.mean(axis=1)
        centred = x - mean[:, None]
        delta, total = mean - self.mean, self.count + count
        self.scatter += centred @ centred.T + np.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def spectrum(self) -> Spectrum:
        """What follows from the moments."""
        gram = self.scatter + self.count * np.outer(self.mean, self.mean)
        norm = np.sqrt(np.diag(gram))
        with np.errstate(invalid="ignore", divide="ignore"):
            similarity = np.nan_to_num(gram / np.outer(norm, norm))
        return Spectrum(
            variances=_eigenvalues(self.scatter) / max(self.count - 1, 1),
            singular=np.sqrt(_eigenvalues(gram)),
            similarity=np.clip(similarity, -1, 1),
        )


@dataclass(frozen=True)
class Spectrum:
    """Channels of one place in the network, seen as a matrix of C channels by all pixels.

    Attributes:
        variances: ``[C]``, of the principal components (of the centred matrix), the largest first.
        singular: ``[C]``, singular values of the matrix as it is, the largest first.
        similarity: ``[C, C]``, cosines between channels, as they are; 0 for a channel that is 0.
    """

    variances: np.ndarray
    singular: np.ndarray
    similarity: np.ndarray

    @property
    def channels(self) -> int:
        return len(self.variances)

    @property
    def explained(self) -> np.ndarray:
        """``[C]``: the share of the variance in the first components, cumulative; zeros where nothing varies."""
        total = self.variances.sum()
        return np.cumsum(self.variances) / total if total > 0 else np.zeros_like(self.variances)

    def rank(self, share: float = 0.9) -> int:
        """How many principal components hold ``share`` of the variance."""
        return int(np.searchsorted(self.explained, share - 1e-12) + 1) if self.explained[-1] > 0 else 0

    def energy_rank(self, share: float = 0.9) -> int:
        """How many singular values hold ``share`` of the sum of squares: as `rank`, of the matrix as it is."""
        energy = np.cumsum(self.singular**2)
        return int(np.searchsorted(energy, (share - 1e-12) * energy[-1]) + 1) if energy[-1] > 0 else 0

    @property
    def entropy_rank(self) -> float:
        """Roy and Vetterli's effective rank: the exponential of the entropy of the normalised singular values."""
        p = self.singular / self.singular.sum() if self.singular.sum() > 0 else self.singular
        p = p[p > 0]
        return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0

    @property
    def mean_similarity(self) -> float:
        """Mean magnitude of the cosines between different channels."""
        n = self.channels
        return float((np.abs(self.similarity).sum() - np.abs(np.diag(self.similarity)).sum()) / max(n * (n - 1), 1))


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Of a positive semidefinite matrix, the largest first, without what rounding made negative."""
    return np.clip(np.linalg.eigvalsh(matrix)[::-1], 0, None)
