"""``feed_forward_stage`` in CUDA C++: forward in one kernel, backward in three (csrc/ops/feed_forward_stage/cuda)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import dl, is_exact


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float,
) -> Tensor | None:
    """None where no kernel takes so many channels, or the GPU has not the shared memory for them."""
    x = cuda_runtime.near(x)
    library, tf32 = cuda_runtime.library(), not is_exact(x.dtype)
    weights = cuda_runtime.of_one_dtype(x.dtype, norm_weight, norm_bias, project_in, dwconv, project_out)
    norm_w, norm_b, *matrices = map(dl, weights)
    with cuda_runtime.on_device_of(x) as stream:
        size = library.feed_forward_stage_workspace(dl(x), matrices[-1], tf32)
        if size is None:
            return None
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        workspace = dl(cuda_runtime.workspace(size, x))
        library.feed_forward_stage(dl(x), norm_w, norm_b, eps, *matrices, dl(y), workspace, stream, tf32)
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float,
) -> tuple[Tensor, ...] | None:
    """None where no kernel takes so many channels, or the GPU has not the shared memory for them."""
    grad_y, x = cuda_runtime.near(grad_y), cuda_runtime.near(x)
    library, tf32 = cuda_runtime.library(), not is_exact(x.dtype)
    weights = (norm_weight, norm_bias, project_in, dwconv, project_out)
    norm_w, norm_b, *matrices = map(dl, cuda_runtime.of_one_dtype(x.dtype, *weights))
    with cuda_runtime.on_device_of(x) as stream:
        size = library.feed_forward_stage_backward_workspace(dl(x), matrices[-1], tf32)
        if size is None:
            return None
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grads = [torch.empty(w.shape, dtype=torch.float32, device=x.device) for w in weights]
        workspace = dl(cuda_runtime.workspace(size, x))
        gradients = list(map(dl, grads))
        library.feed_forward_stage_backward(
            dl(grad_y), dl(x), norm_w, norm_b, eps, *matrices, dl(grad_x), gradients, workspace, stream, tf32
        )
    return grad_x, *(g.to(w.dtype) for g, w in zip(grads, weights, strict=True))
