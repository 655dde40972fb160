"""Depthwise convolution with one kernel per sample and channel."""

from mirage_kernels.dynamic_depthwise_conv2d.op import dynamic_depthwise_conv2d
from mirage_kernels.dynamic_depthwise_conv2d.reference import dynamic_depthwise_conv2d as reference

__all__ = ["dynamic_depthwise_conv2d", "reference"]
