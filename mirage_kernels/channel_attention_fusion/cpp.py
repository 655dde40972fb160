"""``channel_attention_fusion`` on the C++ library (csrc/ops/channel_attention_fusion/cpu_kernels.cpp)."""

from torch import Tensor

from mirage_kernels._runtime.library import native, to_dlpack
from mirage_kernels.channel_attention_fusion.pack import for_backward, for_forward, gradients


def forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int, *branches: Tensor
) -> tuple[Tensor, Tensor]:
    tensors = for_forward(q, k, v, temperature, num_heads, *branches)
    native().channel_attention_fusion_forward(*map(to_dlpack, tensors))
    return tensors[-2], tensors[-1]


def backward(grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    tensors, filled = for_backward(grad_out, *inputs)
    native().channel_attention_fusion_backward(*map(to_dlpack, tensors))
    return gradients(filled, *inputs[:-1])
