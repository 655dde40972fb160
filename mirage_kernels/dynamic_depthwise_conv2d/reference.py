"""``dynamic_depthwise_conv2d`` in plain PyTorch: the definition, and what runs where no kernel does."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    if torch.onnx.is_in_onnx_export():
        return for_onnx(x, weight)
    if x.numel() == 0:  # conv2d refuses a convolution of no groups
        return x * weight[:, :, :1, :1]
    planes = x.reshape(1, batch * channels, height, width)
    kernels = weight.reshape(batch * channels, 1, kernel, kernel)
    return F.conv2d(planes, kernels, padding=kernel // 2, groups=batch * channels).reshape(x.shape)


def for_onnx(x: Tensor, weight: Tensor) -> Tensor:
    """The same for ONNX, where the groups of a convolution are a constant: a convolution where B is always 1, a product
    with the pixels below each tap where it may be any. A trace (dynamo=False) does not tell which it is: what it saw
    as 1 stays so.
    """
    batch, channels, size = x.shape[0], int(weight.shape[1]), int(weight.shape[-1])
    if not isinstance(batch, torch.SymInt) and int(batch) == 1:
        return F.conv2d(x, weight.reshape(channels, 1, size, size), padding=size // 2, groups=channels)
    below = F.unfold(x, size, padding=size // 2).unflatten(1, (channels, size * size))
    return (weight.reshape(-1, channels, 1, size * size) @ below).reshape(x.shape)
