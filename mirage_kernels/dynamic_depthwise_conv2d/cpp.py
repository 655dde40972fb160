"""``dynamic_depthwise_conv2d`` on the C++ library (csrc/ops/dynamic_depthwise_conv2d/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import dl, native


def forward(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    native().dynamic_depthwise_conv2d_forward(dl(x), dl(weight), dl(y))
    return y


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape if want_x else 0, dtype=x.dtype)
    grad_weight = torch.empty(weight.shape if want_weight else 0, dtype=weight.dtype)
    native().dynamic_depthwise_conv2d_backward(*map(dl, (grad_y, x, weight, grad_x, grad_weight)))
    return grad_x, grad_weight
