"""The descriptor of GRIDS: deep features of an SRResNet that was trained for super-resolution, and nothing else.

The features of such networks tell degradations apart rather than contents (arXiv 2108.00406). Taken is the last feature
map at the size of the output, which feeds the last convolution: of a 32x32 image 64 channels of 128x128, 1,048,576
features. Any file with the names of the public "MSRResNet" will do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DEFAULT_WEIGHTS", "SRResNetDescriptor"]

DEFAULT_WEIGHTS = "descriptor-srresnet"
"""Name of the packaged weights."""

SLOPE = 0.1  # of the leaky ReLUs
PARTS = ("conv_first", "body", "conv_hr")


class SRResNetDescriptor:
    """Features ``conv_hr``, behind its LeakyReLU, of an SRResNet with the names of MSRResNet.

    Args:
        network: with ``conv_first``, ``body``, ``conv_hr`` and any number of ``upconv1``, ``upconv2``, ... between, as
            ``mirage.networks.create("srresnet")`` is. Used as it is, in evaluation mode.
        activation: whether features are taken behind the activation of ``conv_hr``, or before it.
        batch: images that go through the network at once.

    Raises:
        ValueError: the network lacks one of these parts.
    """

    def __init__(self, network: nn.Module, *, activation: bool = True, batch: int = 16) -> None:
        missing = [name for name in PARTS if not isinstance(getattr(network, name, None), nn.Module)]
        if missing:
            raise ValueError(
                f"network: expected an SRResNet with {', '.join(PARTS)}; {type(network).__name__} has no "
                f"{', '.join(missing)}"
            )
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self.network: Any = network.eval()
        self.activation = activation
        self.batch = batch
        self.upconvs = [getattr(network, f"upconv{n}") for n in (1, 2, 3, 4) if hasattr(network, f"upconv{n}")]
        self.factors = [_factor(conv, name) for name, conv in enumerate(self.upconvs, 1)]

    @classmethod
    def from_weights(
        cls, weights: str | Path = DEFAULT_WEIGHTS, *, device: str | torch.device = "cpu", key: str | None = None,
        activation: bool = True,
    ) -> SRResNetDescriptor:  # fmt: skip
        """The descriptor of a file with weights, or of packaged ones by their name; nothing is downloaded.

        Args:
            weights: a checkpoint (``.safetensors``, ``.pth``, ...) with the names of MSRResNet, or a packaged name.
            device: where it runs.
            key: which network of the file, where it holds several.
            activation: see the class.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, or holds no SRResNet.
            ValueError: the file holds another network.
        """
        from mirage.networks import load
        from mirage.restore.loading import resolve_weights

        return cls(load(resolve_weights(weights), key=key).to(device), activation=activation)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what decides the features: weights and options."""
        digest = hashlib.sha256(f"srresnet activation={self.activation}".encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of images ``[N, 3, H, W]`` in [0, 1]: ``[N, D]`` with D = 64 x 4H x 4W, where the network's.

        Raises:
            ValueError: the images have another shape.
        """
        bodies = self._bodies(images)
        return torch.cat([self._rows(part, 0, self._height(part)).flatten(1) for part in bodies.split(self.batch)])

    @torch.no_grad()
    def feature_blocks(self, images: Tensor, memory: int) -> Iterator[Tensor]:
        """The features of all images by rows of the feature map, as many as fit in ``memory`` bytes, at least one.

        What comes before the upsampling is computed once and kept, a sixteenth of the features; what comes behind it is
        local, so that blocks share only the few rows around their borders, which are computed twice.
        """
        bodies = self._bodies(images)
        height = self._height(bodies)
        channels = self.network.conv_hr.weight.shape[0]
        width = bodies.shape[3] * (height // bodies.shape[2])
        rows = min(height, max(1, memory // max(1, len(bodies) * channels * width * bodies.element_size())))
        block = bodies.new_empty(len(bodies), channels, rows, width)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            here = block if bottom - top == rows else bodies.new_empty(len(bodies), channels, bottom - top, width)
            for part, place in zip(bodies.split(self.batch), here.split(self.batch), strict=True):
                place.copy_(self._rows(part, top, bottom))
            yield here.flatten(1)

    def _bodies(self, images: Tensor) -> Tensor:
        """Feature maps at the images' size, before any upsampling."""
        weight = self.network.conv_first.weight
        if images.ndim != 4 or images.shape[1] != weight.shape[1]:
            raise ValueError(f"images: expected [N, {weight.shape[1]}, H, W], got {list(images.shape)}")
        found = []
        for part in images.split(self.batch):
            x = F.leaky_relu(self.network.conv_first(part.to(weight.device, weight.dtype)), SLOPE)
            found.append(self.network.body(x))
        return torch.cat(found)

    def _height(self, bodies: Tensor) -> int:
        height = bodies.shape[2]
        for factor in self.factors:
            height *= factor
        return height

    def _rows(self, bodies: Tensor, top: int, bottom: int) -> Tensor:
        """Rows ``top`` to ``bottom`` of the features, from whole maps of the body.

        Backwards from the last convolution it is found which rows of every map are needed, a halo of one above and
        below each; forwards they are computed, with zeros in the place of rows outside the map.
        """
        heights = [bodies.shape[2]]
        for factor in self.factors:
            heights.append(heights[-1] * factor)
        outputs = [(top, bottom)]  # rows that each convolution gives, the last one first
        for factor, height in zip(reversed(self.factors), reversed(heights), strict=False):
            low, high = max(0, outputs[0][0] - 1), min(height, outputs[0][1] + 1)
            outputs.insert(0, (low // factor, -(-high // factor)))
        x, first = bodies, 0  # rows from `first` on
        for conv, factor, (low, high), height in zip(self.upconvs, self.factors, outputs, heights, strict=False):
            x = F.leaky_relu(F.pixel_shuffle(_conv_rows(conv, x, first, low, high, height), factor), SLOPE)
            first = low * factor
        x = _conv_rows(self.network.conv_hr, x, first, top, bottom, heights[-1])
        return F.leaky_relu(x, SLOPE) if self.activation else x


def _factor(conv: Any, number: int) -> int:
    """By how much the pixel shuffle behind a convolution enlarges."""
    weight = conv.weight
    factor = round((weight.shape[0] / weight.shape[1]) ** 0.5)
    if factor**2 * weight.shape[1] != weight.shape[0]:
        raise ValueError(f"network.upconv{number}: expected k^2 times its channels, got {list(weight.shape)}")
    return factor


def _conv_rows(conv: Any, x: Tensor, first: int, low: int, high: int, height: int) -> Tensor:
    """Rows ``low`` to ``high`` of a 3x3 convolution padded by a zero; ``x`` holds the map's rows from ``first`` on."""
    above, below = max(0, 1 - low), max(0, high + 1 - height)
    x = x[:, :, max(0, low - 1) - first : min(height, high + 1) - first]
    x = F.pad(x, (0, 0, above, below)) if above or below else x
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))
