"""Restormer: Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022.

An encoder-decoder of four levels like MIRAGE's, which descends from it. Its blocks are channel attention (MDTA) and a
gated depthwise feed-forward network (GDFN); both are here, for the networks that are built of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage.blocks import NORM_EPS, Downsample, LayerNorm, PatchEmbed, Upsample, check_divisible, l2_normalize
from mirage.networks.common import RestorationNetwork, check_count, check_counts

__all__ = ["NORMS", "BiasFreeLayerNorm", "ChannelAttention", "GatedFeedForward", "Restormer", "RestormerBlock"]

LEVELS = 4
STRIDE = 8  # three halvings
NORMS = ("WithBias", "BiasFree")
PUBLISHED = {"inp_channels": "in_channels", "LayerNorm_type": "norm"}


BYTES_PER_CHANNEL = 210  # 193 measured at 384x384, 258 at 192x192 (dim 48)


class _BiasFreeBody(nn.Module):
    """The weight of the bias-free norm, and the norm of ``[B, N, C]`` over its last dimension."""

    eps = NORM_EPS

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps) * self.weight


class BiasFreeLayerNorm(nn.Module):
    """``x / sqrt(var(x) + 1e-5) * weight`` over the channels of each pixel; x itself is not centred.

    Args:
        dim: number of channels C of ``[B, C, H, W]``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = _BiasFreeBody(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class GatedFeedForward(nn.Module):
    """GDFN: ``project_out(gelu(d1) * d2)`` with ``d = dwconv3x3(project_in(x))`` of ``2 * int(dim * expansion)``
    channels, d1 and d2 being its halves. MIRAGE's has a GELU before the depthwise convolution, too.

    Args:
        dim: number of channels.
        expansion: ratio of the gated channels to ``dim``.
        bias: of the three convolutions.
    """

    def __init__(self, dim: int, expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        if hidden <= 0:
            raise ValueError(f"dim * ffn_expansion_factor must be at least 1, got {dim} * {expansion}")
        self.project_in = nn.Conv2d(dim, hidden * 2, 1, bias=bias)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=bias)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(first) * second)


class ChannelAttention(nn.Module):
    """MDTA: per head ``softmax(q k^T * temperature) v`` over channels, q and k L2-normalised along the pixels; q, k and
    v are depthwise 3x3 convolutions of 1x1 ones.

    Args:
        dim: number of channels, a multiple of ``num_heads``.
        num_heads: heads.
        bias: of the three convolutions.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        check_divisible("channels of a block", dim, num_heads, f"it has {num_heads} heads")
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        heads = (batch, self.num_heads, channels // self.num_heads, height * width)
        q, k, v = (part.reshape(heads) for part in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1))
        scores = (l2_normalize(q) @ l2_normalize(k).transpose(-2, -1)) * self.temperature
        return self.project_out((scores.softmax(dim=-1) @ v).reshape(x.shape))


class RestormerBlock(nn.Module):
    """``x + attn(norm1(x))`` and then ``x + ffn(norm2(x))``; ``[B, dim, H, W]`` to the same.

    Args:
        dim: number of channels, a multiple of ``num_heads``.
        num_heads: heads of the channel attention.
        expansion: of the feed-forward network.
        bias: of its convolutions.
        norm: one of `NORMS`.
    """

    def __init__(self, dim: int, num_heads: int, expansion: float, bias: bool, norm: str) -> None:
        super().__init__()
        norm_class = BiasFreeLayerNorm if norm == "BiasFree" else LayerNorm
        self.norm1 = norm_class(dim)
        self.attn = ChannelAttention(dim, num_heads, bias)
        self.norm2 = norm_class(dim)
        self.ffn = GatedFeedForward(dim, expansion, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def check_levels(
    dim: int, num_blocks: Sequence[int], num_refinement_blocks: int, heads: Sequence[int], norm: str
) -> None:
    """Raise ValueError where these are not the sizes of an encoder-decoder of four levels."""
    check_count("dim", dim)
    check_divisible("dim", dim, 2, "it is halved by the first downsampling")
    check_counts("num_blocks", num_blocks, LEVELS, 0)
    check_count("num_refinement_blocks", num_refinement_blocks, 0)
    check_counts("heads", heads, LEVELS)
    for i, num_heads in enumerate(heads):
        check_divisible(f"dim * {2**i}", dim * 2**i, num_heads, f"heads[{i}] = {num_heads}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


class Restormer(RestorationNetwork):
    """Restormer, by the published names; with the defaults the published network of 26,126,644 parameters.

    Args:
        in_channels: channels of the image: 3, 1 for grey ones, 6 for pairs of a dual-pixel sensor.
        out_channels: channels of the restored image; None for those of the image, or half of them with
            ``dual_pixel_task``. The network adds the image to its output, so without ``dual_pixel_task`` no other
            number than ``in_channels`` is possible.
        dim: channels at full resolution, even; the levels have ``dim``, ``2 dim``, ``4 dim`` and ``8 dim``.
        num_blocks: blocks of the three encoder levels and of the latent level; the decoder mirrors the encoder.
        num_refinement_blocks: blocks after the decoder, on ``2 dim`` channels.
        heads: attention heads per level; ``heads[i]`` divides ``dim * 2**i``.
        ffn_expansion_factor: expansion of the feed-forward networks; int(2.66 C) channels by default.
        bias: of the convolutions in the blocks, of the 1x1 ones between levels, and of the last one.
        norm: ``"WithBias"``, or ``"BiasFree"`` as of the published Gaussian denoisers (26,111,668 parameters).
        dual_pixel_task: as published for defocus deblurring: a projection of the first features is added to the last,
            and the image is not.

    Raises:
        ValueError: an argument breaks one of the conditions above; the message names it.
    """

    aliases = PUBLISHED

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
        dual_pixel_task: bool = False,
    ) -> None:
        check_count("in_channels", in_channels)
        if out_channels is None:
            out_channels = max(1, in_channels // 2) if dual_pixel_task else in_channels
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
            dual_pixel_task=dual_pixel_task,
        )
        check_count("out_channels", out_channels)
        if out_channels != in_channels and not dual_pixel_task:
            raise ValueError(
                f"out_channels must equal in_channels ({in_channels}), since the image is added to the output, "
                f"got {out_channels}"
            )
        check_levels(dim, num_blocks, num_refinement_blocks, heads, norm)

        def level(channels: int, num_heads: int, count: int) -> nn.Sequential:
            blocks = (RestormerBlock(channels, num_heads, ffn_expansion_factor, bias, norm) for _ in range(count))
            return nn.Sequential(*blocks)

        self.patch_embed = PatchEmbed(in_channels, dim)
        self.encoder_level1 = level(dim, heads[0], num_blocks[0])
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.down2_3 = Downsample(dim * 2)
        self.encoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.down3_4 = Downsample(dim * 4)
        self.latent = level(dim * 8, heads[3], num_blocks[3])
        self.up4_3 = Upsample(dim * 8)
        self.reduce_chan_level3 = nn.Conv2d(dim * 8, dim * 4, 1, bias=bias)
        self.decoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.up3_2 = Upsample(dim * 4)
        self.reduce_chan_level2 = nn.Conv2d(dim * 4, dim * 2, 1, bias=bias)
        self.decoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.up2_1 = Upsample(dim * 2)
        self.decoder_level1 = level(dim * 2, heads[0], num_blocks[0])
        self.refinement = level(dim * 2, heads[0], num_refinement_blocks)
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(dim, dim * 2, 1, bias=bias)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=bias)

    @property
    def multiple(self) -> int:
        return STRIDE

    @property
    def bytes_per_pixel(self) -> int:
        return BYTES_PER_CHANNEL * int(self.config["dim"])

    def restore(self, x: Tensor) -> Tensor:
        shallow = self.patch_embed(x)
        enc1 = self.encoder_level1(shallow)
        enc2 = self.encoder_level2(self.down1_2(enc1))
        enc3 = self.encoder_level3(self.down2_3(enc2))
        latent = self.latent(self.down3_4(enc3))
        dec3 = self.decoder_level3(self.reduce_chan_level3(torch.cat((self.up4_3(latent), enc3), dim=1)))
        dec2 = self.decoder_level2(self.reduce_chan_level2(torch.cat((self.up3_2(dec3), enc2), dim=1)))
        dec1 = self.refinement(self.decoder_level1(torch.cat((self.up2_1(dec2), enc1), dim=1)))
        if self.config["dual_pixel_task"]:
            return self.output(dec1 + self.skip_conv(shallow))
        return self.output(dec1) + x
