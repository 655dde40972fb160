"""A block over `mirage_kernels`, and blocks next to each other.

A stage takes the weights of its children and bypasses their forward; where one of them is not what the stage computes,
or carries hooks or a parametrization, all of them are called as modules again. That is asked in every forward, of what
`mirage.fast.recognise` says a block is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mirage_kernels
from mirage import blocks
from mirage.fast.experts import decode_in_strips
from mirage.fast.mixer import run_mixer
from mirage.fast.modules import Attention, FeedForward, LayerNorm
from mirage.fast.recognise import mirage_block, moce_ir_block, nafnet_block, restormer_block
from mirage.fast.recognise.pattern import is_bypassable, is_plain_inference
from mirage.fast.recognise.stage import BlockMatcher, Half, Stage
from mirage.fast.strips import is_large
from mirage.networks import nafnet, restormer

__all__ = [
    "BlockSequence",
    "DecoderBlock",
    "EncoderBlock",
    "NAFBlock",
    "RestormerBlock",
    "TransformerBlock",
    "run_sequence",
]

KEEP_HIDDEN_FROM = 96
"""Channels of a block from which on keeping its hidden tensor saves time: an element costs a product over the channels
to compute again, and the same to write and read however many there are."""

MOST_WITH_GRADIENT = 128
"""Channels of a block of NAFNet up to which a step of training takes no longer than with PyTorch's modules: without
activations the forward that backward recomputes is hardly more than matrix products."""


def run_feed_forward(block: Any, x: Tensor, found: tuple[Any, ...]) -> Tensor:
    """`found`: weights, eps, and the names of the norm and the activation."""
    *weights, eps, norm, activation = found
    keep_hidden = block._mirage_memory == "fast" and x.shape[1] >= KEEP_HIDDEN_FROM
    return mirage_kernels.feed_forward_stage(
        x, *weights, eps=eps, keep_hidden=keep_hidden, norm=norm, activation=activation
    )


def run_channel_attention(block: Any, x: Tensor, found: tuple[Any, ...]) -> Tensor:
    """`found`: weights, eps, and the name of the norm."""
    *weights, eps, norm = found
    return mirage_kernels.channel_attention_stage(x, mirage_kernels.ChannelAttentionWeights(*weights), norm, eps)


def _scaled(stage: Stage, tensors: Sequence[Any], eps: float) -> mirage_kernels.ScaledFeedForward:
    named = dict(zip(stage.weights, tensors, strict=True))
    scale = named.pop("scale")
    weights = mirage_kernels.FeedForwardWeights(**{"dwconv": None, **named})
    return mirage_kernels.ScaledFeedForward(weights, eps, scale)


def run_scaled(stage: Stage, block: Any, x: Tensor, found: tuple[Any, ...]) -> Tensor:
    """A feed-forward network whose branch is multiplied by a number for each channel. `found`: weights and the scale,
    eps, and the names of norm, activation and gate."""
    *tensors, eps, norm, activation, gate = found
    keep_hidden = block._mirage_memory == "fast" and x.shape[1] >= KEEP_HIDDEN_FROM
    form = {"norm": norm, "activation": activation, "gate": gate}
    return mirage_kernels.feed_forward_stages(x, [_scaled(stage, tensors, eps)], keep_hidden, **form)


def _in_halves(kind: Any, block: nn.Module, x: Tensor) -> Tensor:
    """`kind`: the fast class, whose halves are run; what an instance has of that name may be anything."""
    for half in kind.halves:
        x = half(block, x)
    return x


class TransformerBlock(blocks.TransformerBlock):
    """`mirage.blocks.TransformerBlock` as one operator, `mirage_kernels.transformer_blocks`, where no gradient is
    wanted and nothing depends on the batch, and as two elsewhere: `mirage_kernels.mixer_stage` and
    `feed_forward_stage`.

    For backward a block keeps its input, the tensor between its halves and small statistics. With the memory "fast" of
    `accelerate` also the hidden tensor of the feed-forward network.
    """

    norm_class = LayerNorm
    attention_class = Attention
    ffn_class = FeedForward
    stages = mirage_block.STAGES
    halves = (
        Half("norm1", "attn", mirage_block.MIXER_STAGE, run_mixer),
        Half("norm2", "ffn", mirage_block.FEED_FORWARD_STAGE, run_feed_forward),
    )
    matcher: ClassVar[BlockMatcher]
    _mirage_memory = "low"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and (whole := BLOCKS.match(self)) is not None:
            return _run_blocks(x, *whole)
        return _in_halves(TransformerBlock, self, x)


class RestormerBlock(restormer.RestormerBlock):
    """`mirage.networks.restormer.RestormerBlock` as two operators, `mirage_kernels.channel_attention_stage` and
    `feed_forward_stage`.

    For backward a block keeps its input, the tensor between its halves and a few d x d matrices a head. With the memory
    "fast" of `accelerate` also the hidden tensor of the feed-forward network.
    """

    stages = restormer_block.STAGES
    matcher: ClassVar[None] = None
    halves = (
        Half("norm1", "attn", restormer_block.ATTENTION_STAGE, run_channel_attention),
        Half("norm2", "ffn", restormer_block.FEED_FORWARD_STAGE, run_feed_forward),
    )
    _mirage_memory = "low"

    def forward(self, x: Tensor) -> Tensor:
        return _in_halves(RestormerBlock, self, x)


class EncoderBlock(nn.Module):
    """The block of MoCE-IR's encoder: as `RestormerBlock`, with the children `norms` (two), `mixer` and `ffn`."""

    stages = moce_ir_block.STAGES
    matcher: ClassVar[None] = None
    halves = (
        Half("norms.0", "mixer", moce_ir_block.ATTENTION_STAGE, run_channel_attention),
        Half("norms.1", "ffn", moce_ir_block.FEED_FORWARD_STAGE, run_feed_forward),
    )
    _mirage_memory = "low"

    def forward(self, x: Tensor) -> Tensor:
        return _in_halves(EncoderBlock, self, x)


class DecoderBlock(nn.Module):
    """The block of MoCE-IR's decoder. Its first half calls its modules: an attention (`shared`), experts chosen by an
    embedding of the image's frequencies (`adapter`), and the cross-attention (`mixer`) of the second to the first; of
    large maps a strip of lines at a time. Its second half is `EncoderBlock`'s.
    """

    stages = (moce_ir_block.FEED_FORWARD_STAGE,)
    halves = EncoderBlock.halves[1:]
    _mirage_memory = "low"

    def forward(self, x: Tensor, freq_emb: Tensor | None = None) -> tuple[Tensor, Any]:
        if (mixed := decode_in_strips(self, x, freq_emb)) is not None:
            return _in_halves(DecoderBlock, self, mixed), self.adapter.loss
        normed = self.norms[0](x)
        of_image, of_experts = (proj(normed) for proj in self.proj)
        del normed
        shared = self.shared(of_image)
        del of_image
        mixed = self.adapter(of_experts, freq_emb, shared)
        del of_experts
        mixed = self.mixer(mixed, shared)
        del shared
        x = mixed + x
        del mixed
        return _in_halves(DecoderBlock, self, x), self.adapter.loss


class NAFBlock(nafnet.NAFBlock):
    """`mirage.networks.nafnet.NAFBlock` as one operator, `mirage_kernels.feed_forward_stages`, where no gradient is
    wanted, and as two elsewhere, both `mirage_kernels.feed_forward_stage`.

    For backward a block keeps its input and the tensor between its halves. With the memory "fast" of `accelerate` also
    the hidden tensors of both. On CPUs blocks of many channels call their modules where a gradient is wanted.
    """

    stages = nafnet_block.STAGES
    matcher: ClassVar[BlockMatcher]
    halves = tuple(
        Half(norm, branch, stage, partial(run_scaled, stage))
        for norm, branch, stage in zip(
            ("norm1", "norm2"), (nafnet.NAFBlock.mix, nafnet.NAFBlock.feed_forward), nafnet_block.STAGES, strict=True
        )
    )
    _mirage_memory = "low"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and (whole := NAFBlock.matcher.match(self)) is not None:
            return _run_naf_blocks(x, *whole)
        if x.is_cpu and torch.is_grad_enabled() and self.conv1.in_channels > MOST_WITH_GRADIENT:
            return NAFBlock.halves[1].call(self, NAFBlock.halves[0].call(self, x))
        return _in_halves(NAFBlock, self, x)


def _run_blocks(x: Tensor, weights: list[Tensor], eps: list[float]) -> Tensor:
    return mirage_kernels.transformer_blocks(x, mirage_kernels.PackedBlocks(weights, eps))


BLOCKS = TransformerBlock.matcher = BlockMatcher(TransformerBlock, mirage_block.STAGES, _run_blocks)


def _run_naf_blocks(x: Tensor, weights: list[Tensor], eps: list[float]) -> Tensor:
    stages, first = [], 0
    for i, of_norm in enumerate(eps):
        stage = nafnet_block.STAGES[i % len(nafnet_block.STAGES)]
        behind = first + len(stage.weights)
        stages.append(_scaled(stage, weights[first:behind], of_norm))
        first = behind
    norm, activation, gate = nafnet_block.FORM
    return mirage_kernels.feed_forward_stages(x, stages, norm=norm, activation=activation, gate=gate)


NAFBlock.matcher = BlockMatcher(NAFBlock, nafnet_block.STAGES, _run_naf_blocks)

HALVED = (RestormerBlock, EncoderBlock, NAFBlock)
"""Blocks whose forward without gradients is their halves, one after the other, where it is not one operator."""


class BlockSequence(nn.Sequential):
    """`torch.nn.Sequential` of blocks, of any class with a `matcher`, which may be None.

    Where no gradient is wanted, those next to each other that would each run as one operator run as one together: what
    lies between two calls of an operator takes time, most of all where images are small. Of other blocks the halves
    are run from here: to call a block is to keep its input until it has run.
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_plain_inference():
            return run_sequence(self, [x])
        if not _is_channels_last_alone(x):
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def _is_channels_last_alone(x: Tensor) -> bool:
    """Whether the operators would change the layout of x, and back again, in each half of each block."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def run_sequence(sequence: BlockSequence, held: list[Tensor]) -> Tensor:
    """Its forward of the one tensor in the list, where no gradient is wanted. The tensor is taken out of it, so that it
    is freed with the first block if nothing else refers to it."""
    x = held.pop()
    if _is_channels_last_alone(x):
        return run_sequence(sequence, [x.contiguous()]).contiguous(memory_format=torch.channels_last)
    modules = list(sequence._modules.values())
    first = 0
    while first < len(modules):
        module = modules[first]
        matcher: BlockMatcher | None = getattr(type(module), "matcher", None)
        if matcher is not None:
            # Several blocks as one operator have a third map beside input and result.
            among = modules[: first + 1] if is_large(x) else modules
            count, weights, numbers = matcher.match_run(among, first)
            if count:
                x = matcher.run(x, weights, numbers)
                first += count
                continue
        kind: Any = type(module)
        if kind in HALVED and is_bypassable(module):
            for half in kind.halves:
                x = half(module, x)
        else:
            x = module(x)
        first += 1
    return x
