"""What the networks have in common: their arguments, what they take and refuse, sizes that need padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RestorationNetwork", "check_count", "check_counts", "pad_to_multiple"]


def pad_to_multiple(x: Tensor, multiple: int, mode: str = "reflect") -> Tensor:
    """Pad ``[B, C, H, W]`` on the right and at the bottom until H and W are multiples of ``multiple``.

    Args:
        mode: ``"reflect"``, along a side not longer than its padding by repeating the edge, as `mirage.restore` does;
            or ``"zeros"``.
    """
    for axis, pad_of in ((3, lambda n: (0, n, 0, 0)), (2, lambda n: (0, 0, 0, n))):
        size = x.shape[axis]
        pad = -size % multiple
        if pad and mode == "zeros":
            x = F.pad(x, pad_of(pad))
        elif pad:
            x = F.pad(x, pad_of(pad), mode="reflect" if pad < size else "replicate")
    return x


class RestorationNetwork(nn.Module):
    """An image-to-image network as `mirage.networks.create` builds it.

    ``forward`` takes images of any size: it pads them to the multiple that the network needs, calls ``restore`` and
    crops.

    Attributes:
        config: the constructor's arguments; ``type(network)(**network.config)`` is the same network.
        multiple: what the sides of the image are padded to multiples of.
        scale: how many times as wide and high the output is as the image.
        aliases: the names of arguments in the published configurations, and ours for them.
        unused: how the names begin of weights that are published and that nothing uses.
    """

    aliases: ClassVar[dict[str, str]] = {}
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config: dict[str, Any] = {k: list(v) if isinstance(v, tuple | list) else v for k, v in config.items()}

    @property
    def multiple(self) -> int:
        return 1

    @property
    def scale(self) -> int:
        return 1

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes that one pass in float32 without gradients takes for a pixel of a large image, weights apart: what was
        measured by the rise of resident memory (VmHWM), and up to a tenth more."""
        raise NotImplementedError

    @property
    def padding(self) -> str:
        return "reflect"

    def forward(self, x: Tensor) -> Tensor:
        """Restore a batch of images.

        Args:
            x: ``[B, in_channels, H, W]``, floating point, B, H and W at least 1.

        Returns:
            ``[B, out_channels, scale * H, scale * W]``, of the dtype of ``x``.

        Raises:
            ValueError: a wrong number of dimensions or channels, no pixels, or an integer dtype.
        """
        self.check_input(x)
        height, width = (side * self.scale for side in x.shape[-2:])
        return self.restore(pad_to_multiple(x, self.multiple, self.padding))[..., :height, :width]

    def restore(self, x: Tensor) -> Tensor:
        """``forward`` of images whose sides are multiples of ``multiple``."""
        raise NotImplementedError

    def check_input(self, x: Tensor) -> None:
        channels = self.config["in_channels"]
        if x.ndim != 4 or x.shape[1] != channels or x.shape[0] == 0:
            raise ValueError(f"x must have the shape [B, {channels}, H, W] with B at least 1, got {tuple(x.shape)}")
        height, width = x.shape[-2:]
        if height == 0 or width == 0:
            raise ValueError(f"the height and width of x must be positive, got {height}x{width}")
        if not x.is_floating_point():
            raise ValueError(f"x must be of a floating-point dtype, got {x.dtype}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_counts(name: str, values: Sequence[int], length: int | None, least: int = 1) -> None:
    """Raise ValueError unless ``values`` are as many integers of at least ``least`` (any number for None)."""
    fits = isinstance(values, Sequence) and not isinstance(values, str) and length in (None, len(values))
    if not fits or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in values):
        many = "a sequence of" if length is None else str(length)
        raise ValueError(f"{name} must be {many} integers of at least {least}, got {values!r}")
