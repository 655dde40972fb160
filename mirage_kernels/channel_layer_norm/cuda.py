"""``channel_layer_norm`` in CUDA C++ (csrc/ops/channel_layer_norm/cuda_kernels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import to_dlpack


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    statistics = x.shape[0], *x.shape[2:]
    mean, rstd = (torch.empty(statistics, dtype=torch.float32, device=x.device) for _ in range(2))
    vectors = to_dlpack(weight.contiguous()), to_dlpack(bias.contiguous())
    with cuda_runtime.on_device_of(x) as stream:
        library = cuda_runtime.library()
        library.channel_layer_norm_forward(
            to_dlpack(x), *vectors, eps, to_dlpack(y), to_dlpack(mean), to_dlpack(rstd), stream
        )
    return y, mean, rstd


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    library = cuda_runtime.library()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight, grad_bias = (torch.empty(weight.shape, dtype=weight.dtype, device=x.device) for _ in range(2))
    with cuda_runtime.on_device_of(x) as stream:
        workspace = cuda_runtime.workspace(library.channel_layer_norm_backward_workspace(to_dlpack(x)), x)
        tensors = (grad_y, x, weight.contiguous(), mean, rstd, grad_x, grad_weight, grad_bias, workspace)
        library.channel_layer_norm_backward(*map(to_dlpack, tensors), stream)
    return grad_x, grad_weight, grad_bias
