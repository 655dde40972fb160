"""``dynamic_depthwise_conv2d`` on the C++ library (csrc/ops/dynamic_depthwise_conv2d/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import native, result, to_dlpack


def forward(x: Tensor, weight: Tensor) -> Tensor:
    y = result(x.shape, x.dtype)
    native().dynamic_depthwise_conv2d_forward(to_dlpack(x), to_dlpack(weight), to_dlpack(y))
    return y


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> tuple[Tensor, Tensor]:
    grad_x = result(x.shape if want_x else (0,), x.dtype)
    grad_weight = torch.empty(weight.shape if want_weight else 0, dtype=weight.dtype)
    native().dynamic_depthwise_conv2d_backward(*map(to_dlpack, (grad_y, x, weight, grad_x, grad_weight)))
    return grad_x, grad_weight
