"""Whole networks whose passes without gradients keep no feature map for longer than it is needed.

A call holds what it is called with until it returns. So a level that is called keeps its input beside the two feature
maps of the block that is running, and a network's forward keeps whatever has a name in it. Here levels take their input
out of a list, which was the last to hold it, and skip connections are given up where they are used. The peak then is
two feature maps of the finest level, or what joins two levels.

Only instances of the networks of this package become these: what other code keeps in its forward is its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirage import model
from mirage.fast.block import BlockSequence, run_sequence
from mirage.fast.recognise.pattern import is_bypassable
from mirage.networks import nafnet, promptir, restormer
from mirage_kernels import workspace

__all__ = ["MIRAGE", "NAFNet", "PromptIR", "Restormer"]

# Of one pass, as of `mirage.networks.common.RestorationNetwork.bytes_per_pixel`, per channel of `dim` or `width`.
RESTORMER_BYTES = 24  # 22 measured at 384x384, 21 at 512x768, of PromptIR too
NAFNET_BYTES = 17  # 15 measured at 384x384 and 512x768 (widths 32 and 64)


def consume(level: nn.Module, held: list[Tensor]) -> Tensor:
    """``level(held.pop())``. A sequence that is called without anybody seeing it lets go of that tensor as soon as its
    first module has run."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_bypassable(level):
        return level(held.pop())
    if type(level) is BlockSequence:
        return run_sequence(level, held)
    if type(level) is not nn.Sequential:
        return level(held.pop())
    x = held.pop()
    for module in level:
        x = module(x)
    return x


class MIRAGE(model.MIRAGE):
    """`mirage.MIRAGE` in less memory. Its own results, outside its modules, take theirs from the workspace where no
    gradient is wanted."""

    def forward(self, x: Tensor, return_spd: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `mirage.MIRAGE.forward`."""
        self._check_input(x, return_spd)
        skips = [consume(self.encoder_level1, [self.patch_embed(x)])]
        shallow = skips[0] if return_spd else None
        skips.append(consume(self.encoder_level2, [self.down1_2(skips[-1])]))
        skips.append(consume(self.encoder_level3, [self.down2_3(skips[-1])]))
        held = [self.reduce_dim_level3(consume(self.latent, [self.down3_4(skips[-1])]))]
        latent = held[0] if return_spd else None
        held = [self.reduce_chan_level3(self.concatenate(consume(self.up4_3, held), skips.pop()))]
        held = [consume(self.decoder_level3, held)]
        held = [self.reduce_chan_level2(self.concatenate(consume(self.up3_2, held), skips.pop()))]
        held = [consume(self.decoder_level2, held)]
        held = [self.concatenate(consume(self.up2_1, held), skips.pop())]
        held = [consume(self.decoder_level1, held)]
        restored = self.add_image(self.output(consume(self.refinement, held)), x)
        if shallow is None or latent is None:
            return restored
        return restored, self.spd_head(shallow, latent)

    def concatenate(self, upsampled: Tensor, skip: Tensor) -> Tensor:
        return workspace.concatenate(upsampled, skip)

    def add_image(self, correction: Tensor, x: Tensor) -> Tensor:
        return workspace.add(correction, x)


class Restormer(restormer.Restormer):
    """`mirage.networks.restormer.Restormer` in less memory."""

    @property
    def bytes_per_pixel(self) -> int:
        return RESTORMER_BYTES * int(self.config["dim"])

    def restore(self, x: Tensor) -> Tensor:
        held = [self.patch_embed(x)]
        shallow = held[0] if self.config["dual_pixel_task"] else None
        skips = [consume(self.encoder_level1, held)]
        skips.append(consume(self.encoder_level2, [self.down1_2(skips[-1])]))
        skips.append(consume(self.encoder_level3, [self.down2_3(skips[-1])]))
        held = [consume(self.latent, [self.down3_4(skips[-1])])]
        held = [self.reduce_chan_level3(workspace.concatenate(consume(self.up4_3, held), skips.pop()))]
        held = [consume(self.decoder_level3, held)]
        held = [self.reduce_chan_level2(workspace.concatenate(consume(self.up3_2, held), skips.pop()))]
        held = [consume(self.decoder_level2, held)]
        held = [workspace.concatenate(consume(self.up2_1, held), skips.pop())]
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
        skips = [consume(self.encoder_level1, [self.patch_embed(x)])]
        skips.append(consume(self.encoder_level2, [self.down1_2(skips[-1])]))
        skips.append(consume(self.encoder_level3, [self.down2_3(skips[-1])]))
        held = [self.prompted(consume(self.latent, [self.down3_4(skips[-1])]), 3)]
        held = [self.reduce_chan_level3(workspace.concatenate(consume(self.up4_3, held), skips.pop()))]
        held = [self.prompted(consume(self.decoder_level3, held), 2)]
        held = [self.reduce_chan_level2(workspace.concatenate(consume(self.up3_2, held), skips.pop()))]
        held = [self.prompted(consume(self.decoder_level2, held), 1)]
        held = [workspace.concatenate(consume(self.up2_1, held), skips.pop())]
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
