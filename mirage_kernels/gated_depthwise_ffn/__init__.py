"""GELU, depthwise 3x3 convolution and gate of the feed-forward network, in one pass."""

from mirage_kernels.gated_depthwise_ffn.op import gated_depthwise_ffn
from mirage_kernels.gated_depthwise_ffn.reference import gated_depthwise_ffn as reference

__all__ = ["gated_depthwise_ffn", "reference"]
