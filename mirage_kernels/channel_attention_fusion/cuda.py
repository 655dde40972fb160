"""``channel_attention_fusion`` in CUDA C++ (csrc/ops/channel_attention/cuda_apply.h)."""

from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import is_exact, to_dlpack
from mirage_kernels.channel_attention_fusion.pack import for_backward, for_forward, gradients


def _call(direction: str, tensors: tuple[Tensor, ...], q: Tensor, num_heads: int) -> None:
    size = cuda_runtime.on_device(q, "channel_attention_fusion_workspace", to_dlpack(q), num_heads)
    cuda_runtime.call(f"channel_attention_fusion_{direction}", tensors, size, tf32=not is_exact(q.dtype))


def forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int, *branches: Tensor
) -> tuple[Tensor, Tensor]:
    tensors = for_forward(q, k, v, temperature, num_heads, *branches)
    _call("forward", tensors, tensors[0], num_heads)
    return tensors[-2], tensors[-1]


def backward(grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    tensors, filled = for_backward(grad_out, *inputs)
    _call("backward", tensors, tensors[1], inputs[-1].shape[1])
    return gradients(filled, *inputs[:-1])
