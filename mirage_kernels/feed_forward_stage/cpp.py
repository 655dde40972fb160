"""``feed_forward_stage`` on the C++ library (csrc/ops/feed_forward_stage/cpu/forward_kernels.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, native, result, to_dlpack
from mirage_kernels._runtime.weights import empty_gradients, in_own_dtypes


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    y, hidden = result(x.shape, x.dtype), torch.empty(0, dtype=x.dtype)
    if keep_hidden:
        hidden = result((x.shape[0], dwconv.shape[0], *x.shape[2:]), x.dtype)
    norm_w, norm_b, *matrices = (
        to_dlpack(t.contiguous()) for t in (norm_weight, norm_bias, project_in, dwconv, project_out)
    )
    kept = to_dlpack(hidden) if keep_hidden else None
    native().feed_forward_stage(to_dlpack(x), norm_w, norm_b, eps, *matrices, to_dlpack(y), kept)
    return y, hidden


def backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    hidden: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    weights = (norm_weight, norm_bias, project_in, dwconv, project_out)
    grad_x, grads = result(x.shape, x.dtype), empty_gradients(weights, accumulator(x.dtype))
    norm_w, norm_b, *rest = (to_dlpack(w.contiguous()) for w in weights)
    kept = to_dlpack(hidden) if hidden.dim() == 4 else None
    native().feed_forward_stage_backward(
        to_dlpack(grad_y),
        to_dlpack(x),
        norm_w,
        norm_b,
        eps,
        *rest,
        kept,
        to_dlpack(grad_x),
        list(map(to_dlpack, grads)),
    )
    return grad_x, *in_own_dtypes(grads, weights)
