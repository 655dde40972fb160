"""``channel_attention`` in plain PyTorch: the definition, and what runs where no kernel does."""

from torch import Tensor

from mirage_kernels._runtime.library import accumulator

NORM_EPS = 1e-12
"""The least norm that q and k are divided by, as in torch.nn.functional.normalize."""


def l2_normalize(x: Tensor) -> Tensor:
    """``x / max(|x|, NORM_EPS)`` along the last dimension, in the dtype of `x`; computed in that of the accumulator.

    In exact arithmetic ``torch.nn.functional.normalize``, whose norm is computed in the dtype of `x`: in float16 it
    overflows and has no 1e-12, and on the CPU it loses digits as `x` gets longer (float32: a relative error of 2e-3 at
    2048 x 2048 pixels). Clamped before the root, whose slope at zero is infinite.
    """
    wide = x.to(accumulator(x.dtype))
    squared = wide.square().sum(-1, keepdim=True).clamp_min(NORM_EPS**2)
    return (wide / squared.sqrt()).to(x.dtype)


def channel_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int) -> Tensor:
    batch, channels, height, width = q.shape
    heads = (batch, num_heads, channels // num_heads, height * width)
    q, k, v = (t.reshape(heads) for t in (q, k, v))
    scores = l2_normalize(q) @ l2_normalize(k).transpose(-2, -1)
    attn = (scores * temperature.reshape(num_heads, 1, 1)).softmax(dim=-1)
    return (attn.to(v.dtype) @ v).reshape(batch, channels, height, width)
