"""A small convolutional network that tells degradations and their strengths apart, small enough to train on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mirage.unirestorer.extractors import View, check_view, embed_views, fingerprint_of

__all__ = ["SmallExtractor"]

LEAST = 8  # pixels a side, so that every stage has some


class SmallExtractor(nn.Module):
    """Four stages of two 3x3 convolutions with batch normalisation; mean and spread of each stage's features, and two
    linear layers on them.

    What tells noise, blur and compression apart are statistics of fine texture, at its full resolution. So the first
    stage is as fine as the image, no normalisation is by image, and the logarithm of each feature's standard deviation
    goes on beside its mean. An embedding of a crop has a norm of sqrt(dim), so that its values are about 1; that of an
    image, the mean over crops, has less where they differ.

    Args:
        width: features of the first stage; the others have 2, 4 and 8 times as many, each at half the resolution.
        dim: of an embedding.
        view, size: see `mirage.unirestorer.views`; smaller images are not enlarged.

    Raises:
        ValueError: a number is below 1, or ``size`` below 8, or the view is none.
    """

    def __init__(self, width: int = 12, dim: int = 128, *, view: View = "crops", size: int = 128) -> None:
        super().__init__()
        check_view(view)
        for name, value, least in (("width", width, 1), ("dim", dim, 1), ("size", size, LEAST)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.config: dict[str, Any] = {"width": width, "dim": dim}
        self.view, self.size = view, size
        widths = [width * 2**stage for stage in range(4)]
        stages: list[nn.Module] = []
        before = 3
        for features in widths:
            stride = 2 if stages else 1
            stages.append(nn.Sequential(*_layer(before, features, stride), *_layer(features, features)))
            before = features
        self.stages = nn.ModuleList(stages)
        statistics = 2 * sum(widths)
        hidden = 2 * dim
        self.norm = nn.BatchNorm1d(statistics)
        self.head = nn.Sequential(nn.Linear(statistics, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.config["dim"])

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {**self.config, "view": self.view, "size": self.size}

    @property
    def fingerprint(self) -> str:
        """See `Extractor`."""
        return fingerprint_of("small", self.arguments, self.state_dict())

    def forward(self, crops: Tensor) -> Tensor:
        """Embeddings of crops as they are: ``[N, 3, h, w]`` in [0, 1], sides of at least 8, to ``[N, dim]``.

        Raises:
            ValueError: they have another shape.
        """
        if crops.ndim != 4 or crops.shape[1] != 3 or min(crops.shape[2:]) < LEAST:
            raise ValueError(f"crops: expected [N, 3, h, w], sides of at least {LEAST}, got {list(crops.shape)}")
        x = 2 * crops - 1
        found = []
        for stage in self.stages:
            x = stage(x)
            variance, mean = torch.var_mean(x.flatten(2).float(), 2, correction=0)
            found += [mean, 0.5 * torch.log(variance + 1e-5)]
        z = self.head(self.norm(torch.cat(found, 1)))
        return nn.functional.normalize(z.float()) * math.sqrt(self.dim)

    def embed(self, images: Tensor) -> Tensor:
        """See `Extractor`; in evaluation mode, whatever the module's.

        Raises:
            ValueError: the images are no ``[B, 3, H, W]``, or have a side below 8.
        """
        weight: Any = self.head[0].weight
        training = self.training
        self.eval()
        try:
            images = images.to(weight.device, weight.dtype)
            return embed_views(self, images, self.view, self.size).float()
        finally:
            self.train(training)


def _layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1, inplace=True),
    ]
