"""``channel_layer_norm`` on the C++ library (csrc/ops/channel_layer_norm/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, native, result, to_dlpack


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = result(x.shape, dtype)
    mean, rstd = (torch.empty(_pixels(x), dtype=accumulator(dtype)) for _ in range(2))
    weight, bias = weight.contiguous(), bias.contiguous()
    native().channel_layer_norm_forward(
        to_dlpack(_loadable(x, dtype)),
        to_dlpack(weight),
        to_dlpack(bias),
        eps,
        to_dlpack(y),
        to_dlpack(mean),
        to_dlpack(rstd),
    )
    return y, mean, rstd


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    source = _loadable(x, grad_y.dtype)
    grad_x = result(x.shape, source.dtype)
    grad_weight, grad_bias = (torch.empty(weight.shape, dtype=weight.dtype) for _ in range(2))
    arguments = (grad_y, source, weight.contiguous(), mean, rstd, grad_x, grad_weight, grad_bias)
    native().channel_layer_norm_backward(*map(to_dlpack, arguments))
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _pixels(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]


def _loadable(x: Tensor, result: torch.dtype) -> Tensor:
    # The kernels read any x of the result's dtype and a 16-bit x of a float32 result; float64 weights are the rest.
    return x.double() if result == torch.float64 else x
