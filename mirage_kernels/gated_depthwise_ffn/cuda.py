"""``gated_depthwise_ffn`` in CUDA C++ (csrc/ops/gated_depthwise_ffn/cuda_kernels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import to_dlpack


def forward(h: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = h.shape
    y = torch.empty(batch, channels // 2, height, width, dtype=h.dtype, device=h.device)
    taps = weight.reshape(channels, 9).contiguous()
    with cuda_runtime.on_device_of(h) as stream:
        cuda_runtime.library().gated_depthwise_ffn_forward(to_dlpack(h), to_dlpack(taps), to_dlpack(y), stream)
    return y


def backward(grad_y: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    library = cuda_runtime.library()
    taps = weight.reshape(h.shape[1], 9).contiguous()
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_taps = torch.empty(taps.shape, dtype=h.dtype, device=h.device)
    with cuda_runtime.on_device_of(h) as stream:
        size = library.gated_depthwise_ffn_backward_workspace(to_dlpack(h), to_dlpack(taps))
        tensors = (grad_y, h, taps, grad_h, grad_taps, cuda_runtime.workspace(size, h))
        library.gated_depthwise_ffn_backward(*map(to_dlpack, tensors), stream)
    return grad_h, grad_taps.view(weight.shape)
