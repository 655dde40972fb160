"""Run a network over images, and gather what its figures are drawn from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mirage.analyze.spectra import Moments, Spectrum
from mirage.model import MIRAGE

__all__ = ["PLACES", "Analysis", "Similarity", "analyze"]

PLACES = {
    "scale 1": "encoder_level1",
    "scale 2": "encoder_level2",
    "scale 3": "encoder_level3",
    "scale 4": "latent",
    "latent, projected": "reduce_dim_level3",
}
"""Names of the places looked at, and the submodules of `mirage.MIRAGE` whose outputs are taken."""

SHALLOW, LATENT = "scale 1", "latent, projected"


@dataclass(frozen=True)
class Similarity:
    """Cosines of shallow features (rows) and latent ones (columns)."""

    matrix: np.ndarray

    @property
    def diagonal(self) -> float:
        """Mean magnitude on the diagonal."""
        return float(np.abs(np.diag(self.matrix)).mean())

    @property
    def off_diagonal(self) -> float:
        """Mean magnitude off the diagonal; NaN where there is nothing."""
        rest = np.abs(self.matrix[~np.eye(*self.matrix.shape, dtype=np.bool_)])
        return float(rest.mean()) if rest.size else float("nan")

    @property
    def ratio(self) -> float:
        """Off the diagonal by on it: 1 where images are not told apart."""
        return self.off_diagonal / self.diagonal if self.diagonal > 0 else float("nan")


@dataclass(frozen=True)
class Analysis:
    """What was found.

    Attributes:
        images: how many went through the network.
        spectra: Figures 3 and 4, by the names of `PLACES`.
        channels: Figure 5: cosines between the channels of the first scale, averaged down to the size of the latent
            features, and the channels of those: ``[C_s, C_l]``, mean of magnitudes over images.
        embeddings: Figure 6: cosines between the SPD embeddings of the shallow features of each image and of the latent
            features of each, ``[N, N]``; None for a network without the SPD head.
    """

    images: int
    spectra: dict[str, Spectrum]
    channels: np.ndarray
    embeddings: Similarity | None


@torch.inference_mode()
def analyze(model: nn.Module, images: Iterable[np.ndarray]) -> Analysis:
    """Gather statistics of the features of ``images``.

    Args:
        model: a `mirage.MIRAGE`, or a module that holds one; plain or accelerated.
        images: each ``[H, W, 3]``, floating point in [0, 1], H and W multiples of 8, at least 16.

    Raises:
        ValueError: there is no such network in ``model``, or no image.
    """
    network = next((module for module in model.modules() if isinstance(module, MIRAGE)), None)
    if network is None:
        raise ValueError("model: expected a mirage.MIRAGE, or a module that holds one")
    parameter = next(network.parameters())
    moments: dict[str, Moments] = {}
    channels: np.ndarray | None = None
    embeddings: list[tuple[Tensor, Tensor]] = []
    count = 0
    for image in images:
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(parameter.device, parameter.dtype)
        features, pair = _forward(network, x)
        for place, value in features.items():
            moments.setdefault(place, Moments(len(value))).add(value.double().cpu().numpy())
        cosines = _channel_cosines(features[SHALLOW], features[LATENT])
        channels = cosines if channels is None else channels + cosines
        embeddings += [pair] if pair is not None else []
        count += 1
    if channels is None:
        raise ValueError("images: expected at least one")
    return Analysis(
        images=count,
        spectra={place: moments[place].spectrum() for place in PLACES},
        channels=channels / count,
        embeddings=_embedding_cosines(embeddings) if embeddings else None,
    )


def _forward(network: MIRAGE, x: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """The features ``[C, H, W]`` at each of `PLACES`, and the two embeddings ``[D]`` where there is a head."""
    features: dict[str, Tensor] = {}
    handles = []

    def keep(place: str):
        return lambda module, inputs, output: features.__setitem__(place, output[0])

    training = network.training
    network.eval()
    try:
        for place, name in PLACES.items():
            handles.append(network.get_submodule(name).register_forward_hook(keep(place)))
        with_head = network.config["spd"]
        result = network(x, return_spd=True) if with_head else network(x)
    finally:
        for handle in handles:
            handle.remove()
        network.train(training)
    return features, (result[1][0][0], result[1][1][0]) if with_head else None


def _channel_cosines(shallow: Tensor, latent: Tensor) -> np.ndarray:
    """Magnitudes of the cosines of channels: ``[C_s, H, W]`` and ``[C_l, h, w]`` to ``[C_s, C_l]``."""
    pooled = nn.functional.adaptive_avg_pool2d(shallow[None].double(), (latent.shape[1], latent.shape[2]))[0]
    a, b = (nn.functional.normalize(each.flatten(1).double(), dim=1) for each in (pooled, latent))
    return (a @ b.T).abs().cpu().numpy()


def _embedding_cosines(embeddings: list[tuple[Tensor, Tensor]]) -> Similarity:
    shallow, latent = (torch.stack(each).double() for each in zip(*embeddings, strict=True))
    return Similarity((shallow @ latent.T).cpu().numpy())
