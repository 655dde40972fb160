"""``channel_attention_fusion`` in plain PyTorch: its two parts, one after the other."""

from torch import Tensor

from mirage_kernels.channel_attention.reference import channel_attention
from mirage_kernels.tri_branch_fusion.reference import tri_branch_fusion


def channel_attention_fusion(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    num_heads: int,
    conv: Tensor,
    mlp: Tensor,
    l_att: Tensor,
    l_conv: Tensor,
    l_mlp: Tensor,
) -> Tensor:
    att = channel_attention(q, k, v, temperature, num_heads)
    return tri_branch_fusion(att, conv, mlp, l_att, l_conv, l_mlp)
