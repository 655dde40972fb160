"""Drop-in modules over `mirage_kernels`: constructors, attributes and parameter names of `mirage.blocks`.

Each forward calls one operator where the reference runs a chain of them; that of a block, one or two.
Where a child module that an operator would bypass carries hooks or a parametrization, or is not what the operator
computes, it is called as a module again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mirage_kernels
from mirage import blocks, model
from mirage.fast import plain
from mirage.fast.plain import children, is_bare, parameters

__all__ = [
    "MIRAGE",
    "Attention",
    "Conv2d",
    "FeedForward",
    "GatedCNNBlock",
    "LayerNorm",
    "PixelShuffle",
    "PixelUnshuffle",
    "SPDCovariance",
    "TransformerBlock",
]


KEEP_HIDDEN_FROM = 96
"""Channels of a block from which on keeping its hidden tensor saves time: an element costs a product over the channels
to compute again, and the same to write and read however many there are."""


class MIRAGE(model.MIRAGE):
    """`mirage.MIRAGE` whose large concatenations take their memory from the workspace where no gradient is wanted."""

    def concatenate(self, upsampled: Tensor, skip: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().concatenate(upsampled, skip)
        return mirage_kernels.concatenate(upsampled, skip)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, by `mirage_kernels.dense_conv2d` where it is bias-free, 3x3 or 1x1, and keeps the size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or not plain.is_dense_convolution(self):
            return super().forward(x)
        return mirage_kernels.dense_conv2d(x, self.weight)


class PixelShuffle(nn.PixelShuffle):
    """`torch.nn.PixelShuffle` whose large results take their memory from the workspace where no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        return mirage_kernels.pixel_shuffle(x, self.upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle):
    """`torch.nn.PixelUnshuffle`, as `PixelShuffle`."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        return mirage_kernels.pixel_unshuffle(x, self.downscale_factor)


class LayerNorm(blocks.LayerNorm):
    """`mirage.blocks.LayerNorm` as one operator on [B, C, H, W]. See `mirage_kernels.channel_layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        if not is_bare(body):
            return super().forward(x)
        eps = getattr(body, "eps", blocks.NORM_EPS)
        return mirage_kernels.channel_layer_norm(x, body.weight, body.bias, eps)


class GatedCNNBlock(blocks.GatedCNNBlock):
    """`mirage.blocks.GatedCNNBlock` with its generated kernels applied by `mirage_kernels.dynamic_depthwise_conv2d`."""

    def dynamic_conv(self, x: Tensor) -> Tensor:
        size = blocks.DYNAMIC_KERNEL_SIZE
        kernels = self.kernel_generator(x).reshape(*x.shape[:2], size, size)
        return mirage_kernels.dynamic_depthwise_conv2d(x, kernels)


class Attention(blocks.Attention):
    """`mirage.blocks.Attention` with attention and fusion in one operator: the attention output never reaches memory.

    See `mirage_kernels.channel_attention_fusion`; the 3x3 depthwise convolution of q, k and v is
    `mirage_kernels.dynamic_depthwise_conv2d` with one kernel for all samples.
    """

    gated_cnn_class = GatedCNNBlock

    def forward(self, x: Tensor) -> Tensor:
        x_att, x_conv, x_mlp = x.chunk(3, dim=1)
        q, k, v = self._depthwise(self.qkv(x_att)).chunk(3, dim=1)
        conv = self.gatedcnn(x_conv)
        mlp = self.mlp(x_mlp.flatten(2)).reshape(x_mlp.shape)
        heads = self.temperature.shape[0]
        alphas = (self.alpha_att, self.alpha_gated, self.alpha_mlp)
        fused = mirage_kernels.channel_attention_fusion(q, k, v, self.temperature, heads, conv, mlp, *alphas)
        return self.project_out(fused)

    def _depthwise(self, qkv: Tensor) -> Tensor:
        if not plain.is_convolution(self.qkv_dwconv, size=3, groups=qkv.shape[1]):
            return self.qkv_dwconv(qkv)
        weight = self.qkv_dwconv.weight.transpose(0, 1).expand(qkv.shape[0], -1, -1, -1)
        return mirage_kernels.dynamic_depthwise_conv2d(qkv, weight)


class FeedForward(blocks.FeedForward):
    """`mirage.blocks.FeedForward` with GELU, 3x3 depthwise and gate in one operator.

    See `mirage_kernels.gated_depthwise_ffn`.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.project_in(x)
        if plain.is_convolution(self.dwconv, size=3, groups=hidden.shape[1]) and plain.is_gelu(self.act):
            return self.project_out(mirage_kernels.gated_depthwise_ffn(hidden, self.dwconv.weight))
        first, second = self.dwconv(self.act(hidden)).chunk(2, dim=1)
        return self.project_out(nn.functional.gelu(first) * second)


class SPDCovariance(blocks.SPDCovariance):
    """`mirage.blocks.SPDCovariance` in one pass over the features. See `mirage_kernels.spd_covariance`."""

    def forward(self, x: Tensor) -> Tensor:
        return mirage_kernels.spd_covariance(x, self.eps)


class TransformerBlock(blocks.TransformerBlock):
    """`mirage.blocks.TransformerBlock` as one operator, `mirage_kernels.transformer_block`, where no gradient is wanted
    and nothing depends on the batch, and as two elsewhere: `mirage_kernels.mixer_stage` and `feed_forward_stage`.

    For backward a block keeps its input, the tensor between its halves and small statistics. With the memory "fast" of
    `accelerate` also the hidden tensor of the feed-forward network.
    """

    norm_class = LayerNorm
    attention_class = Attention
    ffn_class = FeedForward
    _mirage_memory = "low"

    def forward(self, x: Tensor) -> Tensor:
        norm1, attn, norm2, ffn = (children(self)[name] for name in ("norm1", "attn", "norm2", "ffn"))
        mixer = _mixer_weights(norm1, attn) if _is_plain_mixer(norm1, attn) else None
        feed_forward = _feed_forward_weights(norm2, ffn) if _is_plain_feed_forward(norm2, ffn) else None
        if mixer is None or feed_forward is None or torch.is_grad_enabled() or _has_batch_effects(attn):
            x = x + attn(norm1(x)) if mixer is None else self._mix(x, mixer)
            return x + ffn(norm2(x)) if feed_forward is None else self._feed_forward(x, feed_forward)
        norm = _gated(attn)["norm"]
        return mirage_kernels.transformer_block(x, mixer, feed_forward, _eps(norm1), norm.eps, _eps(norm2))

    def _mix(self, x: Tensor, weights: mirage_kernels.MixerWeights) -> Tensor:
        gated = _gated(children(self)["attn"])
        norm, scale = gated["norm"], plain.branch_scale(gated["drop_path"], x)
        y, mean, variance = mirage_kernels.mixer_stage(
            x, weights, scale, norm.training, _eps(children(self)["norm1"]), norm.eps
        )
        if norm.training:
            plain.update_running_statistics(norm, mean, variance, x.shape[0] * x.shape[2] * x.shape[3])
        return y

    def _feed_forward(self, x: Tensor, weights: mirage_kernels.FeedForwardWeights) -> Tensor:
        keep = self._mirage_memory == "fast" and x.shape[1] >= KEEP_HIDDEN_FROM
        return mirage_kernels.feed_forward_stage(x, *weights, _eps(children(self)["norm2"]), keep_hidden=keep)


def _gated(attn: nn.Module) -> dict[str, nn.Module]:
    return children(children(attn)["gatedcnn"])


def _has_batch_effects(attn: nn.Module) -> bool:
    """Whether the gated CNN, in training, uses the statistics of the batch or drops samples."""
    gated = _gated(attn)
    return gated["norm"].training or gated["drop_path"].training


def _eps(norm: nn.Module) -> float:
    return getattr(children(norm)["body"], "eps", blocks.NORM_EPS)


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


def _feed_forward_weights(norm: nn.Module, ffn: nn.Module) -> mirage_kernels.FeedForwardWeights:
    own, parts = parameters(children(norm)["body"]), children(ffn)
    return mirage_kernels.FeedForwardWeights(
        norm_weight=own["weight"],
        norm_bias=own["bias"],
        project_in=_weight(parts["project_in"]),
        dwconv=_weight(parts["dwconv"]),
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
