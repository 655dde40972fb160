"""``spd_covariance`` on the C++ library (csrc/ops/spd_covariance/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, native, to_dlpack


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    y = torch.empty((batch, channels, channels), dtype=x.dtype)
    mean = torch.empty((batch, 2, channels), dtype=accumulator(x.dtype))
    native().spd_covariance_forward(to_dlpack(x), eps, to_dlpack(y), to_dlpack(mean))
    return y, mean


def backward(grad_y: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    native().spd_covariance_backward(to_dlpack(grad_y), to_dlpack(x), to_dlpack(mean), to_dlpack(grad_x))
    return grad_x
