"""Attention over channels: softmax of the normalised inner products of q and k along the pixels, times v."""

from mirage_kernels.channel_attention.op import channel_attention
from mirage_kernels.channel_attention.reference import channel_attention as reference

__all__ = ["channel_attention", "reference"]
