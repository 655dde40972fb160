"""``feed_forward_stage`` on the C++ library (csrc/ops/feed_forward_stage/cpu/forward_kernels.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, dl, native, result


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
    norm_w, norm_b, *matrices = (dl(t.contiguous()) for t in (norm_weight, norm_bias, project_in, dwconv, project_out))
    kept = dl(hidden) if keep_hidden else None
    native().feed_forward_stage(dl(x), norm_w, norm_b, eps, *matrices, dl(y), kept)
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
    dtype = accumulator(x.dtype)
    grad_x, grads = result(x.shape, x.dtype), [torch.empty(w.shape, dtype=dtype) for w in weights]
    norm_w, norm_b, *rest = (dl(w.contiguous()) for w in weights)
    kept = dl(hidden) if hidden.dim() == 4 else None
    native().feed_forward_stage_backward(
        dl(grad_y), dl(x), norm_w, norm_b, eps, *rest, kept, dl(grad_x), [dl(g) for g in grads]
    )
    return grad_x, *(g.to(w.dtype) for g, w in zip(grads, weights, strict=True))
