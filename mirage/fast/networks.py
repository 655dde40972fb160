"""Whole networks whose passes without gradients keep no feature map for longer than it is needed.

A call holds what it is called with until it returns. So a level that is called keeps its input beside the two feature
maps of the block that is running, and a network's forward keeps whatever has a name in it. Here levels take their input
out of a list, which was the last to hold it, and skip connections are given up where they are used. The peak then is
two feature maps of the finest level, or what joins two levels.

Only instances of the networks of this package become these: what other code keeps in its forward is its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mirage import model
from mirage.fast.block import BlockSequence, run_sequence
from mirage.fast.recognise.pattern import is_bypassable, is_plain_inference
from mirage.networks import nafnet, promptir, restormer
from mirage_kernels import workspace

__all__ = ["MIRAGE", "NAFNet", "PromptIR", "Restormer"]

# Of one pass, as of `mirage.networks.common.RestorationNetwork.bytes_per_pixel`, per channel of `dim` or `width`.
RESTORMER_BYTES = 24  # 22 measured at 384x384, 21 at 512x768, of PromptIR too
NAFNET_BYTES = 17  # 15 measured at 384x384 and 512x768 (widths 32 and 64)


def consume(level: nn.Module, held: list[Tensor]) -> Tensor:
    """``level(held.pop())``. A sequence that is called without anybody seeing it lets go of that tensor as soon as its
    first module has run."""
    if is_plain_inference() and is_bypassable(level):
        if type(level) is BlockSequence:
            return run_sequence(level, held)
        if type(level) is nn.Sequential:
            x = held.pop()
            for module in level:
                x = module(x)
            return x
    return level(held.pop())


def encode(network: Any, held: list[Tensor]) -> list[Tensor]:
    """What the three levels of an encoder make of the shallow features in the list: its skip connections."""
    skips = [consume(network.encoder_level1, held)]
    skips.append(consume(network.encoder_level2, [network.down1_2(skips[-1])]))
    skips.append(consume(network.encoder_level3, [network.down2_3(skips[-1])]))
    return skips


def join(up: nn.Module, held: list[Tensor], skips: list[Tensor]) -> Tensor:
    """The features of a level and, behind them, the next finer skip connection, which is given up."""
    return workspace.concatenate(consume(up, held), skips.pop())


class MIRAGE(model.MIRAGE):
    """`mirage.MIRAGE` in less memory. Its own results, outside its modules, take theirs from the workspace where no
    gradient is wanted."""

    def forward(self, x: Tensor, return_spd: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `mirage.MIRAGE.forward`."""
        self._check_input(x, return_spd)
        skips = encode(self, [self.patch_embed(x)])
        shallow = skips[0] if return_spd else None
        held = [self.reduce_dim_level3(consume(self.latent, [self.down3_4(skips[-1])]))]
        latent = held[0] if return_spd else None
        held = [self.reduce_chan_level3(join(self.up4_3, held, skips))]
        held = [consume(self.decoder_level3, held)]
        held = [self.reduce_chan_level2(join(self.up3_2, held, skips))]
        held = [consume(self.decoder_level2, held)]
        held = [join(self.up2_1, held, skips)]
        held = [consume(self.decoder_level1, held)]
        restored = workspace.add(self.output(consume(self.refinement, held)), x)
        if shallow is None or latent is None:
            return restored
        return restored, self.spd_head(shallow, latent)


class Restormer(restormer.Restormer):
    """`mirage.networks.restormer.Restormer` in less memory."""

    @property
    def bytes_per_pixel(self) -> int:
        return RESTORMER_BYTES * int(self.config["dim"])

    def restore(self, x: Tensor) -> Tensor:
        held = [self.patch_embed(x)]
        shallow = held[0] if self.config["dual_pixel_task"] else None
        skips = encode(self, held)
        held = [consume(self.latent, [self.down3_4(skips[-1])])]
        held = [self.reduce_chan_level3(join(self.up4_3, held, skips))]
        held = [consume(self.decoder_level3, held)]
        held = [self.reduce_chan_level2(join(self.up3_2, held, skips))]
        held = [consume(self.decoder_level2, held)]
        held = [join(self.up2_1, held, skips)]
        held = [consume(self.decoder_level1, held)]
        held = [consume(self.refinement, held)]
        if shallow is not None:
            return self.output(workspace.add(held.pop(), self.skip_conv(shallow)))
        return self.output(held.pop()) + x


class PromptIR(promptir.PromptIR):
    """`mirage.networks.promptir.PromptIR` in less memory."""

    @property
    def bytes_per_pixel(self) -> int:
        return RESTORMER_BYTES * int(self.config["dim"])

    def restore(self, x: Tensor) -> Tensor:
        skips = encode(self, [self.patch_embed(x)])
        held = [self.prompted(consume(self.latent, [self.down3_4(skips[-1])]), 3)]
        held = [self.reduce_chan_level3(join(self.up4_3, held, skips))]
        held = [self.prompted(consume(self.decoder_level3, held), 2)]
        held = [self.reduce_chan_level2(join(self.up3_2, held, skips))]
        held = [self.prompted(consume(self.decoder_level2, held), 1)]
        held = [join(self.up2_1, held, skips)]
        held = [consume(self.decoder_level1, held)]
        return self.output(consume(self.refinement, held)) + x


class NAFNet(nafnet.NAFNet):
    """`mirage.networks.nafnet.NAFNet` in less memory."""

    @property
    def bytes_per_pixel(self) -> int:
        return NAFNET_BYTES * int(self.config["width"])

    def restore(self, x: Tensor) -> Tensor:
        held, skips = [self.intro(x)], []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(consume(encoder, held))
            held = [down(skips[-1])]
        held = [consume(self.middle_blks, held)]
        for decoder, up in zip(self.decoders, self.ups, strict=True):
            held = [workspace.add(consume(up, held), skips.pop())]
            held = [consume(decoder, held)]
        return self.ending(held.pop()) + x
