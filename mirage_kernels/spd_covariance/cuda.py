"""``spd_covariance`` in CUDA C++ (csrc/ops/spd_covariance/cuda_kernels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import is_exact, to_dlpack


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    library, (batch, channels) = cuda_runtime.library(), x.shape[:2]
    y = torch.empty(batch, channels, channels, dtype=x.dtype, device=x.device)
    mean = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    with cuda_runtime.on_device_of(x) as stream:
        workspace = to_dlpack(cuda_runtime.workspace(library.spd_covariance_workspace(to_dlpack(x)), x))
        library.spd_covariance_forward(
            to_dlpack(x), eps, to_dlpack(y), to_dlpack(mean), workspace, stream, not is_exact(x.dtype)
        )
    return y, mean


def backward(grad_y: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with cuda_runtime.on_device_of(x) as stream:
        tensors = map(to_dlpack, (grad_y, x, mean, grad_x))
        cuda_runtime.library().spd_covariance_backward(*tensors, stream, not is_exact(x.dtype))
    return grad_x
