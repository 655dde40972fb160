"""``channel_attention`` in plain PyTorch: the definition, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor


def channel_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int) -> Tensor:
    batch, channels, height, width = q.shape
    heads = (batch, num_heads, channels // num_heads, height * width)
    q, k, v = (t.reshape(heads) for t in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    attn = (scores * temperature.reshape(num_heads, 1, 1)).softmax(dim=-1)
    return (attn.to(v.dtype) @ v).reshape(batch, channels, height, width)
