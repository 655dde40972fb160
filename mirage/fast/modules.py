"""Drop-in modules over `mirage_kernels`: constructors, attributes and parameter names of `mirage.blocks`.

Each forward calls one operator where the reference runs a chain of them. A child module that the operator would bypass
is called as a module again when it carries hooks or a parametrization, so that these still run.
"""

from __future__ import annotations

from torch import Tensor, nn

import mirage_kernels
from mirage import blocks

__all__ = ["Attention", "FeedForward", "GatedCNNBlock", "LayerNorm", "SPDCovariance", "TransformerBlock"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_bare(*modules: nn.Module) -> bool:
    """True where calling the modules is the same as using their weights: no hooks, no parametrization."""
    return not any(getattr(m, hooks) for m in modules for hooks in HOOKS) and not any(
        hasattr(m, "parametrizations") for m in modules
    )


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
        if not is_bare(self.qkv_dwconv):
            return self.qkv_dwconv(qkv)
        weight = self.qkv_dwconv.weight.transpose(0, 1).expand(qkv.shape[0], -1, -1, -1)
        return mirage_kernels.dynamic_depthwise_conv2d(qkv, weight)


class FeedForward(blocks.FeedForward):
    """`mirage.blocks.FeedForward` with GELU, 3x3 depthwise and gate in one operator.

    See `mirage_kernels.gated_depthwise_ffn`.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.project_in(x)
        if is_bare(self.dwconv, self.act):
            return self.project_out(mirage_kernels.gated_depthwise_ffn(hidden, self.dwconv.weight))
        first, second = self.dwconv(self.act(hidden)).chunk(2, dim=1)
        return self.project_out(nn.functional.gelu(first) * second)


class SPDCovariance(blocks.SPDCovariance):
    """`mirage.blocks.SPDCovariance` in one pass over the features. See `mirage_kernels.spd_covariance`."""

    def forward(self, x: Tensor) -> Tensor:
        return mirage_kernels.spd_covariance(x, self.eps)


class TransformerBlock(blocks.TransformerBlock):
    """`mirage.blocks.TransformerBlock` built of the fast modules above.

    Without autograd its second half, ``x + ffn(norm2(x))``, is one pass on CPUs: `mirage_kernels.feed_forward_stage`.
    """

    norm_class = LayerNorm
    attention_class = Attention
    ffn_class = FeedForward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        norm, ffn = self.norm2, self.ffn
        if not (isinstance(norm, LayerNorm) and isinstance(ffn, FeedForward)):
            return x + ffn(norm(x))
        if not is_bare(norm, norm.body, ffn, ffn.project_in, ffn.dwconv, ffn.act, ffn.project_out):
            return x + ffn(norm(x))
        return mirage_kernels.feed_forward_stage(
            x,
            norm.body.weight,
            norm.body.bias,
            ffn.project_in.weight,
            ffn.dwconv.weight,
            ffn.project_out.weight,
            getattr(norm.body, "eps", blocks.NORM_EPS),
        )
