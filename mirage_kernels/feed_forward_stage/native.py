"""``feed_forward_stage`` on the C++ library (csrc/cpu/feed_forward_stage_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._library import accumulator, dl, native


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    # The kernels multiply in the accumulator's type; 16-bit weights are widened once per call, a small copy.
    matrices = (norm_weight, norm_bias, project_in.flatten(1), dwconv.flatten(1), project_out.flatten(1))
    norm_w, norm_b, first, depthwise, last = (dl(m.to(accumulator(x.dtype)).contiguous()) for m in matrices)
    native().feed_forward_stage(dl(x), norm_w, norm_b, eps, first, depthwise, last, dl(y))
    return y
