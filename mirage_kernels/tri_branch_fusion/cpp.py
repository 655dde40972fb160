"""``tri_branch_fusion`` on the C++ library (csrc/ops/tri_branch_fusion/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import native, to_dlpack
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes


def forward(att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor) -> Tensor:
    branches, scalars = (att, conv, mlp), (l_att, l_conv, l_mlp)
    dtype, result = fusion_dtypes(*branches, *scalars)
    out = torch.empty(concatenated(att), dtype=result)
    inputs = [*(t.to(dtype) for t in branches), *(t.reshape(1) for t in scalars)]
    native().tri_branch_fusion_forward(*map(to_dlpack, (*inputs, out)))
    return out


def backward(
    grad_out: Tensor, att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branches, scalars = (att, conv, mlp), (l_att, l_conv, l_mlp)
    dtype, _ = fusion_dtypes(*branches, *scalars)
    grads = [torch.empty(t.shape, dtype=dtype) for t in branches]
    grads_l = [torch.empty(t.shape, dtype=t.dtype) for t in scalars]
    inputs = [grad_out, *(t.to(dtype) for t in branches), *(t.reshape(1) for t in scalars)]
    native().tri_branch_fusion_backward(*map(to_dlpack, (*inputs, *grads, *(t.view(1) for t in grads_l))))
    grad_att, grad_conv, grad_mlp = (g.to(t.dtype) for g, t in zip(grads, branches, strict=True))
    return grad_att, grad_conv, grad_mlp, *grads_l
