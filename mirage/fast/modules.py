"""Drop-in modules over `mirage_kernels`: constructors, attributes and parameter names of `mirage.blocks`.

Each forward calls one operator where the reference runs a chain of them; that of a block, one for each of its halves.
Where a child module that an operator would bypass carries hooks or a parametrization, or is not what the operator
computes, it is called as a module again.
"""

from __future__ import annotations

from torch import Tensor, nn

import mirage_kernels
from mirage import blocks
from mirage.fast import plain
from mirage.fast.plain import is_bare

__all__ = ["Attention", "FeedForward", "GatedCNNBlock", "LayerNorm", "SPDCovariance", "TransformerBlock"]


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
    """`mirage.blocks.TransformerBlock` as two operators, `mirage_kernels.mixer_stage` and `feed_forward_stage`.

    For backward a block keeps its input, the tensor between its halves and small statistics; with the memory "fast" of
    `accelerate` also the hidden tensor of the feed-forward network.
    """

    norm_class = LayerNorm
    attention_class = Attention
    ffn_class = FeedForward
    _mirage_memory = "low"

    def forward(self, x: Tensor) -> Tensor:
        x = self._mix(x) if _is_plain_mixer(self.norm1, self.attn) else x + self.attn(self.norm1(x))
        if _is_plain_feed_forward(self.norm2, self.ffn):
            return self._feed_forward(x)
        return x + self.ffn(self.norm2(x))

    def _mix(self, x: Tensor) -> Tensor:
        gated = self.attn.gatedcnn
        norm, scale = gated.norm, plain.branch_scale(gated.drop_path, x)
        y, mean, variance = mirage_kernels.mixer_stage(
            x, _mixer_weights(self.norm1.body, self.attn), scale, norm.training, _eps(self.norm1), norm.eps
        )
        if norm.training:
            plain.update_running_statistics(norm, mean, variance, x.shape[0] * x.shape[2] * x.shape[3])
        return y

    def _feed_forward(self, x: Tensor) -> Tensor:
        body, ffn = self.norm2.body, self.ffn
        return mirage_kernels.feed_forward_stage(
            x,
            body.weight,
            body.bias,
            ffn.project_in.weight,
            ffn.dwconv.weight,
            ffn.project_out.weight,
            _eps(self.norm2),
            keep_hidden=self._mirage_memory == "fast",
        )


def _eps(norm: LayerNorm) -> float:
    return getattr(norm.body, "eps", blocks.NORM_EPS)


def _mixer_weights(body: nn.Module, attn: Attention) -> mirage_kernels.MixerWeights:
    gated = attn.gatedcnn
    return mirage_kernels.MixerWeights(
        norm_weight=body.weight,
        norm_bias=body.bias,
        qkv=attn.qkv.weight,
        qkv_dwconv=attn.qkv_dwconv.weight,
        temperature=attn.temperature,
        bn_weight=gated.norm.weight,
        bn_bias=gated.norm.bias,
        bn_mean=gated.norm.running_mean,
        bn_var=gated.norm.running_var,
        gic1=gated.gic1.weight,
        generator_in=gated.kernel_generator[1].weight,
        generator_out=gated.kernel_generator[3].weight,
        gate_temperature=gated.temperature,
        gic2=gated.gic2.weight,
        proj_out=gated.proj_out.weight,
        mlp_in=attn.mlp[0].weight,
        mlp_out=attn.mlp[2].weight,
        alpha_att=attn.alpha_att,
        alpha_conv=attn.alpha_gated,
        alpha_mlp=attn.alpha_mlp,
        project_out=attn.project_out.weight,
    )


def _is_plain_feed_forward(norm: nn.Module, ffn: nn.Module) -> bool:
    """Whether `mirage_kernels.feed_forward_stage` computes what the two modules do."""
    return (
        type(norm) is LayerNorm
        and type(ffn) is FeedForward
        and is_bare(norm, norm.body, ffn)
        and plain.is_convolution(ffn.project_in)
        and plain.is_convolution(ffn.dwconv, size=3, groups=ffn.project_in.out_channels)
        and plain.is_gelu(ffn.act)
        and plain.is_convolution(ffn.project_out)
    )


def _is_plain_mixer(norm: nn.Module, attn: nn.Module) -> bool:
    """Whether `mirage_kernels.mixer_stage` computes what the two modules do."""
    return (
        type(norm) is LayerNorm
        and type(attn) is Attention
        and type(attn.gatedcnn) is GatedCNNBlock
        and is_bare(norm, norm.body, attn, attn.gatedcnn)
        and plain.is_convolution(attn.qkv)
        and plain.is_convolution(attn.qkv_dwconv, size=3, groups=attn.qkv.out_channels)
        and _is_plain_gated_branch(attn.gatedcnn)
        and plain.is_sequence(attn.mlp, 3)
        and plain.is_convolution(attn.mlp[0], kind=nn.Conv1d)
        and plain.is_gelu(attn.mlp[1])
        and plain.is_convolution(attn.mlp[2], kind=nn.Conv1d)
        and plain.is_convolution(attn.project_out)
    )


def _is_plain_gated_branch(gated: GatedCNNBlock) -> bool:
    generator = gated.kernel_generator
    return (
        plain.is_batch_norm(gated.norm)
        and plain.is_convolution(gated.gic1)
        and plain.is_gelu(gated.act)
        and plain.is_sequence(generator, 4)
        and plain.is_global_average(generator[0])
        and plain.is_convolution(generator[1])
        and plain.is_gelu(generator[2])
        and plain.is_convolution(generator[3])
        and plain.is_convolution(gated.gic2)
        and plain.is_drop_path(gated.drop_path)
        and plain.is_convolution(gated.proj_out)
    )
