"""Metrics by name, each with the definition that its name stands for here.

Libraries give other numbers under the same names: docs/metrics.md tabulates them. Everything is computed by
scikit-image, LPIPS by its authors' package ``lpips``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["DEFAULT", "METRICS", "Metric", "measure", "metric", "to_y"]

PEAK_Y = 255.0  # the literature's, though Y itself lies in [16, 235]


@dataclass(frozen=True)
class Metric:
    """A named metric of two images.

    Attributes:
        name: as on the command line.
        function: of target and restored image, ``[H, W, 3]`` floats in [0, 1]; the value of one image.
        definition: what it is, in a line.
        requires: the module that computes it.
        digits: decimals printed.
        unit: ``"dB"`` or empty.
        pooled: the average is taken over squared errors in the place of values.
    """

    name: str
    function: Callable[[np.ndarray, np.ndarray], float]
    definition: str
    requires: str = "skimage"
    digits: int = 4
    unit: str = ""
    pooled: bool = False

    def average(self, values: Sequence[float]) -> float:
        """The average over images: of the values, or of the errors they stand for where ``pooled``."""
        array = np.asarray(values, dtype=np.float64)
        if not self.pooled:
            return float(array.mean())
        with np.errstate(divide="ignore"):
            return float(-10 * np.log10(np.mean(10 ** (-array / 10))))


def _psnr(target: np.ndarray, restored: np.ndarray) -> float:
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):  # equal images: infinity
        return float(peak_signal_noise_ratio(target, restored, data_range=1))


def _psnr_8bit(target: np.ndarray, restored: np.ndarray) -> float:
    return _psnr(target.astype(np.float64), np.round(restored.astype(np.float64) * 255) / 255)


def _psnr_y(target: np.ndarray, restored: np.ndarray) -> float:
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(to_y(target), to_y(restored), data_range=PEAK_Y))


def _ssim(target: np.ndarray, restored: np.ndarray) -> float:
    from skimage.metrics import structural_similarity

    return float(structural_similarity(target, restored, data_range=1, channel_axis=2))


def _ssim_gaussian(target: np.ndarray, restored: np.ndarray) -> float:
    from skimage.metrics import structural_similarity

    return float(structural_similarity(target, restored, data_range=1, channel_axis=2, **GAUSSIAN))


def _ssim_y(target: np.ndarray, restored: np.ndarray) -> float:
    from skimage.metrics import structural_similarity

    return float(structural_similarity(to_y(target), to_y(restored), data_range=PEAK_Y, **GAUSSIAN))


GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
"""Wang et al.'s window: scikit-image cuts it at 3.5 sigma, which makes it 11x11, and leaves out 5 pixels of border."""


def to_y(image: np.ndarray) -> np.ndarray:
    """Luma of ``[H, W, 3]`` in [0, 1], BT.601 in studio range: ``16 + 65.481 R + 128.553 G + 24.966 B``, float64."""
    from skimage.color import rgb2ycbcr

    return rgb2ycbcr(image.astype(np.float64))[..., 0]


def _lpips(target: np.ndarray, restored: np.ndarray) -> float:
    import torch

    pair = (torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None] * 2 - 1 for x in (restored, target))
    with torch.inference_mode():
        return float(_lpips_network()(*pair))


@functools.lru_cache(maxsize=1)
def _lpips_network():
    import contextlib
    import io

    import lpips

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it sets up
        return lpips.LPIPS(net="alex").eval()


_SKIMAGE_SSIM = (
    "SSIM of scikit-image, data_range=1, channel_axis=2: 7x7 uniform window, sample covariance, mean of R, G, B"
)

METRICS = {
    entry.name: entry
    for entry in (
        Metric(
            "psnr", _psnr, "PSNR of RGB in [0, 1], clipped, not rounded, peak 1 (the released evaluation's)",
            digits=2, unit="dB",
        ),
        Metric("ssim", _ssim, f"{_SKIMAGE_SSIM} (the released evaluation's)"),
        Metric(
            "psnr_y", _psnr_y,
            "PSNR of Y, ITU-R BT.601 studio range (16 + 65.481 R + 128.553 G + 24.966 B), peak 255, not rounded",
            digits=2, unit="dB",
        ),
        Metric(
            "ssim_gaussian", _ssim_gaussian,
            "SSIM with Wang et al.'s window: 11x11 Gaussian, sigma 1.5, population covariance, valid positions, no "
            "downsampling, mean of R, G, B (scikit-image)",
        ),
        Metric("ssim_y", _ssim_y, "ssim_gaussian of the Y of psnr_y, data range 255 (scikit-image)"),
        Metric(
            "psnr_8bit", _psnr_8bit, "PSNR of RGB after rounding the restored image to 8 bits, as from a saved PNG",
            digits=2, unit="dB",
        ),
        Metric(
            "psnr_pooled", _psnr, "PSNR of the squared error averaged over all images, not the mean of PSNRs",
            digits=2, unit="dB", pooled=True,
        ),
        Metric("lpips", _lpips, "LPIPS 0.1 with AlexNet, package lpips, inputs in [-1, 1]; lower is better", "lpips"),
    )
}  # fmt: skip

DEFAULT = ("psnr", "ssim")


def metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in METRICS:
        raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]


def measure(target: np.ndarray, restored: np.ndarray, names: Sequence[str] = DEFAULT) -> dict[str, float]:
    """The named metrics of one image.

    Args:
        target, restored: ``[H, W, 3]``, floating point; both are clipped to [0, 1].
        names: keys of `METRICS`.

    Raises:
        ValueError: an unknown metric, shapes that differ or are not RGB, values that are not finite, or an image
            smaller than the window of an SSIM.
    """
    chosen = [metric(name) for name in names]
    if target.shape != restored.shape or target.ndim != 3 or target.shape[2] != 3:
        raise ValueError(f"target and restored: expected one shape [H, W, 3], got {target.shape} and {restored.shape}")
    if not np.isfinite(restored).all():
        raise ValueError("restored: it has values that are not finite")
    target, restored = np.clip(target, 0, 1), np.clip(restored, 0, 1)
    return {entry.name: entry.function(target, restored) for entry in chosen}
