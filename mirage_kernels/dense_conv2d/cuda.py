"""``dense_conv2d`` in CUDA C++ (csrc/ops/dense_conv2d/cuda_kernels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import accumulator, dl, is_exact


def forward(x: Tensor, weight: Tensor) -> Tensor:
    library, tf32, weight = cuda_runtime.library(), not is_exact(x.dtype), weight.contiguous()
    y = torch.empty((x.shape[0], weight.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device)
    with cuda_runtime.on_device_of(x) as stream:
        workspace = cuda_runtime.workspace(library.dense_conv2d_workspace(dl(x), dl(weight), tf32), x)
        library.dense_conv2d(*map(dl, (x, weight, y, workspace)), stream, tf32)
    return y


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    library, tf32, weight = cuda_runtime.library(), not is_exact(x.dtype), weight.contiguous()
    grad_x = torch.empty(x.shape if want_x else 0, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(weight.shape if want_weight else 0, dtype=accumulator(x.dtype), device=x.device)
    with cuda_runtime.on_device_of(x) as stream:
        size = library.dense_conv2d_backward_workspace(dl(grad_y), dl(x), dl(weight), tf32)
        tensors = (grad_y, x, weight, grad_x, grad_weight, cuda_runtime.workspace(size, x))
        library.dense_conv2d_backward(*map(dl, tensors), stream, tf32)
    return grad_x, grad_weight.to(weight.dtype)
