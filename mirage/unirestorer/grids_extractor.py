"""GRIDS' descriptor as an extractor: means and spreads of the features of an SRResNet (arXiv 2407.12273)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage.grids.descriptor import DEFAULT_WEIGHTS, SRResNetDescriptor
from mirage.unirestorer.extractors import View, check_view, embed_views, fingerprint_of

__all__ = ["GridsExtractor"]


class GridsExtractor:
    """Of each of the descriptor's channels the mean and the logarithm of the standard deviation.

    The descriptor has a feature for each channel and pixel, 1,048,576 for a 32x32 image of 64 channels. GRIDS compares
    the distributions of many images; for one image, their first two moments by channel are taken.

    Args:
        descriptor: `mirage.grids.SRResNetDescriptor`.
        view, size: see `mirage.unirestorer.views`; 32 is GRIDS' patch. Smaller images are not enlarged.

    Raises:
        ValueError: the view is none, or ``size`` below 1.
    """

    def __init__(self, descriptor: SRResNetDescriptor, *, view: View = "crops", size: int = 32) -> None:
        check_view(view)
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.descriptor = descriptor
        self.view, self.size = view, size
        self.channels = int(descriptor.network.conv_hr.weight.shape[0])

    @classmethod
    def from_weights(
        cls, weights: str | Path = DEFAULT_WEIGHTS, *, device: str | torch.device = "cpu", view: View = "crops",
        size: int = 32,
    ) -> GridsExtractor:  # fmt: skip
        """The extractor of a file with weights, or of packaged ones; see `SRResNetDescriptor.from_weights`."""
        return cls(SRResNetDescriptor.from_weights(weights, device=device), view=view, size=size)

    @classmethod
    def from_arguments(cls, network: Mapping[str, Any], view: View, size: int) -> GridsExtractor:
        """An extractor as `arguments` describes it, its network new.

        Args:
            network: arguments of ``mirage.networks.create("srresnet")``.
            view, size: see the class.
        """
        from mirage.networks import create

        return cls(SRResNetDescriptor(create("srresnet", **network)), view=view, size=size)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `from_arguments`.

        Raises:
            ValueError: the network is none of `mirage.networks`, so that its arguments are not known.
        """
        config = getattr(self.descriptor.network, "config", None)
        if not isinstance(config, Mapping):
            raise ValueError(f"descriptor: expected an SRResNet of mirage.networks, got {self.descriptor.network}")
        return {"network": dict(config), "view": self.view, "size": self.size}

    def state_dict(self) -> dict[str, Tensor]:
        """Of the descriptor's network."""
        return self.descriptor.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Into the descriptor's network."""
        self.descriptor.network.load_state_dict(state)

    def eval(self) -> GridsExtractor:
        """Does nothing: the descriptor is always in evaluation mode."""
        return self

    def to(self, device: str | torch.device) -> GridsExtractor:
        """Move the descriptor's network."""
        self.descriptor.network.to(device)
        return self

    @property
    def dim(self) -> int:
        """Length of an embedding: twice the descriptor's channels."""
        return 2 * self.channels

    @property
    def fingerprint(self) -> str:
        """See `Extractor`."""
        options = {"view": self.view, "size": self.size, "descriptor": self.descriptor.fingerprint}
        return fingerprint_of("grids", options, {})

    def embed(self, images: Tensor) -> Tensor:
        """See `Extractor`.

        Raises:
            ValueError: the images are no ``[B, 3, H, W]``.
        """
        return embed_views(self._describe, images, self.view, self.size, batch=16)

    def _describe(self, crops: Tensor) -> Tensor:
        features = self.descriptor.features(crops).unflatten(1, (self.channels, -1)).float()
        variance, mean = torch.var_mean(features, 2, correction=0)
        return torch.cat([mean, 0.5 * torch.log(variance + 1e-8)], 1)
