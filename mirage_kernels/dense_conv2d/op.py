"""The public function ``dense_conv2d`` and its registration with PyTorch."""

from __future__ import annotations

from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.convolution import define_convolution
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations
from mirage_kernels.dense_conv2d.cases import CASES, DECLINED, flops
from mirage_kernels.dense_conv2d.reference import dense_conv2d as reference

SIZES = (1, 3)
_implementations = Implementations(__package__)


def dense_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    r"""A bias-free convolution between all channels, stride 1, zero padding: what stands between MIRAGE's levels.

    .. math:: y_m = \sum_c x_c \star w_{mc}

    It exists for the CPU, where a network's few dense convolutions are a tenth of its time once the rest is fast. On
    other devices it is ``torch.nn.functional.conv2d``, as it is under ``use("torch")`` and ``use("triton")``: on GPUs
    that is cuDNN. It is not written in CUDA C++: under ``use("cuda")`` it runs as it does by itself.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides.
        weight: [M, C, K, K], K being 1 or 3; dtype of `x`. Under autocast both are rounded to its dtype.

    Returns:
        [B, M, H, W], dtype of `x`; contiguous but under PyTorch. bfloat16 and float16 are summed in float32.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    checks.check_tensor("x", x, ndim=4)
    checks.check_tensor("weight", weight, ndim=4)
    if weight.shape[1] != x.shape[1] or weight.shape[2] != weight.shape[3] or weight.shape[2] not in SIZES:
        raise ValueError(
            f"weight: expected shape [M, {x.shape[1]}, K, K] with K 1 or 3 for the {x.shape[1]} channels of x, "
            f"got {list(weight.shape)}"
        )
    checks.check_same_device("x", x, weight=weight)
    if not checks.under_autocast(x):
        checks.check_same_dtype("x", x, weight=weight)
    impl = dispatch.choose("dense_conv2d", x, DECLINED)
    if impl == "torch":
        return reference(x, weight)
    return _forward_op(x, weight, impl)


_forward_op = define_convolution(
    "dense_conv2d", _implementations, lambda x, weight: (x.shape[0], weight.shape[0], *x.shape[2:]), reference
)
register_flops("dense_conv2d", flops, gradients=lambda grad_y, x, weight, *want: sum(want[:2]))
register(CASES, dense_conv2d, reference)
