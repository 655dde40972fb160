"""``gated_depthwise_ffn`` on the C++ library (csrc/ops/gated_depthwise_ffn/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import native, to_dlpack


def forward(h: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = h.shape
    y = torch.empty(batch, channels // 2, height, width, dtype=h.dtype)
    native().gated_depthwise_ffn_forward(
        to_dlpack(h), to_dlpack(weight.reshape(channels, 9).contiguous()), to_dlpack(y)
    )
    return y


def backward(grad_y: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    taps = weight.reshape(h.shape[1], 9).contiguous()
    grad_h, grad_taps = torch.empty(h.shape, dtype=h.dtype), torch.empty(taps.shape, dtype=h.dtype)
    native().gated_depthwise_ffn_backward(*map(to_dlpack, (grad_y, h, taps, grad_h, grad_taps)))
    return grad_h, grad_taps.view(weight.shape)
