"""The kinds of norm over the channels of a pixel that stages begin with, by name.

With the mean m and the biased variance v of the channels, s = sqrt(v + eps), a weight w and a bias b or none:

- ``"centred"``: (x - m) / s * w + b, LayerNorm.
- ``"uncentred"``: x / s * w + b; without bias it is the "BiasFree" norm of Restormer, whose variance is of the centred
  x, and which does not centre x itself.

In C++ they are `NormKind` (csrc/include/mirage/norm.h).
"""

from __future__ import annotations

from torch import Tensor

NORMS = ("centred", "uncentred")


def check_norm(norm: object) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str) -> Tensor:
    """The norm of x [B, C, H, W] in plain PyTorch; weight and bias [C]. The definition: PyTorch differentiates it."""
    variance, mean = x.var(1, keepdim=True, unbiased=False), x.mean(1, keepdim=True)
    shape = (1, -1, 1, 1)
    scaled = (x - mean if norm == "centred" else x) / (variance + eps).sqrt() * weight.view(shape)
    return scaled if bias is None else scaled + bias.view(shape)
