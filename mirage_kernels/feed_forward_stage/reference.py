"""``feed_forward_stage`` in plain PyTorch: the definition, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor

from mirage_kernels.channel_layer_norm.reference import channel_layer_norm
from mirage_kernels.gated_depthwise_ffn.reference import gated_depthwise_ffn


def feed_forward_stage(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    hidden = F.conv2d(channel_layer_norm(x, norm_weight, norm_bias, eps), project_in)
    return x + F.conv2d(gated_depthwise_ffn(hidden, dwconv), project_out)
