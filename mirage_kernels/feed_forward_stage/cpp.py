"""``feed_forward_stage`` on the C++ library (csrc/ops/feed_forward_stage/cpu/forward_kernels.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, native, result, to_dlpack
from mirage_kernels._runtime.weights import capsules, empty_gradients, in_own_dtypes
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights, Form


def forward(x: Tensor, weights: FeedForwardWeights, form: Form, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    y, hidden = result(x.shape, x.dtype), torch.empty(0, dtype=x.dtype)
    if keep_hidden:
        hidden = result((x.shape[0], weights.project_in.shape[0], *x.shape[2:]), x.dtype)
    kept = to_dlpack(hidden) if keep_hidden else None
    native().feed_forward_stage(to_dlpack(x), capsules(weights), *form, to_dlpack(y), kept)
    return y, hidden


def backward(
    grad_y: Tensor, x: Tensor, weights: FeedForwardWeights, hidden: Tensor, form: Form
) -> tuple[Tensor, ...]:
    grad_x, grads = result(x.shape, x.dtype), empty_gradients(weights, accumulator(x.dtype))
    kept = to_dlpack(hidden) if hidden.dim() == 4 else None
    native().feed_forward_stage_backward(
        to_dlpack(grad_y), to_dlpack(x), capsules(weights), *form, kept, to_dlpack(grad_x), capsules(grads)
    )
    return grad_x, *in_own_dtypes(grads, weights)
