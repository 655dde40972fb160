"""Bias-free 3x3 and 1x1 convolutions between all channels: what stands between the levels of the network."""

from mirage_kernels.dense_conv2d.op import dense_conv2d
from mirage_kernels.dense_conv2d.reference import dense_conv2d as reference

__all__ = ["dense_conv2d", "reference"]
