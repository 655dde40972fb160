"""The public function ``dynamic_depthwise_conv2d`` and its registration with PyTorch."""

from __future__ import annotations

from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.convolution import define_convolution
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations
from mirage_kernels.dynamic_depthwise_conv2d.cases import CASES, flops
from mirage_kernels.dynamic_depthwise_conv2d.reference import dynamic_depthwise_conv2d as reference

KERNEL_SIZES = (3, 5, 7, 9, 11)
_implementations = Implementations(__package__)


def dynamic_depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    r"""Depthwise convolution with one kernel per sample and channel, zero padding, stride 1.

    .. math:: y_{bcij} = \sum_{p,q} w_{bcpq} \, x_{b,c,i+p-r,j+q-r}, \qquad r = (K - 1) / 2

    with x zero outside its plane: the 7x7 kernels that MIRAGE's gated CNN branch generates for each sample. A static
    depthwise convolution is the same with ``weight.expand(B, C, K, K)``; nothing is copied for it.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides.
        weight: [B, C, K, K] with K one of 3, 5, 7, 9, 11, of the dtype of `x`, any strides.

    Returns:
        [B, C, H, W], contiguous, of the dtype of `x`; sums are held in float32 (float64 for float64). Under autocast
        both arguments are rounded to its dtype, as ``conv2d`` does.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    checks.check_tensor("x", x, ndim=4)
    checks.check_tensor("weight", weight, ndim=4)
    size = weight.shape[-1]
    if size not in KERNEL_SIZES:
        raise ValueError(f"weight: expected a kernel size of 3, 5, 7, 9 or 11, got shape {list(weight.shape)}")
    checks.check_shape("weight", weight, (x.shape[0], x.shape[1], size, size), "a square kernel per plane of x")
    checks.check_same_device("x", x, weight=weight)
    if checks.dtype_of_convolutions(x) != checks.dtype_of_convolutions(weight):
        checks.check_same_dtype("x", x, weight=weight)
    impl = dispatch.choose("dynamic_depthwise_conv2d", x)
    if impl == "torch":
        return reference(x, weight)
    return _forward_op(x, weight, impl)


_forward_op = define_convolution("dynamic_depthwise_conv2d", _implementations, lambda x, weight: x.shape, reference)
register_flops("dynamic_depthwise_conv2d", flops, gradients=lambda grad_y, x, weight, *want: sum(want[:2]))
register(CASES, dynamic_depthwise_conv2d, reference)
