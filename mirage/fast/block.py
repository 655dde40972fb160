"""A whole block over `mirage_kernels`: which of its children the operators can stand in for, and the call.

A stage takes the weights of its children and bypasses their forward; where one of them is not what the stage computes,
or carries hooks or a parametrization, all of them are called as modules again. That is asked in every forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import mirage_kernels
from mirage import blocks
from mirage.fast import plain
from mirage.fast.modules import Attention, FeedForward, GatedCNNBlock, LayerNorm
from mirage.fast.pattern import GELU, GLOBAL_AVERAGE, Pattern, attribute, convolution, matcher, sequence, weight
from mirage.fast.plain import children, is_bare, parameters

__all__ = ["BlockSequence", "TransformerBlock"]

KEEP_HIDDEN_FROM = 96
"""Channels of a block from which on keeping its hidden tensor saves time: an element costs a product over the channels
to compute again, and the same to write and read however many there are."""


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
    _mirage_memory = "low"

    def forward(self, x: Tensor) -> Tensor:
        mixer, ffn = mixer_of(self), feed_forward_of(self)
        if not torch.is_grad_enabled() and (whole := _whole(mixer, ffn)) is not None:
            return mirage_kernels.transformer_blocks(x, [whole])
        x = x + self.attn(self.norm1(x)) if mixer is None else mixer.run(x)
        if ffn is None:
            return x + self.ffn(self.norm2(x))
        keep = self._mirage_memory == "fast" and x.shape[1] >= KEEP_HIDDEN_FROM
        return mirage_kernels.feed_forward_stage(x, *ffn.weights, ffn.norm_eps, keep_hidden=keep)


class BlockSequence(nn.Sequential):
    """`torch.nn.Sequential` of blocks. Where no gradient is wanted, those next to each other that would each run as one
    operator run as one together: what lies between two calls of an operator is not for nothing, least of all where
    images are small."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            if x.dim() != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
                return super().forward(x)
            y = super().forward(x.contiguous())  # the operators would change the layout in each half of each block
            return y.contiguous(memory_format=torch.channels_last)
        waiting: list[mirage_kernels.BlockWeights] = []
        for block in children(self).values():
            whole = None
            if type(block) is TransformerBlock and is_bare(block):
                whole = _whole(mixer_of(block), feed_forward_of(block))
            if whole is not None:
                waiting.append(whole)
                continue
            if waiting:
                x, waiting = mirage_kernels.transformer_blocks(x, waiting), []
            x = block(x)
        return mirage_kernels.transformer_blocks(x, waiting) if waiting else x


class Mixer(NamedTuple):
    """What `mirage_kernels.mixer_stage` takes of a block, and the children that change with its batches."""

    weights: mirage_kernels.MixerWeights
    norm_eps: float
    batch_norm: nn.BatchNorm2d
    drop_path: nn.Module

    def depends_on_batch(self) -> bool:
        """Whether the gated CNN, in training, uses the statistics of the batch or drops samples."""
        return self.batch_norm.training or self.drop_path.training

    def run(self, x: Tensor) -> Tensor:
        norm = self.batch_norm
        scale = plain.branch_scale(self.drop_path, x)
        y, mean, variance = mirage_kernels.mixer_stage(x, self.weights, scale, norm.training, self.norm_eps, norm.eps)
        if norm.training:
            plain.update_running_statistics(norm, mean, variance, x.shape[0] * x.shape[2] * x.shape[3])
        return y


class FeedForwardHalf(NamedTuple):
    """What `mirage_kernels.feed_forward_stage` takes of a block."""

    weights: mirage_kernels.FeedForwardWeights
    norm_eps: float


def _whole(mixer: Mixer | None, ffn: FeedForwardHalf | None) -> mirage_kernels.BlockWeights | None:
    """Both halves for `mirage_kernels.transformer_blocks`, or None where it does not compute what the block does."""
    if mixer is None or ffn is None or mixer.depends_on_batch():
        return None
    return mirage_kernels.BlockWeights(mixer.weights, ffn.weights, mixer.norm_eps, mixer.batch_norm.eps, ffn.norm_eps)


def mixer_of(block: TransformerBlock) -> Mixer | None:
    """The first half of a block, or None where its children have to be called."""
    found = _match_mixer(block)
    if found is not None:
        *weights, norm_body, batch_norm, drop_path, outputs, groups = found
        if outputs == groups and plain.is_drop_path(drop_path):
            return Mixer(mirage_kernels.MixerWeights(*weights), _eps(norm_body), batch_norm, drop_path)
    parts = children(block)
    norm, attn = parts["norm1"], parts["attn"]
    if not _is_plain_mixer(norm, attn):
        return None
    gated = children(children(attn)["gatedcnn"])
    return Mixer(_mixer_weights(norm, attn), _eps(children(norm)["body"]), gated["norm"], gated["drop_path"])


def feed_forward_of(block: TransformerBlock) -> FeedForwardHalf | None:
    """The second half of a block, or None where its children have to be called."""
    found = _match_feed_forward(block)
    if found is not None:
        *weights, norm_body, outputs, groups = found
        if outputs == groups:
            return FeedForwardHalf(mirage_kernels.FeedForwardWeights(*weights), _eps(norm_body))
    parts = children(block)
    norm, ffn = parts["norm2"], parts["ffn"]
    if not _is_plain_feed_forward(norm, ffn):
        return None
    own, parts = parameters(children(norm)["body"]), children(ffn)
    matrices = (_weight(parts[name]) for name in ("project_in", "dwconv", "project_out"))
    weights = mirage_kernels.FeedForwardWeights(own["weight"], own["bias"], *matrices)
    return FeedForwardHalf(weights, _eps(children(norm)["body"]))


def _eps(norm_body: nn.Module) -> float:
    return getattr(norm_body, "eps", blocks.NORM_EPS)


def _weight(module: nn.Module) -> Tensor:
    return parameters(module)["weight"]


def _mixer_weights(norm: nn.Module, attn: nn.Module) -> mirage_kernels.MixerWeights:
    norm, own, parts = parameters(children(norm)["body"]), parameters(attn), children(attn)
    gated, mlp = children(parts["gatedcnn"]), children(parts["mlp"])
    generator, batch_norm = children(gated["kernel_generator"]), gated["norm"]
    return mirage_kernels.MixerWeights(
        norm_weight=norm["weight"],
        norm_bias=norm["bias"],
        qkv=_weight(parts["qkv"]),
        qkv_dwconv=_weight(parts["qkv_dwconv"]),
        temperature=own["temperature"],
        bn_weight=_weight(batch_norm),
        bn_bias=parameters(batch_norm)["bias"],
        bn_mean=batch_norm._buffers["running_mean"],
        bn_var=batch_norm._buffers["running_var"],
        gic1=_weight(gated["gic1"]),
        generator_in=_weight(generator["1"]),
        generator_out=_weight(generator["3"]),
        gate_temperature=parameters(parts["gatedcnn"])["temperature"],
        gic2=_weight(gated["gic2"]),
        proj_out=_weight(gated["proj_out"]),
        mlp_in=_weight(mlp["0"]),
        mlp_out=_weight(mlp["2"]),
        alpha_att=own["alpha_att"],
        alpha_conv=own["alpha_gated"],
        alpha_mlp=own["alpha_mlp"],
        project_out=_weight(parts["project_out"]),
    )


def _is_plain_feed_forward(norm: nn.Module, ffn: nn.Module) -> bool:
    """Whether `mirage_kernels.feed_forward_stage` computes what the two modules do."""
    if type(norm) is not LayerNorm or type(ffn) is not FeedForward:
        return False
    parts = children(ffn)
    return (
        is_bare(norm, children(norm)["body"], ffn)
        and plain.is_convolution(parts["project_in"])
        and plain.is_convolution(parts["dwconv"], size=3, groups=parts["project_in"].out_channels)
        and plain.is_gelu(parts["act"])
        and plain.is_convolution(parts["project_out"])
    )


def _is_plain_mixer(norm: nn.Module, attn: nn.Module) -> bool:
    """Whether `mirage_kernels.mixer_stage` computes what the two modules do."""
    if type(norm) is not LayerNorm or type(attn) is not Attention:
        return False
    parts = children(attn)
    gated = parts["gatedcnn"]
    return (
        type(gated) is GatedCNNBlock
        and is_bare(norm, children(norm)["body"], attn, gated)
        and plain.is_convolution(parts["qkv"])
        and plain.is_convolution(parts["qkv_dwconv"], size=3, groups=parts["qkv"].out_channels)
        and _is_plain_gated_branch(children(gated))
        and _is_plain_mlp(parts["mlp"])
        and plain.is_convolution(parts["project_out"])
    )


def _is_plain_mlp(mlp: nn.Module) -> bool:
    if not plain.is_sequence(mlp, 3):
        return False
    first, act, last = children(mlp).values()
    return (
        plain.is_convolution(first, kind=nn.Conv1d)
        and plain.is_gelu(act)
        and plain.is_convolution(last, kind=nn.Conv1d)
    )


def _is_plain_gated_branch(parts: dict[str, nn.Module]) -> bool:
    if not plain.is_sequence(parts["kernel_generator"], 4):
        return False
    average, first, act, last = children(parts["kernel_generator"]).values()
    return (
        plain.is_batch_norm(parts["norm"])
        and plain.is_convolution(parts["gic1"])
        and plain.is_gelu(parts["act"])
        and plain.is_global_average(average)
        and plain.is_convolution(first)
        and plain.is_gelu(act)
        and plain.is_convolution(last)
        and plain.is_convolution(parts["gic2"])
        and plain.is_drop_path(parts["drop_path"])
        and plain.is_convolution(parts["proj_out"])
    )


# ---- the same in one call of the C++ library -----------------------------------------------------------------------


def _parameter(name: str) -> tuple[str, str]:
    return "_parameters", name


_NORM = Pattern(
    (LayerNorm,),
    takes={"norm_body": ("_modules", "body")},
    children={"body": Pattern(takes={"norm_weight": _parameter("weight"), "norm_bias": _parameter("bias")})},
)
_BATCH_NORM = Pattern(
    (nn.BatchNorm2d,),
    attributes={"affine": (True,), "track_running_stats": (True,)},
    takes={
        "bn_weight": _parameter("weight"),
        "bn_bias": _parameter("bias"),
        "bn_mean": ("_buffers", "running_mean"),
        "bn_var": ("_buffers", "running_var"),
        **attribute("momentum", "momentum"),
    },
)
_GATED = Pattern(
    (GatedCNNBlock,),
    takes={
        "gate_temperature": _parameter("temperature"),
        "batch_norm": ("_modules", "norm"),
        "drop_path": ("_modules", "drop_path"),
    },
    children={
        "norm": _BATCH_NORM,
        "gic1": convolution(weight("gic1")),
        "act": GELU,
        "kernel_generator": sequence(
            GLOBAL_AVERAGE, convolution(weight("generator_in")), GELU, convolution(weight("generator_out"))
        ),
        "gic2": convolution(weight("gic2")),
        "proj_out": convolution(weight("proj_out")),
    },
)
_ATTENTION = Pattern(
    (Attention,),
    takes={
        "temperature": _parameter("temperature"),
        "alpha_att": _parameter("alpha_att"),
        "alpha_conv": _parameter("alpha_gated"),
        "alpha_mlp": _parameter("alpha_mlp"),
    },
    children={
        "qkv": convolution({**weight("qkv"), **attribute("outputs", "out_channels")}),
        "qkv_dwconv": convolution({**weight("qkv_dwconv"), **attribute("groups", "groups")}, size=3, dense=False),
        "gatedcnn": _GATED,
        "mlp": sequence(
            convolution(weight("mlp_in"), kind=nn.Conv1d), GELU, convolution(weight("mlp_out"), kind=nn.Conv1d)
        ),
        "project_out": convolution(weight("project_out")),
    },
)
_FEED_FORWARD = Pattern(
    (FeedForward,),
    children={
        "project_in": convolution({**weight("project_in"), **attribute("outputs", "out_channels")}),
        "dwconv": convolution({**weight("dwconv"), **attribute("groups", "groups")}, size=3, dense=False),
        "act": GELU,
        "project_out": convolution(weight("project_out")),
    },
)
# The block itself is being called: its class and its hooks are its caller's.
_match_mixer = matcher(
    Pattern(bare=False, children={"norm1": _NORM, "attn": _ATTENTION}),
    (*mirage_kernels.MixerWeights._fields, "norm_body", "batch_norm", "drop_path", "outputs", "groups"),
)
_match_feed_forward = matcher(
    Pattern(bare=False, children={"norm2": _NORM, "ffn": _FEED_FORWARD}),
    (*mirage_kernels.FeedForwardWeights._fields, "norm_body", "outputs", "groups"),
)
