"""``transformer_blocks`` in CUDA C++ (csrc/ops/transformer_blocks/cuda.cu): four or five launches a block, one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import is_exact, to_dlpack
from mirage_kernels.feed_forward_stage import cuda as feed_forward
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights
from mirage_kernels.mixer_stage import cuda as mixer
from mirage_kernels.mixer_stage.weights import MixerWeights
from mirage_kernels.transformer_blocks.weights import WEIGHTS, halves


def forward_problem(x: Tensor, weights: Sequence[Tensor]) -> str:
    """Why a stage of one of the blocks has no kernel for such an x; empty where all have."""
    if cuda_runtime.is_far(x):
        return f"its kernels take rows and columns less than {cuda_runtime.FAR} elements apart, not {x.stride()[2:]}"
    problem = ""
    for i in range(len(weights) // WEIGHTS):
        of_mixer, of_feed_forward = halves(weights, i)
        problem = problem or mixer.forward_problem(x, MixerWeights(*of_mixer))
        problem = problem or feed_forward.forward_problem(x, FeedForwardWeights(*of_feed_forward).project_out)
    return problem


def forward(x: Tensor, weights: Sequence[Tensor], eps: Sequence[float]) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    alike = cuda_runtime.of_one_dtype(x.dtype, *weights)
    with cuda_runtime.on_device_of(x) as stream:
        ran = cuda_runtime.library().transformer_blocks(
            *(torch._C._to_dlpack, to_dlpack(x), alike, eps, to_dlpack(y)),
            *(lambda size: to_dlpack(cuda_runtime.workspace(size, x)), stream, not is_exact(x.dtype)),
        )
    if not ran:
        raise RuntimeError("transformer_blocks: the CUDA library declined what its stages take")
    return y
