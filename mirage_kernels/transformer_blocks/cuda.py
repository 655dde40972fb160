"""``transformer_blocks`` in CUDA C++ (csrc/ops/transformer_blocks/cuda.cu): four or five launches a block, one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import dl, is_exact


def forward(x: Tensor, weights: Sequence[Tensor], eps: Sequence[float]) -> Tensor | None:
    """None where a stage has no kernel for so many channels, or the GPU has not the shared memory for them."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    alike = cuda_runtime.of_one_dtype(x.dtype, *weights)
    with cuda_runtime.on_device_of(x) as stream:
        ran = cuda_runtime.library().transformer_blocks(
            *(torch._C._to_dlpack, dl(x), alike, eps, dl(y)),
            *(lambda size: dl(cuda_runtime.workspace(size, x)), stream, not is_exact(x.dtype)),
        )
    return y if ran else None
