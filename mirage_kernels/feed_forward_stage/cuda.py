"""``feed_forward_stage`` in CUDA C++: forward in one kernel, backward in three (csrc/ops/feed_forward_stage/cuda)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import is_exact, to_dlpack
from mirage_kernels._runtime.weights import empty_gradients, in_own_dtypes
from mirage_kernels.feed_forward_stage.weights import OF_MIRAGE, FeedForwardWeights, Form


def forward_problem(x: Tensor, project_out: Tensor, keep_hidden: bool = False, other: str = "") -> str:
    """`other`: what `beyond_mirage` says of the stage."""
    return other or _problem("feed_forward_stage_workspace", x, project_out)


def backward_problem(x: Tensor, project_out: Tensor, keep_hidden: bool = False, other: str = "") -> str:
    return other or _problem("feed_forward_stage_backward_workspace", x, project_out)


def _problem(workspace: str, x: Tensor, project_out: Tensor) -> str:
    near = to_dlpack(cuda_runtime.as_if_near(x))
    return cuda_runtime.problem(x, workspace, near, to_dlpack(project_out.contiguous()), not is_exact(x.dtype))


def forward(x: Tensor, w: FeedForwardWeights, form: Form) -> Tensor:
    x = cuda_runtime.near(x)
    library, tf32, eps = cuda_runtime.library(), not is_exact(x.dtype), form.eps
    weights = cuda_runtime.of_one_dtype(x.dtype, *w[: len(OF_MIRAGE)])
    norm_w, norm_b, *matrices = map(to_dlpack, weights)
    with cuda_runtime.on_device_of(x) as stream:
        size = library.feed_forward_stage_workspace(to_dlpack(x), matrices[-1], tf32)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        workspace = to_dlpack(cuda_runtime.workspace(size, x))
        library.feed_forward_stage(to_dlpack(x), norm_w, norm_b, eps, *matrices, to_dlpack(y), workspace, stream, tf32)
    return y


def backward(grad_y: Tensor, x: Tensor, w: FeedForwardWeights, form: Form) -> tuple[Tensor, ...]:
    """The gradients of x and of the weights that MIRAGE has."""
    grad_y, x = cuda_runtime.near(grad_y), cuda_runtime.near(x)
    library, tf32, eps = cuda_runtime.library(), not is_exact(x.dtype), form.eps
    weights = w[: len(OF_MIRAGE)]
    norm_w, norm_b, *matrices = map(to_dlpack, cuda_runtime.of_one_dtype(x.dtype, *weights))
    with cuda_runtime.on_device_of(x) as stream:
        size = library.feed_forward_stage_backward_workspace(to_dlpack(x), matrices[-1], tf32)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grads = empty_gradients(weights, torch.float32)
        workspace = to_dlpack(cuda_runtime.workspace(size, x))
        gradients = list(map(to_dlpack, grads))
        library.feed_forward_stage_backward(
            to_dlpack(grad_y),
            to_dlpack(x),
            norm_w,
            norm_b,
            eps,
            *matrices,
            to_dlpack(grad_x),
            gradients,
            workspace,
            stream,
            tf32,
        )
    return grad_x, *in_own_dtypes(grads, weights)
