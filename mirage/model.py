"""The MIRAGE network in plain PyTorch: a four-level encoder-decoder, with an SPD head for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirage.blocks import (
    Downsample,
    PatchEmbed,
    SPDCovariance,
    TransformerBlock,
    Upsample,
    check_divisible,
    l2_normalize,
)

__all__ = ["MIRAGE", "mirage_small", "mirage_tiny"]

LEVELS = 4
STRIDE = 8  # three halvings


class MIRAGE(nn.Module):
    """All-in-one image restoration network (arXiv 2505.18679, the released code's architecture).

    Args:
        in_channels: channels of the image.
        out_channels: channels of the restored image; the network adds the image to its output, so only ``in_channels``
            (the default) is possible.
        dim: channels at full resolution, a multiple of 6; the levels have ``dim``, ``2 dim``, ``4 dim`` and ``8 dim``.
        num_blocks: blocks of the three encoder levels and of the latent level; the decoder mirrors the encoder.
        num_refinement_blocks: blocks after the decoder, on ``2 dim`` channels.
        heads: attention heads per level; ``3 * heads[i]`` divides ``dim * 2**i``.
        ffn_expansion_factor: expansion of the feed-forward networks.
        drop_path: stochastic depth in the gated CNN branches, per sample, training only, in [0, 1).
        spd: build the SPD head, whose weights are part of the released checkpoints.
        spd_shallow_channels: channels the shallow features are reduced to before their covariance.
        spd_latent_channels: channels the latent features are reduced to before their covariance.
        spd_features: length of the two embeddings.

    Raises:
        ValueError: an argument breaks one of the conditions above; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        dim: int = 24,
        num_blocks: Sequence[int] = (3, 5, 5, 7),
        num_refinement_blocks: int = 2,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.0,
        drop_path: float = 0.1,
        spd: bool = True,
        spd_shallow_channels: int = 12,
        spd_latent_channels: int = 24,
        spd_features: int = 64,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        _check_arguments(in_channels, out_channels, dim, num_blocks, num_refinement_blocks, heads)
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "dim": dim,
            "num_blocks": list(num_blocks),
            "num_refinement_blocks": num_refinement_blocks,
            "heads": list(heads),
            "ffn_expansion_factor": ffn_expansion_factor,
            "drop_path": drop_path,
            "spd": spd,
            "spd_shallow_channels": spd_shallow_channels,
            "spd_latent_channels": spd_latent_channels,
            "spd_features": spd_features,
        }

        def level(channels: int, num_heads: int, count: int) -> nn.Sequential:
            return nn.Sequential(
                *(TransformerBlock(channels, num_heads, ffn_expansion_factor, drop_path) for _ in range(count))
            )

        # The order of these assignments is the order of the released state_dict.
        self.patch_embed = PatchEmbed(in_channels, dim)
        self.encoder_level1 = level(dim, heads[0], num_blocks[0])
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.down2_3 = Downsample(dim * 2)
        self.encoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.down3_4 = Downsample(dim * 4)
        self.latent = level(dim * 8, heads[3], num_blocks[3])
        self.up4_3 = Upsample(dim * 4)
        self.reduce_chan_level3 = nn.Conv2d(dim * 6, dim * 4, 1, bias=False)
        self.reduce_dim_level3 = nn.Conv2d(dim * 8, dim * 4, 1, bias=False)
        self.decoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.up3_2 = Upsample(dim * 4)
        self.reduce_chan_level2 = nn.Conv2d(dim * 4, dim * 2, 1, bias=False)
        self.decoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.up2_1 = Upsample(dim * 2)
        self.decoder_level1 = level(dim * 2, heads[0], num_blocks[0])
        self.refinement = level(dim * 2, heads[0], num_refinement_blocks)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=False)
        if spd:
            self.spd_covariance = SPDCovariance(eps=1e-5)
            self.reduce_shallow = nn.Conv2d(dim, spd_shallow_channels, 1)
            self.reduce_latent = nn.Conv2d(dim * 4, spd_latent_channels, 1)
            self.spd_proj_shallow = nn.Linear(spd_shallow_channels**2, spd_features)
            self.spd_proj_latent = nn.Linear(spd_latent_channels**2, spd_features)

    def forward(self, x: Tensor, return_spd: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Restore a batch of images.

        Args:
            x: ``[B, in_channels, H, W]``, floating point, B at least 1, H and W multiples of 8.
            return_spd: also run the SPD head.

        Returns:
            The restored images, of the shape of ``x``; with ``return_spd`` the pair ``(restored, (z_s, z_l))`` where
            the embeddings of the shallow and the latent features are ``[B, spd_features]`` and L2-normalised.

        Raises:
            ValueError: a wrong number of dimensions or channels, a size that is not a multiple of 8, or ``return_spd``
                on a model built with ``spd=False`` or an image of 8x8 (whose latent features are a single position).
        """
        self._check_input(x, return_spd)
        enc1 = self.encoder_level1(self.patch_embed(x))
        enc2 = self.encoder_level2(self.down1_2(enc1))
        enc3 = self.encoder_level3(self.down2_3(enc2))
        latent = self.reduce_dim_level3(self.latent(self.down3_4(enc3)))
        dec3 = self.decoder_level3(self.reduce_chan_level3(torch.cat((self.up4_3(latent), enc3), dim=1)))
        dec2 = self.decoder_level2(self.reduce_chan_level2(torch.cat((self.up3_2(dec3), enc2), dim=1)))
        dec1 = self.decoder_level1(torch.cat((self.up2_1(dec2), enc1), dim=1))
        restored = self.output(self.refinement(dec1)) + x
        if return_spd:
            return restored, self.spd_head(enc1, latent)
        return restored

    def spd_head(self, shallow: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the covariances of shallow ``[B, dim, H, W]`` and latent ``[B, 4 dim, H/8, W/8]`` features on the unit
        sphere: two tensors ``[B, spd_features]``."""
        z_s = self.spd_proj_shallow(self.spd_covariance(self.reduce_shallow(shallow)).flatten(1))
        z_l = self.spd_proj_latent(self.spd_covariance(self.reduce_latent(latent)).flatten(1))
        return l2_normalize(z_s), l2_normalize(z_l)

    def _check_input(self, x: Tensor, return_spd: bool) -> None:
        channels = self.config["in_channels"]
        if x.ndim != 4 or x.shape[1] != channels or x.shape[0] == 0:
            raise ValueError(f"x must have the shape [B, {channels}, H, W] with B at least 1, got {tuple(x.shape)}")
        height, width = x.shape[-2:]
        if height % STRIDE or width % STRIDE or height == 0 or width == 0:
            raise ValueError(f"the height and width of x must be positive multiples of {STRIDE}, got {height}x{width}")
        if return_spd and not self.config["spd"]:
            raise ValueError("return_spd=True needs a model built with spd=True")


def _check_arguments(
    in_channels: int,
    out_channels: int,
    dim: int,
    num_blocks: Sequence[int],
    num_refinement_blocks: int,
    heads: Sequence[int],
) -> None:
    if in_channels <= 0:
        raise ValueError(f"in_channels must be positive, got {in_channels}")
    if out_channels != in_channels:
        raise ValueError(
            f"out_channels must equal in_channels ({in_channels}), since the image is added to the output, "
            f"got {out_channels}"
        )
    check_divisible("dim", dim, 6, "three branches, and halved by the first downsampling")
    if len(num_blocks) != LEVELS or any(n < 0 for n in num_blocks):
        raise ValueError(f"num_blocks must be {LEVELS} numbers not below 0, got {tuple(num_blocks)}")
    if num_refinement_blocks < 0:
        raise ValueError(f"num_refinement_blocks must not be below 0, got {num_refinement_blocks}")
    if len(heads) != LEVELS or any(n <= 0 for n in heads):
        raise ValueError(f"heads must be {LEVELS} positive numbers, got {tuple(heads)}")
    for i, num_heads in enumerate(heads):
        check_divisible(f"dim * {2**i}", dim * 2**i, 3 * num_heads, f"three branches of heads[{i}] = {num_heads} heads")
    check_divisible("dim * 2", dim * 2, 3 * heads[0], f"the decoder's full resolution uses heads[0] = {heads[0]} heads")


def mirage_tiny(**overrides: Any) -> MIRAGE:
    """MIRAGE-T: dim 24, 2 refinement blocks; 6,207,412 parameters. ``overrides`` are arguments of `MIRAGE`."""
    return MIRAGE(**{"dim": 24, "num_refinement_blocks": 2, **overrides})


def mirage_small(**overrides: Any) -> MIRAGE:
    """MIRAGE-S: dim 30, 3 refinement blocks; 9,678,983 parameters. ``overrides`` are arguments of `MIRAGE`."""
    return MIRAGE(**{"dim": 30, "num_refinement_blocks": 3, **overrides})
