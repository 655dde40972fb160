"""``dynamic_depthwise_conv2d`` in plain PyTorch: the definition, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor


def dynamic_depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    if x.numel() == 0:  # conv2d refuses a convolution of no groups
        return x * weight[:, :, :1, :1]
    planes = x.reshape(1, batch * channels, height, width)
    kernels = weight.reshape(batch * channels, 1, kernel, kernel)
    return F.conv2d(planes, kernels, padding=kernel // 2, groups=batch * channels).reshape(x.shape)
