"""``channel_attention`` and ``tri_branch_fusion`` in one: the attention's output never reaches memory by itself."""

from mirage_kernels.channel_attention_fusion.op import channel_attention_fusion
from mirage_kernels.channel_attention_fusion.reference import channel_attention_fusion as reference

__all__ = ["channel_attention_fusion", "reference"]
