"""The first half of a Restormer block, ``x + attn(norm1(x))``, as one operator that keeps little."""

from mirage_kernels.channel_attention_stage.op import channel_attention_stage
from mirage_kernels.channel_attention_stage.reference import channel_attention_stage as reference
from mirage_kernels.channel_attention_stage.weights import ChannelAttentionWeights

__all__ = ["ChannelAttentionWeights", "channel_attention_stage", "reference"]
