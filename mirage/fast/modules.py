"""Drop-in modules over `mirage_kernels`: constructors, attributes and parameter names of `mirage.blocks`.

Each forward calls one operator where the reference runs a chain of them; a whole block is in `mirage.fast.block`.
Where a child module that an operator would bypass carries hooks or a parametrization, or is not what the operator
computes, it is called as a module again.

Instances of unknown classes become instances of these (see `mirage.fast.accelerate`) and keep all their attributes, so
a forward here reads parameters and child modules from `self`, but calls no method of it and reads no property: the
released code's `GatedCNNBlock` has a flag where the reference has its method `dynamic_conv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

import mirage_kernels
from mirage import blocks
from mirage.fast import strips
from mirage.fast.recognise.parts import (
    DEPTHWISE_3X3,
    GELU,
    POINTWISE,
    is_biased_convolution,
    is_dense_convolution,
    is_depthwise_convolution,
    is_halving_convolution,
    is_thin,
)
from mirage.fast.recognise.pattern import is_bypassable, is_plain_inference
from mirage.fast.strips import Convolved, Pointwise, Strips, convolve_planes, is_large, with_bias
from mirage.networks import restormer
from mirage_kernels import workspace
from mirage_kernels._runtime.checks import dtype_of_convolutions
from mirage_kernels._runtime.norms import channel_norm

__all__ = [
    "Attention",
    "BiasFreeLayerNorm",
    "ChannelAttention",
    "Conv2d",
    "CrossChannelAttention",
    "FeedForward",
    "GatedCNNBlock",
    "GatedFeedForward",
    "LayerNorm",
    "PixelShuffle",
    "PixelUnshuffle",
    "SPDCovariance",
]


def _looped() -> frozenset[torch.dtype]:
    """Dtypes in which PyTorch convolves number by number on this CPU, a hundred times as slowly as in float32: those
    for which oneDNN asks for instructions that it has not (bfloat16: AVX-512, float16: AVX-512 FP16)."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return frozenset(dtype for dtype, name in asked.items() if not getattr(torch.ops.mkldnn, name, bool)())


LOOPED = _looped()


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that keeps the size, by `mirage_kernels.dense_conv2d` where it is bias-free and 3x3 or 1x1; on
    CPUs also where it has a bias and is 1x1, or 3x3 with at most four channels on one side, and by
    `mirage_kernels.dynamic_depthwise_conv2d` where it is depthwise, 3x3 to 11x11.

    On CPUs large images, where no gradient is wanted, are halved by a convolution of 2x2 pixels of stride 2 in the same
    way: their pixels go into channels, whose memory is taken from the workspace.

    In a dtype of which PyTorch has slow loops alone on this CPU, such as bfloat16 without AVX-512, both are done so
    whatever the channels, the size and the gradients."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.shape[2:] != (1, 1):  # of one pixel each call would take longer than its product
            if is_dense_convolution(self):
                return mirage_kernels.dense_conv2d(x, self.weight)
            looped = x.is_cpu and dtype_of_convolutions(x) in LOOPED
            if x.is_cpu and is_biased_convolution(self) and (looped or is_thin(self)):
                return with_bias(mirage_kernels.dense_conv2d(x, self.weight), self.bias)
            if x.is_cpu and is_depthwise_convolution(self):
                return convolve_planes(x, self.weight, self.bias)
            if x.is_cpu and is_halving_convolution(self) and (looped or not torch.is_grad_enabled() and is_large(x)):
                height, width = x.shape[2:]
                if height > 1 and width > 1:  # else PyTorch says what is wrong
                    squares = workspace.pixel_unshuffle(x[:, :, : height // 2 * 2, : width // 2 * 2], 2)
                    weight = self.weight.flatten(1)[:, :, None, None]
                    return with_bias(mirage_kernels.dense_conv2d(squares, weight), self.bias)
        return super().forward(x)


class PixelShuffle(nn.PixelShuffle):
    """`torch.nn.PixelShuffle` whose large results take their memory from the workspace where no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        return workspace.pixel_shuffle(x, self.upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle):
    """`torch.nn.PixelUnshuffle`, as `PixelShuffle`."""

    def forward(self, x: Tensor) -> Tensor:
        return workspace.pixel_unshuffle(x, self.downscale_factor)


class LayerNorm(blocks.LayerNorm):
    """`mirage.blocks.LayerNorm` as one operator on [B, C, H, W]. See `mirage_kernels.channel_layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        if not is_bypassable(body):
            return super().forward(x)
        eps = getattr(body, "eps", blocks.NORM_EPS)
        return mirage_kernels.channel_layer_norm(x, body.weight, body.bias, eps)


class BiasFreeLayerNorm(restormer.BiasFreeLayerNorm):
    """`mirage.networks.restormer.BiasFreeLayerNorm` on [B, C, H, W], without turning it to channels last."""

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        if x.dim() != 4 or not is_bypassable(body):
            return super().forward(x)
        return channel_norm(x, body.weight, None, getattr(body, "eps", blocks.NORM_EPS), "uncentred")


class GatedCNNBlock(blocks.GatedCNNBlock):
    """`mirage.blocks.GatedCNNBlock` with its generated kernels applied by `mirage_kernels.dynamic_depthwise_conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, dim = self.gic2.in_channels, self.gic2.out_channels
        gate, identity, detail = self.gic1(self.norm(x.contiguous())).split((hidden, hidden - dim, dim), dim=1)
        size = blocks.DYNAMIC_KERNEL_SIZE
        kernels = self.kernel_generator(detail).reshape(*detail.shape[:2], size, size)
        detail = mirage_kernels.dynamic_depthwise_conv2d(detail, kernels)
        mixed = self.gic2(self.act(gate / self.temperature) * torch.cat((identity, detail), dim=1))
        return self.proj_out(self.drop_path(mixed) + x)


class Attention(blocks.Attention):
    """`mirage.blocks.Attention` with attention and fusion in one operator: the attention output never reaches memory.

    See `mirage_kernels.channel_attention_fusion`; the 3x3 depthwise convolution of q, k and v is
    `mirage_kernels.dynamic_depthwise_conv2d` with one kernel for all samples.
    """

    gated_cnn_class = GatedCNNBlock

    def forward(self, x: Tensor) -> Tensor:
        x_att, x_conv, x_mlp = x.chunk(3, dim=1)
        q, k, v = _depthwise(self.qkv_dwconv, self.qkv(x_att)).chunk(3, dim=1)
        conv = self.gatedcnn(x_conv)
        mlp = self.mlp(x_mlp.flatten(2)).reshape(x_mlp.shape)
        heads = _heads(self)
        alphas = (self.alpha_att, self.alpha_gated, self.alpha_mlp)
        fused = mirage_kernels.channel_attention_fusion(q, k, v, self.temperature, heads, conv, mlp, *alphas)
        return self.project_out(fused)


def _is_bare(conv: nn.Module) -> bool:
    """Whether calling it is the same as using its weights by what it is set up as."""
    return type(conv) in (nn.Conv2d, Conv2d) and is_bypassable(conv)


def _depthwise(conv: Any, x: Tensor) -> Tensor:
    if not _is_bare(conv) or not is_depthwise_convolution(conv):
        return conv(x)
    return convolve_planes(x, conv.weight, conv.bias)


def _dense(conv: Any, x: Tensor) -> Tensor:
    if not _is_bare(conv) or not is_dense_convolution(conv):
        return conv(x)
    return mirage_kernels.dense_conv2d(x, conv.weight)


def _heads(attention: Any) -> int:
    """Of an attention with a temperature for each. In a trace a size is a tensor."""
    return int(attention.temperature.shape[0])


class FeedForward(blocks.FeedForward):
    """`mirage.blocks.FeedForward` with GELU, 3x3 depthwise and gate in one operator.

    See `mirage_kernels.gated_depthwise_ffn`.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.project_in(x)
        if DEPTHWISE_3X3.fits(self.dwconv) and GELU.fits(self.act):
            return self.project_out(mirage_kernels.gated_depthwise_ffn(hidden, self.dwconv.weight))
        first, second = self.dwconv(self.act(hidden)).chunk(2, dim=1)
        return self.project_out(nn.functional.gelu(first) * second)


class ChannelAttention(restormer.ChannelAttention):
    """`mirage.networks.restormer.ChannelAttention` with the attention itself as one operator; a block runs all of it
    together with its norm, as `mirage_kernels.channel_attention_stage`.

    See `mirage_kernels.channel_attention`; of large maps, `mirage.fast.strips`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if strips.are_wanted(x) and (attention := self_attention(self, x)) is not None:
            of_x = Strips.of(x)
            return strips.attend(attention, of_x, of_x, workspace.empty_like(x))
        q, k, v = convolve_in_parts(self.qkv, self.qkv_dwconv, x, 3)
        attended = mirage_kernels.channel_attention(q, k, v, self.temperature, _heads(self))
        del q, k, v
        return _dense(self.project_out, attended)


def pointwise_of(conv: Any) -> Pointwise | None:
    """The weights of a 1x1 convolution that nobody sees; None of another module."""
    return Pointwise(conv.weight, conv.bias) if _is_bare(conv) and POINTWISE.settings_fit(conv) else None


def convolved_of(mix: Any, planes: Any, count: int) -> Sequence[Convolved]:
    """The weights of a 1x1 convolution and a depthwise one that nobody sees, in `count` parts of as many channels; of
    other modules none."""
    pointwise = pointwise_of(mix)
    if pointwise is None or not _is_bare(planes) or not is_depthwise_convolution(planes):
        return ()
    absent = (None,) * count
    weights = pointwise.weight.chunk(count), planes.weight.chunk(count)
    biases = (absent if bias is None else bias.chunk(count) for bias in (pointwise.bias, planes.bias))
    return [
        Convolved(Pointwise(weight, mix_bias), taps, bias)
        for weight, taps, mix_bias, bias in zip(*weights, *biases, strict=True)
    ]


def self_attention(module: Any, x: Tensor) -> strips.AttentionWeights | None:
    """What a `ChannelAttention` computes with, of maps like x; None if its modules have to be called, or something
    does not fit, which is told there."""
    return _attention_of(module, convolved_of(module.qkv, module.qkv_dwconv, 3), x)


def cross_attention(module: Any, x: Tensor) -> strips.AttentionWeights | None:
    """As `self_attention`, of a `CrossChannelAttention`."""
    of_queries, of_others = convolved_of(module.q, module.q_dwconv, 1), convolved_of(module.kv, module.kv_dwconv, 2)
    return _attention_of(module, [*of_queries, *of_others], x)


def _attention_of(module: Any, parts: Sequence[Convolved], x: Tensor) -> strips.AttentionWeights | None:
    project_out, channels, heads = pointwise_of(module.project_out), x.shape[1], _heads(module)
    if len(parts) != 3 or project_out is None or not are_of(x.dtype, module):
        return None
    if channels % heads or module.temperature.shape != (heads, 1, 1):
        return None
    if not all(is_square(pointwise, channels) for pointwise in (*(part.mix for part in parts), project_out)):
        return None
    q, k, v = parts
    return strips.AttentionWeights(q, k, v, module.temperature, project_out)


def are_of(dtype: torch.dtype, module: nn.Module) -> bool:
    """Whether all parameters are."""
    return all(parameter.dtype == dtype for parameter in module.parameters())


def is_square(pointwise: Pointwise | None, channels: int) -> TypeGuard[Pointwise]:
    return pointwise is not None and pointwise.weight.shape[:2] == (channels, channels)


def convolve_in_parts(mix: Any, planes: Any, x: Tensor, count: int) -> Sequence[Tensor]:
    """The depthwise convolution `planes` of what `mix` makes of x, as `count` tensors of as many channels. Where no
    gradient is wanted large ones come one after the other: what lies between the two is there for one of them only."""
    if is_large(x) and is_plain_inference() and (parts := convolved_of(mix, planes, count)):
        return [part(x) for part in parts]
    return _depthwise(planes, _dense(mix, x)).chunk(count, dim=1)


class CrossChannelAttention(nn.Module):
    """Channel attention of the pixels of x to those of y, as AdaIR and MoCE-IR have it: the queries are of x, keys and
    values of y. The attention itself is one operator; its convolutions are modules of their own.

    See `mirage_kernels.channel_attention`; of large maps, `mirage.fast.strips`.
    """

    temperature: nn.Parameter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if strips.are_wanted(x) and x.shape == y.shape and (attention := cross_attention(self, x)) is not None:
            return strips.attend(attention, Strips.of(x), Strips.of(y), workspace.empty_like(x))
        q = _depthwise(self.q_dwconv, _dense(self.q, x))
        k, v = convolve_in_parts(self.kv, self.kv_dwconv, y, 2)
        attended = mirage_kernels.channel_attention(q, k, v, self.temperature, _heads(self))
        del q, k, v
        return self.project_out(attended)


class GatedFeedForward(restormer.GatedFeedForward):
    """`mirage.networks.restormer.GatedFeedForward`: a block runs it together with its norm, as one operator. See
    `mirage_kernels.feed_forward_stage`."""


class SPDCovariance(blocks.SPDCovariance):
    """`mirage.blocks.SPDCovariance` in one pass over the features. See `mirage_kernels.spd_covariance`."""

    def forward(self, x: Tensor) -> Tensor:
        return mirage_kernels.spd_covariance(x, self.eps)
