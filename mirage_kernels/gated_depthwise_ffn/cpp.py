"""``gated_depthwise_ffn`` on the C++ library (csrc/ops/gated_depthwise_ffn/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import dl, native


def forward(h: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = h.shape
    y = torch.empty(batch, channels // 2, height, width, dtype=h.dtype)
    native().gated_depthwise_ffn_forward(dl(h), dl(weight.reshape(channels, 9).contiguous()), dl(y))
    return y


def backward(grad_y: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    taps = weight.reshape(h.shape[1], 9).contiguous()
    grad_h, grad_taps = torch.empty(h.shape, dtype=h.dtype), torch.empty(taps.shape, dtype=h.dtype)
    native().gated_depthwise_ffn_backward(*map(dl, (grad_y, h, taps, grad_h, grad_taps)))
    return grad_h, grad_taps.view(weight.shape)
