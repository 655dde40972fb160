"""The building blocks of MIRAGE in plain PyTorch (ICLR 2026, arXiv 2505.18679).

This is the reference: one operation per step, no custom operator. Attribute and parameter names are those of the
authors' checkpoints, which load with ``strict=True``. Where the paper and the released code differ the code is
followed, because the checkpoints depend on it: attention runs over channels with a learned temperature, the gate is a
GELU of ``g / temperature``, and the mixer is residual.

All feature maps are ``[B, C, H, W]`` floating-point tensors; every block keeps the dtype and device of its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attention",
    "Downsample",
    "DropPath",
    "FeedForward",
    "GatedCNNBlock",
    "LayerNorm",
    "PatchEmbed",
    "SPDCovariance",
    "TransformerBlock",
    "Upsample",
]

NORM_EPS = 1e-5
UNIT_EPS = 1e-12
DYNAMIC_KERNEL_SIZE = 7


def check_divisible(name: str, value: int, divisor: int, why: str) -> None:
    """Raise ValueError unless ``value`` is a positive multiple of ``divisor``."""
    if value <= 0 or value % divisor:
        raise ValueError(f"{name} must be a positive multiple of {divisor} ({why}), got {value}")


def l2_normalize(x: Tensor) -> Tensor:
    """``x / max(|x|, 1e-12)`` along the last dimension, in the dtype of ``x``; summed and divided in float32 at least.

    In exact arithmetic this is ``torch.nn.functional.normalize``, which is not used because its norm is computed in the
    dtype of ``x``. In float16 that overflows on large values and has no 1e-12, so that a black image gives NaN; in
    float32 on the CPU it loses digits as ``x`` gets longer (a relative error of 2e-4 at 512 x 512 pixels, 2e-3 at
    2048 x 2048, where this sum of squares has 2e-7).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    squared = wide.square().sum(-1, keepdim=True).clamp_min(UNIT_EPS**2)
    return (wide / squared.sqrt()).to(x.dtype)


class _LayerNormBody(nn.Module):
    """Weight and bias of the layer norm, and the norm of ``[B, N, C]`` over its last dimension."""

    eps = NORM_EPS

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


class LayerNorm(nn.Module):
    """Layer norm over the channels of each pixel: biased variance, eps 1e-5, weight and bias of shape ``[dim]``.

    Args:
        dim: number of channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = _LayerNormBody(dim)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        return self.body(pixels).transpose(1, 2).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.body.weight.numel()}, eps={NORM_EPS}"


class DropPath(nn.Module):
    """Stochastic depth: in training each sample's branch is zeroed with probability ``drop_prob``, and kept ones are
    scaled by ``1 / (1 - drop_prob)``. One Bernoulli draw per sample from the default generator of the tensor's device,
    so ``torch.manual_seed`` reproduces it. The identity in eval mode.

    Args:
        drop_prob: in [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class GatedCNNBlock(nn.Module):
    """The convolution branch: a gated CNN whose 7x7 depthwise kernels are generated from each sample's own average.

    With ``h = int(8/3 dim)``, ``gic1`` yields the gate g (h channels), the identity i (h - dim) and the detail d (dim);
    ``d' = depthwise7x7(d, kernel_generator(mean(d)))``; the result is
    ``proj_out(x + drop_path(gic2(gelu(g / temperature) * concat(i, d'))))``.

    Args:
        dim: number of channels of the branch.
        drop_path: probability of stochastic depth in training, in [0, 1).
    """

    def __init__(self, dim: int, drop_path: float = 0.1) -> None:
        super().__init__()
        if dim <= 0:
            raise ValueError(f"dim must be positive, got {dim}")
        hidden = int(8 / 3 * dim)
        self.norm = nn.BatchNorm2d(dim)
        self.gic1 = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.act = nn.GELU()
        self.kernel_generator = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim, 1, bias=False),
            nn.GELU(),
            nn.Conv2d(dim, dim * DYNAMIC_KERNEL_SIZE**2, 1, bias=False),
        )
        self.gic2 = nn.Conv2d(hidden, dim, 1, bias=False)
        self.drop_path = DropPath(drop_path) if drop_path != 0.0 else nn.Identity()
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False)
        self.temperature = nn.Parameter(torch.ones(1))

    @property
    def split_sizes(self) -> tuple[int, int, int]:
        """Channels of gate, identity and detail."""
        hidden, dim = self.gic2.in_channels, self.gic2.out_channels
        return hidden, hidden - dim, dim

    def dynamic_conv(self, x: Tensor) -> Tensor:
        """Convolve every sample ``x[b]`` with its own depthwise kernels; ``[B, C, H, W]`` to the same shape."""
        batch, channels, height, width = x.shape
        size = DYNAMIC_KERNEL_SIZE
        if torch.onnx.is_in_onnx_export():
            from mirage_kernels.dynamic_depthwise_conv2d.reference import for_onnx  # the network needs no kernels else

            return for_onnx(x, self.kernel_generator(x).reshape(-1, self.gic2.out_channels, size, size))
        kernels = self.kernel_generator(x).reshape(batch * channels, 1, size, size)
        if batch == 0:  # a convolution needs at least one group
            return x
        planes = x.reshape(1, batch * channels, height, width)
        return F.conv2d(planes, kernels, padding=size // 2, groups=batch * channels).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's batch norm is less accurate on a strided slice, and its mean shifts every generated kernel.
        gate, identity, detail = self.gic1(self.norm(x.contiguous())).split(self.split_sizes, dim=1)
        detail = self.dynamic_conv(detail)
        gate = self.act(gate / self.temperature)
        mixed = self.gic2(gate * torch.cat((identity, detail), dim=1))
        return self.proj_out(self.drop_path(mixed) + x)


class Attention(nn.Module):
    """The mixer: the channels are split in three equal parts, for channel attention, the gated CNN and a per-pixel MLP.

    The branches then modulate each other, ``a' = a + alpha_att * sigmoid(g + m)`` and so on round, and ``project_out``
    mixes the concatenation.

    Args:
        dim: number of channels C, a multiple of ``3 * num_heads``.
        num_heads: heads of the channel attention.
        drop_path: stochastic depth of the gated CNN, in [0, 1).
    """

    gated_cnn_class = GatedCNNBlock

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.1) -> None:
        super().__init__()
        if num_heads <= 0:
            raise ValueError(f"num_heads must be positive, got {num_heads}")
        check_divisible("dim", dim, 3 * num_heads, "three branches of num_heads heads each")
        branch = dim // 3
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.alpha_att = nn.Parameter(torch.ones(1))
        self.alpha_gated = nn.Parameter(torch.ones(1))
        self.alpha_mlp = nn.Parameter(torch.ones(1))
        self.qkv = nn.Conv2d(branch, branch * 3, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(branch * 3, branch * 3, 3, padding=1, groups=branch * 3, bias=False)
        self.gatedcnn = self.gated_cnn_class(branch, drop_path)
        self.mlp = nn.Sequential(
            nn.Conv1d(branch, branch * 2, 1, bias=False), nn.GELU(), nn.Conv1d(branch * 2, branch, 1, bias=False)
        )
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def channel_attention(self, x: Tensor) -> Tensor:
        """``softmax(q k^T * temperature) v`` per head over channels, q and k L2-normalised along the pixels."""
        batch, channels, height, width = x.shape
        heads = (batch, self.num_heads, channels // self.num_heads, height * width)
        q, k, v = (part.reshape(heads) for part in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1))
        scores = (l2_normalize(q) @ l2_normalize(k).transpose(-2, -1)) * self.temperature
        return (scores.softmax(dim=-1) @ v).reshape(x.shape)

    def fuse(self, att: Tensor, conv: Tensor, mlp: Tensor) -> Tensor:
        """The three branches, each modulated by the other two, concatenated to ``[B, dim, H, W]``."""
        return torch.cat(
            (
                att + self.alpha_att * torch.sigmoid(conv + mlp),
                conv + self.alpha_gated * torch.sigmoid(att + mlp),
                mlp + self.alpha_mlp * torch.sigmoid(att + conv),
            ),
            dim=1,
        )

    def forward(self, x: Tensor) -> Tensor:
        x_att, x_conv, x_mlp = x.chunk(3, dim=1)
        att = self.channel_attention(x_att)
        conv = self.gatedcnn(x_conv)
        mlp = self.mlp(x_mlp.flatten(2)).reshape(x_mlp.shape)
        return self.project_out(self.fuse(att, conv, mlp))


class FeedForward(nn.Module):
    """``project_out(gelu(d1) * d2)`` with ``d = dwconv3x3(gelu(project_in(x)))`` of ``2 * int(dim * expansion)``
    channels, d1 and d2 being its halves.

    Args:
        dim: number of channels.
        expansion: ratio of the gated channels to ``dim``; 2 in both released models.
    """

    def __init__(self, dim: int, expansion: float = 2.0) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        if hidden <= 0:
            raise ValueError(f"dim * expansion must be at least 1, got {dim} * {expansion}")
        self.project_in = nn.Conv2d(dim, hidden * 2, 1, bias=False)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=False)
        self.act = nn.GELU()
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.dwconv(self.act(self.project_in(x))).chunk(2, dim=1)
        return self.project_out(F.gelu(first) * second)


class TransformerBlock(nn.Module):
    """``x + attn(norm1(x))`` and then ``x + ffn(norm2(x))``.

    Args:
        dim: number of channels, a multiple of ``3 * num_heads``.
        num_heads: heads of the channel attention.
        ffn_expansion_factor: expansion of the feed-forward network.
        drop_path: stochastic depth of the gated CNN, in [0, 1).
    """

    norm_class = LayerNorm
    attention_class = Attention
    ffn_class = FeedForward

    def __init__(
        self, dim: int, num_heads: int, ffn_expansion_factor: float = 2.0, drop_path: float = 0.1
    ) -> None:
        super().__init__()
        self.norm1 = self.norm_class(dim)
        self.attn = self.attention_class(dim, num_heads, drop_path)
        self.norm2 = self.norm_class(dim)
        self.ffn = self.ffn_class(dim, ffn_expansion_factor)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PatchEmbed(nn.Module):
    """3x3 convolution from the image to ``dim`` channels, no bias."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """``[B, dim, H, W]`` to ``[B, 2 dim, H/2, W/2]``: 3x3 convolution to ``dim / 2``, then pixel unshuffle.

    ``dim`` is even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_divisible("dim", dim, 2, "it is halved before the pixel unshuffle")
        self.body = nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """``[B, dim, H, W]`` to ``[B, dim / 2, 2 H, 2 W]``: 3x3 convolution to ``2 dim``, then pixel shuffle.

    ``dim`` is even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_divisible("dim", dim, 2, "the pixel shuffle leaves half of it")
        self.body = nn.Sequential(nn.Conv2d(dim, dim * 2, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class SPDCovariance(nn.Module):
    """Channel covariance of each sample, made positive definite: ``(X - mu)(X - mu)^T / (N - 1) + eps I``.

    ``[B, C, ...]`` to ``[B, C, C]``, N being the number of positions of a channel.

    Args:
        eps: added to the diagonal.

    Raises:
        ValueError: the input has fewer than three dimensions, or one position only (its covariance is undefined).
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3:
            raise ValueError(f"x must have the shape [B, C, ...] with at least three dimensions, got {tuple(x.shape)}")
        x = x.flatten(2)
        positions = x.shape[-1]
        if positions < 2:
            raise ValueError(f"x must have at least 2 positions per channel for a covariance, got {positions}")
        centred = x - x.mean(-1, keepdim=True)
        covariance = centred @ centred.transpose(1, 2) / (positions - 1)
        return covariance + self.eps * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
