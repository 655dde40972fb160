"""LayerNorm over the channels of [B, C, H, W] at each pixel."""

from mirage_kernels.channel_layer_norm.op import channel_layer_norm
from mirage_kernels.channel_layer_norm.reference import channel_layer_norm as reference

__all__ = ["channel_layer_norm", "reference"]
