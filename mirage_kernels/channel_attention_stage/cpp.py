"""``channel_attention_stage`` on the C++ library (csrc/ops/channel_attention_stage/cpu/forward_kernels.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, native, result, to_dlpack
from mirage_kernels._runtime.weights import capsules, empty_gradients, in_own_dtypes
from mirage_kernels.channel_attention_stage.weights import ChannelAttentionWeights, kept_shape


def forward(x: Tensor, w: ChannelAttentionWeights, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    matrices = torch.empty(kept_shape(x.shape[0], x.shape[1], w.temperature.shape[0]), dtype=accumulator(x.dtype))
    y = result(x.shape, x.dtype)
    native().channel_attention_stage(to_dlpack(x), capsules(w), norm, eps, to_dlpack(matrices), to_dlpack(y))
    return y, matrices


def backward(
    grad_y: Tensor, x: Tensor, w: ChannelAttentionWeights, matrices: Tensor, norm: str, eps: float
) -> tuple[Tensor, ...]:
    grad_x, grads = result(x.shape, x.dtype), empty_gradients(w, accumulator(x.dtype))
    native().channel_attention_stage_backward(
        *(to_dlpack(grad_y), to_dlpack(x), capsules(w), norm, eps, to_dlpack(matrices.contiguous())),
        *(to_dlpack(grad_x), capsules(grads)),
    )
    return grad_x, *in_own_dtypes(grads, w)
