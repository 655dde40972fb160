"""``dynamic_depthwise_conv2d`` in CUDA C++ (csrc/ops/dynamic_depthwise_conv2d/cuda_kernels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import to_dlpack


def forward(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with cuda_runtime.on_device_of(x) as stream:
        cuda_runtime.library().dynamic_depthwise_conv2d_forward(to_dlpack(x), to_dlpack(weight), to_dlpack(y), stream)
    return y


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> tuple[Tensor, Tensor]:
    library = cuda_runtime.library()
    grad_x = torch.empty(x.shape if want_x else 0, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(weight.shape if want_weight else 0, dtype=weight.dtype, device=x.device)
    with cuda_runtime.on_device_of(x) as stream:
        size = (
            library.dynamic_depthwise_conv2d_backward_workspace(to_dlpack(x), to_dlpack(weight)) if want_weight else 0
        )
        tensors = (grad_y, x, weight, grad_x, grad_weight, cuda_runtime.workspace(size, x))
        library.dynamic_depthwise_conv2d_backward(*map(to_dlpack, tensors), stream)
    return grad_x, grad_weight
