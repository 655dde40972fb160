"""``tri_branch_fusion`` in CUDA C++ (csrc/ops/tri_branch_fusion/cuda_kernels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import to_dlpack
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes


def forward(att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor) -> Tensor:
    branches, scalars = (att, conv, mlp), (l_att, l_conv, l_mlp)
    dtype, result = fusion_dtypes(*branches, *scalars)
    out = torch.empty(concatenated(att), dtype=result, device=att.device)
    inputs = [*(t.to(dtype) for t in branches), *(t.reshape(1) for t in scalars)]
    cuda_runtime.call("tri_branch_fusion_forward", (*inputs, out))
    return out


def backward(
    grad_out: Tensor, att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branches, scalars = (att, conv, mlp), (l_att, l_conv, l_mlp)
    dtype, _ = fusion_dtypes(*branches, *scalars)
    grads = [torch.empty(t.shape, dtype=dtype, device=att.device) for t in branches]
    grads_l = [torch.empty(t.shape, dtype=t.dtype, device=att.device) for t in scalars]
    inputs = [grad_out, *(t.to(dtype) for t in branches), *(t.reshape(1) for t in scalars)]
    size = cuda_runtime.on_device(att, "tri_branch_fusion_backward_workspace", to_dlpack(att))
    cuda_runtime.call("tri_branch_fusion_backward", (*inputs, *grads, *(t.view(1) for t in grads_l)), size)
    grad_att, grad_conv, grad_mlp = (g.to(t.dtype) for g, t in zip(grads, branches, strict=True))
    return grad_att, grad_conv, grad_mlp, *grads_l
