"""SRResNet without batch norms (the published "MSRResNet"): super-resolution, restoration, and a descriptor.

Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network", CVPR 2017; in the
form of Wang et al., "ESRGAN", ECCVW 2018: no batch norm, LeakyReLU 0.1, and the enlarged image added to the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage.networks.common import RestorationNetwork, check_count

__all__ = ["SRResNet"]

SLOPE = 0.1
UPSCALES = (1, 2, 3, 4)
INITIAL_SCALE = 0.1


BYTES_PER_CHANNEL = 19  # of the output; 17 measured at 384x384, 23 at 192x192 (dim 64)


class ResidualBlock(nn.Module):
    """``x + conv2(relu(conv1(x)))``, 3x3 convolutions with bias; ``[B, dim, H, W]`` to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class SRResNet(RestorationNetwork):
    """SRResNet without batch norms, by the published names (conv_first, body, upconv1, upconv2, conv_hr, conv_last).

    With the defaults it is the published network for x4, of 1,517,571 parameters. With ``upscale=1`` the upsampling is
    left out, and the output has the image's size: the restorer of GRIDS (ECCV 2024), of 1,222,147 parameters.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output; None for those of the image.
        dim: channels of the features.
        num_blocks: residual blocks.
        upscale: 1, 2, 3 or 4.
        global_residual: add the image, enlarged bilinearly, to the output. The networks of SRGA are without it. It has
            no weights, so a file does not tell.

    Raises:
        ValueError: an argument is none of these; or with ``global_residual`` ``out_channels`` is not ``in_channels``.
    """

    aliases = {"num_in_ch": "in_channels", "num_out_ch": "out_channels", "num_feat": "dim", "num_block": "num_blocks"}

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        dim: int = 64,
        num_blocks: int = 16,
        upscale: int = 4,
        global_residual: bool = True,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            dim=dim,
            num_blocks=num_blocks,
            upscale=upscale,
            global_residual=global_residual,
        )
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        check_count("dim", dim)
        check_count("num_blocks", num_blocks, 0)
        if upscale not in UPSCALES:
            raise ValueError(f"upscale must be one of 1, 2, 3, 4, got {upscale!r}")
        if global_residual and out_channels != in_channels:
            raise ValueError(
                f"out_channels must equal in_channels ({in_channels}), since the image is added to the output, got "
                f"{out_channels}; global_residual=False does not add it"
            )
        self.conv_first = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(dim) for _ in range(num_blocks)))
        if upscale > 1:
            self.upconv1 = nn.Conv2d(dim, dim * self.shuffle**2, 3, padding=1)
        if upscale == 4:
            self.upconv2 = nn.Conv2d(dim, dim * 4, 3, padding=1)
        self.conv_hr = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_last = nn.Conv2d(dim, out_channels, 3, padding=1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He's normal weights times 0.1, biases 0, as the published network starts."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight)
                module.weight.mul_(INITIAL_SCALE)
                nn.init.zeros_(module.bias)

    @property
    def scale(self) -> int:
        return int(self.config["upscale"])

    @property
    def shuffle(self) -> int:
        """The factor of one pixel shuffle."""
        return 3 if self.scale == 3 else 2

    @property
    def bytes_per_pixel(self) -> int:
        return BYTES_PER_CHANNEL * int(self.config["dim"]) * self.scale**2

    def restore(self, x: Tensor) -> Tensor:
        restored = self.conv_last(self.feature_maps(x))
        if not self.config["global_residual"]:
            return restored
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return restored + x

    def feature_maps(self, x: Tensor, activated: bool = True) -> Tensor:
        """What the last convolution gets: ``conv_hr`` of the features at the size of the output, after its LeakyReLU.

        Args:
            x: ``[B, in_channels, H, W]``, floating point.
            activated: False for what the LeakyReLU gets.

        Returns:
            ``[B, dim, upscale * H, upscale * W]``.
        """
        self.check_input(x)
        x = self.body(F.leaky_relu(self.conv_first(x), SLOPE))
        for name in ("upconv1", "upconv2"):
            if hasattr(self, name):
                x = F.leaky_relu(F.pixel_shuffle(getattr(self, name)(x), self.shuffle), SLOPE)
        x = self.conv_hr(x)
        return F.leaky_relu(x, SLOPE) if activated else x

    def features(self, batch: Tensor, activated: bool = True) -> Tensor:
        """The degradation descriptor of GRIDS and SRGA: `feature_maps`, one row per image.

        Args:
            batch: ``[N, in_channels, H, W]``, floating point.
            activated: False for the features before the LeakyReLU.

        Returns:
            ``[N, D]`` with D = ``dim * upscale**2 * H * W`` (1,048,576 for 32x32 at x4), with gradients unless they are
            switched off.
        """
        return self.feature_maps(batch, activated).flatten(1)
