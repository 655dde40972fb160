"""``transformer_block`` in plain PyTorch: the references of its stages, one after the other."""

from __future__ import annotations

from torch import Tensor

from mirage_kernels.feed_forward_stage.reference import feed_forward_stage
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights
from mirage_kernels.mixer_stage.reference import mixer_stage
from mirage_kernels.mixer_stage.weights import MixerWeights


def transformer_block(
    x: Tensor,
    mixer: MixerWeights,
    feed_forward: FeedForwardWeights,
    norm1_eps: float = 1e-5,
    bn_eps: float = 1e-5,
    norm2_eps: float = 1e-5,
) -> Tensor:
    middle = mixer_stage(x, mixer, norm_eps=norm1_eps, bn_eps=bn_eps).y
    return feed_forward_stage(middle, *feed_forward, eps=norm2_eps)
