"""``feed_forward_stage`` in plain PyTorch: the definition, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor

from mirage_kernels._runtime.norms import channel_norm


def feed_forward_stage(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in: Tensor,
    dwconv: Tensor | None,
    project_out: Tensor,
    project_in_bias: Tensor | None = None,
    dwconv_bias: Tensor | None = None,
    project_out_bias: Tensor | None = None,
    excite: Tensor | None = None,
    excite_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "centred",
    activation: str = "gelu",
    gate: str = "gelu",
) -> Tensor:
    hidden = F.conv2d(channel_norm(x, norm_weight, norm_bias, eps, norm), project_in, project_in_bias)
    if activation == "gelu":
        hidden = F.gelu(hidden)
    if dwconv is not None:
        hidden = F.conv2d(hidden, dwconv, dwconv_bias, padding=1, groups=hidden.shape[1])
    first, second = hidden.chunk(2, 1)
    gated = (F.gelu(first) if gate == "gelu" else first) * second
    if excite is not None:
        gated = gated * F.conv2d(gated.mean((2, 3), keepdim=True), excite, excite_bias)
    return x + F.conv2d(gated, project_out, project_out_bias)
