"""``transformer_blocks`` in plain PyTorch: the references of the stages, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mirage_kernels.feed_forward_stage.reference import feed_forward_stage
from mirage_kernels.mixer_stage.reference import mixer_stage
from mirage_kernels.transformer_blocks.weights import BlockWeights


def transformer_blocks(x: Tensor, blocks: Sequence[BlockWeights]) -> Tensor:
    for block in blocks:
        middle = mixer_stage(x, block.mixer, norm_eps=block.norm1_eps, bn_eps=block.bn_eps).y
        x = feed_forward_stage(middle, *block.feed_forward, eps=block.norm2_eps)
    return x
