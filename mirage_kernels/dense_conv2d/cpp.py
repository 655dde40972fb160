"""``dense_conv2d`` on the C++ library (csrc/ops/dense_conv2d/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, native, result, to_dlpack


def forward(x: Tensor, weight: Tensor) -> Tensor:
    y = result((x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype)
    native().dense_conv2d(to_dlpack(x), to_dlpack(weight.contiguous()), to_dlpack(y))
    return y


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_x = result(x.shape if want_x else (0,), x.dtype)
    grad_weight = torch.empty(weight.shape if want_weight else 0, dtype=accumulator(x.dtype))
    native().dense_conv2d_backward(*map(to_dlpack, (grad_y, x, weight.contiguous(), grad_x, grad_weight)))
    return grad_x, grad_weight.to(weight.dtype)
