"""NAFNet: Chen et al., "Simple Baselines for Image Restoration", ECCV 2022: convolutions without activations.

The network as it was trained. (Its authors evaluate with channel averages over windows of the training size, TLC; that
changes no weights and is not here.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mirage.blocks import check_divisible
from mirage.networks.common import RestorationNetwork, check_count, check_counts

__all__ = ["LayerNorm2d", "NAFBlock", "NAFNet", "SimpleGate"]

NORM_EPS = 1e-6
PADDINGS = ("reflect", "zeros")


BYTES_PER_CHANNEL = 60  # 51 measured at 512x512, 82 at 256x256 (width 32)


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of each pixel of ``[B, dim, H, W]``: biased variance, eps 1e-6."""

    eps = NORM_EPS

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        weight, bias = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias))
        return centred / torch.sqrt(variance + self.eps) * weight + bias

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class SimpleGate(nn.Module):
    """The product of the two halves of the channels: ``[B, 2 C, H, W]`` to ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return first * second


class NAFBlock(nn.Module):
    """``y = x + beta * conv3(a * sca(a))`` with ``a = gate(conv2(conv1(norm1(x))))``, then
    ``y + gamma * conv5(gate(conv4(norm2(y))))``.

    ``conv2`` is a depthwise 3x3 convolution, the others are 1x1; ``sca`` is a 1x1 convolution of the channels' means.
    beta and gamma start at 0, so that a new block is the identity. (Published blocks can drop parts of either branch
    while they train; of the published networks none does, and here both dropouts are identities.)

    Args:
        dim: number of channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim * 2, 1)
        self.conv2 = nn.Conv2d(dim * 2, dim * 2, 3, padding=1, groups=dim * 2)
        self.conv3 = nn.Conv2d(dim, dim, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1))
        self.sg = SimpleGate()
        self.conv4 = nn.Conv2d(dim, dim * 2, 1)
        self.conv5 = nn.Conv2d(dim, dim, 1)
        self.norm1 = LayerNorm2d(dim)
        self.norm2 = LayerNorm2d(dim)
        self.dropout1 = nn.Identity()
        self.dropout2 = nn.Identity()
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def mix(self, normal: Tensor) -> Tensor:
        """The branch of the first half."""
        gated = self.sg(self.conv2(self.conv1(normal)))
        return self.dropout1(self.conv3(gated * self.sca(gated))) * self.beta

    def feed_forward(self, normal: Tensor) -> Tensor:
        """The branch of the second half."""
        return self.dropout2(self.conv5(self.sg(self.conv4(normal)))) * self.gamma

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class NAFNet(RestorationNetwork):
    """NAFNet, by the published names; with the defaults the network of the published denoiser of width 32 (SIDD).

    Args:
        in_channels: channels of the image and of the restored one, since the image is added to the output.
        width: channels at full resolution; each level of the encoder doubles them. Published: 32 and 64.
        encoder_blocks: blocks of each level of the encoder. Published: (2, 2, 4, 8) for denoising,
            (1, 1, 1, 28) for deblurring.
        middle_blocks: blocks between encoder and decoder. Published: 12, and 1 for deblurring.
        decoder_blocks: blocks of each level of the decoder, as many levels. Published: (2, 2, 2, 2), (1, 1, 1, 1).
        padding: of images whose sides are not multiples of 2 to the number of levels: ``"reflect"``, or ``"zeros"`` as
            in the published code. It has no weights, so a file does not tell.

    Raises:
        ValueError: an argument is none of these; the message names it.
    """

    aliases = {
        "img_channel": "in_channels",
        "enc_blk_nums": "encoder_blocks",
        "middle_blk_num": "middle_blocks",
        "dec_blk_nums": "decoder_blocks",
    }

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 32,
        encoder_blocks: Sequence[int] = (2, 2, 4, 8),
        middle_blocks: int = 12,
        decoder_blocks: Sequence[int] = (2, 2, 2, 2),
        padding: str = "reflect",
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            width=width,
            encoder_blocks=encoder_blocks,
            middle_blocks=middle_blocks,
            decoder_blocks=decoder_blocks,
            padding=padding,
        )
        check_count("in_channels", in_channels)
        check_count("width", width)
        check_counts("encoder_blocks", encoder_blocks, None, 0)
        check_count("middle_blocks", middle_blocks, 0)
        check_counts("decoder_blocks", decoder_blocks, len(encoder_blocks), 0)
        if decoder_blocks:
            check_divisible("width", width, 2, "the pixel shuffles leave halves of its multiples")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")

        def level(channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(NAFBlock(channels) for _ in range(count)))

        self.intro = nn.Conv2d(in_channels, width, 3, padding=1)
        self.ending = nn.Conv2d(width, in_channels, 3, padding=1)
        widths = [width * 2**i for i in range(len(encoder_blocks) + 1)]
        self.encoders = nn.ModuleList(level(c, count) for c, count in zip(widths, encoder_blocks, strict=False))
        self.decoders = nn.ModuleList(level(c, count) for c, count in zip(widths[-2::-1], decoder_blocks, strict=True))
        self.middle_blks = level(widths[-1], middle_blocks)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c * 2, 1, bias=False), nn.PixelShuffle(2)) for c in widths[:0:-1]
        )
        self.downs = nn.ModuleList(nn.Conv2d(c, c * 2, 2, 2) for c in widths[:-1])

    @property
    def multiple(self) -> int:
        return int(2 ** len(self.config["encoder_blocks"]))

    @property
    def padding(self) -> str:
        return str(self.config["padding"])

    @property
    def bytes_per_pixel(self) -> int:
        return BYTES_PER_CHANNEL * int(self.config["width"])

    def restore(self, x: Tensor) -> Tensor:
        y = self.intro(x)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            y = encoder(y)
            skips.append(y)
            y = down(y)
        y = self.middle_blks(y)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            y = decoder(up(y) + skip)
        return self.ending(y) + x
