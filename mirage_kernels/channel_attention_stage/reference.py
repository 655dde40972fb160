"""``channel_attention_stage`` in plain PyTorch: the definition, and what runs under ``use("torch")``."""

import torch.nn.functional as F
from torch import Tensor

from mirage_kernels._runtime.norms import channel_norm
from mirage_kernels.channel_attention.reference import channel_attention
from mirage_kernels.channel_attention_stage.weights import ChannelAttentionWeights


def channel_attention_stage(
    x: Tensor, weights: ChannelAttentionWeights, norm: str = "centred", eps: float = 1e-5
) -> Tensor:
    w = weights
    normal = channel_norm(x, w.norm_weight, w.norm_bias, eps, norm)
    qkv = F.conv2d(normal, w.qkv, w.qkv_bias)
    qkv = F.conv2d(qkv, w.qkv_dwconv, w.qkv_dwconv_bias, padding=1, groups=w.qkv_dwconv.shape[0])
    attended = channel_attention(*qkv.chunk(3, 1), w.temperature, w.temperature.shape[0])
    return x + F.conv2d(attended, w.project_out, w.project_out_bias)
