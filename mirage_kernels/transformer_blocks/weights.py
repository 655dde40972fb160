"""What ``transformer_blocks`` takes of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mirage_kernels.feed_forward_stage.weights import NOT_OF_MIRAGE, OF_MIRAGE, FeedForwardWeights
from mirage_kernels.mixer_stage.weights import MixerWeights


class BlockWeights(NamedTuple):
    """The weights of a block's halves, and what is added to the variances of its norms."""

    mixer: MixerWeights
    feed_forward: FeedForwardWeights
    norm1_eps: float = 1e-5
    bn_eps: float = 1e-5
    norm2_eps: float = 1e-5


_MIXER = len(MixerWeights._fields)
WEIGHTS = _MIXER + len(OF_MIRAGE)
"""How many tensors a block has: of the feed-forward weights those of MIRAGE, without biases of convolutions."""
EPS = 3


def halves(weights: Sequence[Any], i: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Those of block i, of its mixer and of its feed-forward network."""
    first = i * WEIGHTS
    return weights[first : first + _MIXER], weights[first + _MIXER : first + WEIGHTS]


def of_mirage(weights: FeedForwardWeights) -> list[Tensor]:
    """The tensors of a block's feed-forward network.

    Raises:
        TypeError, ValueError: it lacks the norm's bias or the depthwise convolution, or has other weights.
    """
    if weights.norm_bias is None:
        raise TypeError("norm_bias: expected a tensor, got NoneType")
    if weights.dwconv is None:
        raise TypeError("dwconv: expected a tensor, got NoneType")
    for name in NOT_OF_MIRAGE:
        if getattr(weights, name) is not None:
            raise ValueError(f"{name}: expected None, since blocks of MIRAGE have no such weight")
    return [weights.norm_weight, weights.norm_bias, weights.project_in, weights.dwconv, weights.project_out]


class PackedBlocks(Sequence[BlockWeights]):
    """The weights of blocks one after the other, as the operator takes them: in a loop over small images it takes time
    to put each block's into tuples and out again.

    Attributes:
        weights: tensors of each block in the order of the fields of `MixerWeights` and the first five of
            `FeedForwardWeights`.
        eps: of each block `norm1_eps`, `bn_eps` and `norm2_eps`.
    """

    def __init__(self, weights: list[Tensor], eps: list[float]) -> None:
        if len(eps) % EPS or len(weights) != len(eps) // EPS * WEIGHTS:
            raise ValueError(
                f"weights, eps: expected {WEIGHTS} tensors and {EPS} numbers for each block, "
                f"got {len(weights)} and {len(eps)}"
            )
        self.weights, self.eps = weights, eps

    def __len__(self) -> int:
        return len(self.eps) // EPS

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        i %= len(self)
        mixer, feed_forward = halves(self.weights, i)
        return BlockWeights(MixerWeights(*mixer), FeedForwardWeights(*feed_forward), *self.eps[EPS * i : EPS * (i + 1)])
