"""Generalised Gaussian distributions (GGD): fitted to features, and how far two of them lie apart.

The measure is that of SRGA (arXiv 2205.07019), on which GRIDS (arXiv 2407.12273) builds: the features of one
degradation are projected on their principal components, a GGD is fitted to all scores together, and degradations are
compared by the Kullback-Leibler divergence of their GGDs, on a logarithmic scale.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mirage.grids.pca import pca_scores

__all__ = ["COMPONENTS", "GGD", "clip_outliers", "fit_ggd", "fit_values", "kl_divergence", "mean_ggd", "similarity"]

COMPONENTS = 300
"""Principal components of a fit, unless another number is asked for."""

CLIP = 5.0  # standard deviations beyond which values are left out
GRID = (200, 9999)  # thousandths: the shapes that a fit chooses from
OFFSET, SHIFT = 1e-5, 5.0  # of the logarithmic scale, so that S(p, p) = 0


@dataclass(frozen=True)
class GGD:
    """A generalised Gaussian distribution with mean 0: ``alpha / (2 b Gamma(1/alpha)) exp(-(|x| / b)^alpha)``.

    Args:
        alpha: shape; 2 is a Gaussian, 1 a Laplace distribution.
        sigma: standard deviation.

    Raises:
        ValueError: one of them is not a positive, finite number.
    """

    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("sigma", self.sigma)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive, finite number, got {value!r}")

    @property
    def log_scale(self) -> float:
        """``ln b``, where ``b = sigma sqrt(Gamma(1/alpha) / Gamma(3/alpha))``."""
        return math.log(self.sigma) + 0.5 * (math.lgamma(1 / self.alpha) - math.lgamma(3 / self.alpha))

    @property
    def scale(self) -> float:
        """The ``b`` of the density."""
        return math.exp(self.log_scale)

    def log_pdf(self, x: Any) -> np.ndarray:
        """The logarithm of the density at ``x`` (an array of any shape, or a number), float64 of the same shape."""
        log_top = math.log(self.alpha) - math.log(2) - self.log_scale - math.lgamma(1 / self.alpha)
        with np.errstate(divide="ignore"):  # the logarithm of 0, whose power is 0
            return log_top - np.exp(self.alpha * (np.log(np.abs(np.asarray(x, np.float64))) - self.log_scale))

    def pdf(self, x: Any) -> np.ndarray:
        """The density at ``x`` (an array of any shape, or a number), float64 of the same shape."""
        return np.exp(self.log_pdf(x))


def fit_ggd(features: Any, components: int = COMPONENTS, *, clip: float | None = CLIP, refine: bool = False) -> GGD:
    """The GGD of the features of one degradation: principal components, their scores, outliers left out, moments.

    Args:
        features: ``[N, D]``, a row for each patch; an array or tensor of floating point, N above ``components``, which
            is at most D. Sums are of float64.
        components: principal components whose scores count. sigma depends on it and on N: what is compared must agree
            in both.
        clip: scores so many standard deviations from their mean, or more, are left out; None keeps all.
        refine: solve for alpha, in the place of the nearest thousandth.

    Raises:
        ValueError: a shape is another one, there are too few patches or features, a value is not finite, or all
            patches have the same features.
    """
    return fit_values(pca_scores(features, components), clip=clip, refine=refine)


def fit_values(values: Any, *, clip: float | None = CLIP, refine: bool = False) -> GGD:
    """The GGD with the moments of ``values``: alpha from ``mean(x^2) / mean(|x - mean|)^2``, sigma from ``mean(x^2)``.

    Args:
        values: numbers, in an array of any shape.
        clip, refine: as for `fit_ggd`.

    Raises:
        ValueError: there are no values, one is not finite, or all are the same.
    """
    x = np.asarray(values, np.float64).ravel()
    if not x.size:
        raise ValueError("values: expected at least one number, got none")
    finite = np.isfinite(x)
    if not finite.all():
        raise ValueError(f"values: expected finite numbers, got {x.size - int(finite.sum())} that are not, of {x.size}")
    if clip is not None:
        x = clip_outliers(x, clip)
    deviation = float(np.abs(x - x.mean()).mean())
    power = float(np.square(x).mean())
    # A spread of rounding errors is none: the ratio of moments would be of noise.
    if deviation <= 1e-12 * math.sqrt(power) or power == 0:
        raise ValueError("values: expected numbers that differ, got the same everywhere (constant images?)")
    ratio = power / deviation**2
    return GGD(_refined(ratio) if refine else _nearest(ratio), math.sqrt(power))


def clip_outliers(values: np.ndarray, deviations: float = CLIP) -> np.ndarray:
    """The values less than so many standard deviations from the mean, both taken of all values, once."""
    if not deviations > 0:
        raise ValueError(f"clip: expected a positive number of standard deviations, got {deviations!r}")
    mean, deviation = values.mean(), values.std()
    if deviation == 0:
        return values
    return values[(values > mean - deviations * deviation) & (values < mean + deviations * deviation)]


def _ratio(alpha: float) -> float:
    """``Gamma(1/a) Gamma(3/a) / Gamma(2/a)^2``, which falls as alpha grows."""
    return math.exp(math.lgamma(1 / alpha) + math.lgamma(3 / alpha) - 2 * math.lgamma(2 / alpha))


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """The shapes that a fit chooses from, and their ratios."""
    alphas = np.arange(GRID[0], GRID[1] + 1) / 1000
    return alphas, np.array([_ratio(alpha) for alpha in alphas])


def _nearest(ratio: float) -> float:
    alphas, ratios = _grid()
    return float(alphas[np.argmin(np.abs(ratios - ratio))])


def _refined(ratio: float) -> float:
    """The shape of a ratio, between the ends of the grid, by bisection."""
    low, high = GRID[0] / 1000, GRID[1] / 1000
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        low, high = (middle, high) if _ratio(middle) > ratio else (low, middle)


def kl_divergence(p: GGD, q: GGD) -> float:
    """``KL(p || q)`` in nats, at least 0; infinite where it passes the range of float64."""
    if p == q:  # where the terms below leave a rounding error
        return 0.0
    a1, a2 = p.alpha, q.alpha
    log_b = p.log_scale - q.log_scale
    first = math.log(a1 / a2) - log_b + math.lgamma(1 / a2) - math.lgamma(1 / a1)
    try:
        second = math.exp(a2 * log_b + math.lgamma((a2 + 1) / a1) - math.lgamma(1 / a1))
    except OverflowError:
        return math.inf
    return max(0.0, first + second - 1 / a1)


def similarity(p: GGD, q: GGD) -> float:
    """``S = log10(KL(p || q) + 1e-5) + 5``: 0 for equal distributions, and more the less alike they are.

    GRIDS says "logarithm of the KL divergence"; base and offset are those of the code of SRGA, which its published
    distances fit (2.20 to 4.33, foreign images above 4).
    """
    return scaled(kl_divergence(p, q))


def scaled(divergence: float) -> float:
    """S of a divergence; exactly 0 where that is 0."""
    return math.log10(divergence + OFFSET) + SHIFT if divergence else 0.0


def mean_ggd(members: Any) -> GGD:
    """The parameters of a group: plain means of its members' alpha and sigma.

    Raises:
        ValueError: there are no members.
    """
    members = list(members)
    if not members:
        raise ValueError("members: expected at least one distribution, got none")
    return GGD(
        math.fsum(each.alpha for each in members) / len(members),
        math.fsum(each.sigma for each in members) / len(members),
    )
