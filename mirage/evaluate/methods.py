"""What restores an image: a network, or one of the classical methods that tables compare it with."""

from __future__ import annotations

import hashlib
import importlib.metadata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CLASSICAL", "Cbm3d", "Identity", "Method", "Network", "NonLocalMeans", "SigmaNeeded"]


class SigmaNeeded(ValueError):
    """A method that removes noise of a known strength was given an image with an unknown one."""


class Method(ABC):
    """Maps an image ``[H, W, 3]``, float32 in [0, 1], to a restored one of the same shape, values unclipped.

    Attributes:
        label: its name in tables.
        definition: what it is, in a line, for the output.
        needs_sigma: it has to be told the standard deviation of the noise (in units of 1/255).
    """

    label: str
    definition: str
    needs_sigma = False

    @abstractmethod
    def restore(self, image: np.ndarray, sigma: float | None) -> np.ndarray: ...

    def __call__(self, image: np.ndarray, sigma: float | None = None) -> np.ndarray:
        """Restore ``image``.

        Args:
            sigma: of its noise, in units of 1/255; None where that is not what ails it.

        Raises:
            SigmaNeeded: the method needs it.
        """
        if self.needs_sigma and sigma is None:
            raise SigmaNeeded(f"{self.label} removes Gaussian noise of a known sigma")
        return self.restore(image, sigma)

    def identity(self) -> dict[str, Any]:
        """What decides its results, as JSON: two runs are one where these are equal."""
        return {"definition": self.definition}


class Identity(Method):
    """The input itself: how far it is from the target."""

    label = "input"
    definition = "the input itself"

    def restore(self, image: np.ndarray, sigma: float | None) -> np.ndarray:
        return image


class NonLocalMeans(Method):
    """Non-local means of scikit-image with the true sigma; of the cut-off distances 0.4, 0.6
    and 0.8 the one that was best on images of BSD400 (its manual has 0.6 for the exact mode, 0.8 for the fast one)."""

    label = "NLM"
    needs_sigma = True
    SETTINGS: dict[str, Any] = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "channel_axis": -1}
    STRENGTH = 0.6
    """Cut-off distance in units of sigma."""

    def __init__(self) -> None:
        settings = ", ".join(f"{name}={value}" for name, value in self.SETTINGS.items())
        self.definition = (
            f"skimage.restoration.denoise_nl_means(sigma=sigma, h={self.STRENGTH} * sigma, {settings}), "
            f"scikit-image {importlib.metadata.version('scikit-image')}, sigma given"
        )

    def restore(self, image: np.ndarray, sigma: float | None) -> np.ndarray:
        from skimage.restoration import denoise_nl_means

        assert sigma is not None
        scaled = sigma / 255
        return denoise_nl_means(image, sigma=scaled, h=self.STRENGTH * scaled, **self.SETTINGS).astype(np.float32)


class Cbm3d(Method):
    """CBM3D of its authors' package, free for non-commercial use."""

    label = "CBM3D"
    needs_sigma = True

    def __init__(self) -> None:
        self.definition = f"bm3d.bm3d_rgb(image, sigma), bm3d {importlib.metadata.version('bm3d')}, sigma given"

    def restore(self, image: np.ndarray, sigma: float | None) -> np.ndarray:
        import bm3d

        assert sigma is not None
        return np.asarray(bm3d.bm3d_rgb(image.astype(np.float64), sigma / 255), dtype=np.float32)


class Network(Method):
    """A trained model, run by `mirage.restore.Restorer`.

    Args:
        weights: a checkpoint, or the name of packaged weights.
        label: in tables; the file's stem by default.
        attention, tile, overlap, window, memory, fast, key, device: as of `mirage.restore.Restorer`.

    Raises:
        ValueError, OSError: the checkpoint cannot be read.
    """

    def __init__(self, weights: str | Path, label: str | None = None, *, attention: str = "auto",
                 tile: int | None = None, overlap: int | None = None, window: int = 192, memory: str | None = None,
                 fast: bool = True, key: str | None = None, device: Any = "auto") -> None:  # fmt: skip
        from mirage.restore import Restorer, resolve_weights
        from mirage.restore.tiles import resolve_overlap

        overlap = resolve_overlap(tile, overlap)
        path = resolve_weights(weights)
        self.restorer = Restorer(path, attention=attention, tile=tile, overlap=overlap, window=window, memory=memory,
                                 fast=fast, key=key, device=device)  # fmt: skip
        self.label = label or path.stem
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.key = key
        # auto is one pass, or global where memory does not allow it, which is equal to it
        self.mode: dict[str, Any] = {}
        if tile is not None or attention == "tile":
            self.mode = {"attention": "tile", "tile": tile, "overlap": overlap, "memory": memory}
        elif attention == "local":
            self.mode = {"attention": "local", "window": window}
        how = ", ".join(f"{name} {value}" for name, value in self.mode.items() if value) or "as in one pass"
        modules = "fast modules" if fast else "plain PyTorch"
        self.definition = f"{path.name} (SHA-256 {self.digest[:12]}), {modules}, {how}"

    def restore(self, image: np.ndarray, sigma: float | None) -> np.ndarray:
        return self.restorer(image)

    def identity(self) -> dict[str, Any]:
        return {"weights": self.digest, "key": self.key, "mode": self.mode}


CLASSICAL: dict[str, type[Method]] = {"identity": Identity, "nlm": NonLocalMeans, "cbm3d": Cbm3d}
"""By the names of the command line."""
