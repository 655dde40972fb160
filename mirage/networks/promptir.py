"""PromptIR: Potlapalli et al., "PromptIR: Prompting for All-in-One Blind Image Restoration", NeurIPS 2023.

Restormer whose decoder gets, at each of three levels, a learned picture (the prompt), mixed for the image at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage.blocks import Downsample, PatchEmbed, Upsample, check_divisible
from mirage.networks.common import RestorationNetwork, check_count
from mirage.networks.restormer import PUBLISHED, STRIDE, RestormerBlock, check_levels

__all__ = ["PromptGenerator", "PromptIR"]

PROMPTS = ((64, 64), (128, 32), (320, 16))  # channels and side, from the finest level on
PROMPT_LENGTH = 5
UNUSED_REDUCED = 256  # channels that the unused `chnl_reduce3` gives


BYTES_PER_CHANNEL = 210  # as Restormer: 259 measured at 192x192, where that takes 258 (dim 48)


class PromptGenerator(nn.Module):
    """A prompt for features: `length` learned pictures, weighted by a softmax of the features' means, brought to their
    size and convolved.

    Args:
        channels: of the prompt.
        size: side of the learned pictures in pixels.
        dim: channels of the features.
        length: number of pictures.
    """

    def __init__(self, channels: int, size: int, dim: int, length: int = PROMPT_LENGTH) -> None:
        super().__init__()
        self.prompt_param = nn.Parameter(torch.rand(1, length, channels, size, size))
        self.linear_layer = nn.Linear(dim, length)
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, channels, H, W]``."""
        weights = self.linear_layer(x.mean(dim=(-2, -1))).softmax(dim=1)
        prompt = torch.einsum("bl,lchw->bchw", weights, self.prompt_param[0])
        return self.conv3x3(F.interpolate(prompt, x.shape[-2:], mode="bilinear", align_corners=False))


class PromptIR(RestorationNetwork):
    """PromptIR with its prompts, by the published names; with the defaults the published network.

    The published code gives some widths as numbers that fit ``dim=48`` alone; here they follow ``dim``. It also has six
    convolutions that nothing uses, and which the published weights contain (``chnl_reduce*``,
    ``reduce_noise_channel_*``): they are there, without gradients. Without prompts (``decoder=False``) it cannot run.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the restored image; the network adds the image to its output, so only ``in_channels``
            (the default) is possible.
        dim: channels at full resolution, even. ``heads[2]`` divides ``2 dim + 64``, ``4 dim + 128`` and ``8 dim + 320``
            besides ``4 dim``.
        num_blocks, num_refinement_blocks, heads, ffn_expansion_factor, bias, norm: as of `Restormer`.
        decoder: whether there are prompts; only True is possible.

    Raises:
        ValueError: an argument breaks one of the conditions above; the message names it.
    """

    aliases = PUBLISHED
    unused = ("chnl_reduce", "reduce_noise_channel_")

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        bias: bool = False,
        norm: str = "WithBias",
        decoder: bool = True,
    ) -> None:
        check_count("in_channels", in_channels)
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            dim=dim,
            num_blocks=num_blocks,
            num_refinement_blocks=num_refinement_blocks,
            heads=heads,
            ffn_expansion_factor=ffn_expansion_factor,
            bias=bias,
            norm=norm,
            decoder=decoder,
        )
        if out_channels != in_channels:
            raise ValueError(
                f"out_channels must equal in_channels ({in_channels}), since the image is added to the output, "
                f"got {out_channels}"
            )
        if not decoder:
            raise ValueError("decoder must be True: without prompts the published network has no sizes that fit")
        check_levels(dim, num_blocks, num_refinement_blocks, heads, norm)
        prompted = [2 * dim + PROMPTS[0][0], 4 * dim + PROMPTS[1][0], 8 * dim + PROMPTS[2][0]]
        for channels in prompted:
            check_divisible("features and prompt together", channels, heads[2], f"heads[2] = {heads[2]}")

        def block(channels: int, num_heads: int) -> RestormerBlock:
            return RestormerBlock(channels, num_heads, ffn_expansion_factor, bias, norm)

        def level(channels: int, num_heads: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(block(channels, num_heads) for _ in range(count)))

        def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=bias)

        self.patch_embed = PatchEmbed(in_channels, dim)
        for i, (channels, size) in enumerate(PROMPTS, 1):
            setattr(self, f"prompt{i}", PromptGenerator(channels, size, dim * 2**i))
        (first, _), (second, _), (third, _) = PROMPTS
        self.chnl_reduce1 = pointwise(first, first)
        self.chnl_reduce2 = pointwise(second, second)
        self.chnl_reduce3 = pointwise(third, UNUSED_REDUCED)
        self.reduce_noise_channel_1 = pointwise(dim + first, dim)
        self.encoder_level1 = level(dim, heads[0], num_blocks[0])
        self.down1_2 = Downsample(dim)
        self.reduce_noise_channel_2 = pointwise(dim * 2 + second, dim * 2)
        self.encoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.down2_3 = Downsample(dim * 2)
        self.reduce_noise_channel_3 = pointwise(dim * 4 + UNUSED_REDUCED, dim * 4)
        self.encoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.down3_4 = Downsample(dim * 4)
        self.latent = level(dim * 8, heads[3], num_blocks[3])
        # What follows a prompt is narrowed to what the next upsampling takes: half of its features.
        self.noise_level3 = block(prompted[2], heads[2])
        self.reduce_noise_level3 = pointwise(prompted[2], dim * 4)
        self.up4_3 = Upsample(dim * 4)
        self.reduce_chan_level3 = pointwise(dim * 6, dim * 4)
        self.decoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.noise_level2 = block(prompted[1], heads[2])
        self.reduce_noise_level2 = pointwise(prompted[1], dim * 4)
        self.up3_2 = Upsample(dim * 4)
        self.reduce_chan_level2 = pointwise(dim * 4, dim * 2)
        self.decoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.noise_level1 = block(prompted[0], heads[2])
        self.reduce_noise_level1 = pointwise(prompted[0], dim * 2)
        self.up2_1 = Upsample(dim * 2)
        self.decoder_level1 = level(dim * 2, heads[0], num_blocks[0])
        self.refinement = level(dim * 2, heads[0], num_refinement_blocks)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=bias)

    @property
    def multiple(self) -> int:
        return STRIDE

    @property
    def bytes_per_pixel(self) -> int:
        return BYTES_PER_CHANNEL * int(self.config["dim"])

    def restore(self, x: Tensor) -> Tensor:
        enc1 = self.encoder_level1(self.patch_embed(x))
        enc2 = self.encoder_level2(self.down1_2(enc1))
        enc3 = self.encoder_level3(self.down2_3(enc2))
        latent = self.prompted(self.latent(self.down3_4(enc3)), 3)
        dec3 = self.decoder_level3(self.reduce_chan_level3(torch.cat((self.up4_3(latent), enc3), dim=1)))
        dec3 = self.prompted(dec3, 2)
        dec2 = self.decoder_level2(self.reduce_chan_level2(torch.cat((self.up3_2(dec3), enc2), dim=1)))
        dec2 = self.prompted(dec2, 1)
        dec1 = self.decoder_level1(torch.cat((self.up2_1(dec2), enc1), dim=1))
        return self.output(self.refinement(dec1)) + x

    def prompted(self, x: Tensor, level: int) -> Tensor:
        """Features ``[B, dim * 2**level, h, w]`` after their interaction with the prompt of that level."""
        prompt, block, reduce = (
            self.get_submodule(name) for name in (f"prompt{level}", f"noise_level{level}", f"reduce_noise_level{level}")
        )
        return reduce(block(torch.cat((x, prompt(x)), dim=1)))
