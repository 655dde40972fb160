"""The public function ``dense_conv2d`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, define
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


def _forward(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    dispatch.record("dense_conv2d", impl)
    return _implementations[impl].forward(x, weight)


def _forward_fake(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return _implementations[impl].backward(grad_y, x, weight, want_x, want_weight)


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if want_x else 0), weight.new_empty(weight.shape if want_weight else 0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.impl = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    want_x, want_weight, *_ = ctx.needs_input_grad
    grad_x, grad_weight = _backward_op(grad_y, x, weight, want_x, want_weight, ctx.impl)
    return grad_x if want_x else None, grad_weight if want_weight else None, None


_backward_op = define(
    "dense_conv2d_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, bool want_x, bool want_weight, str impl) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = define(
    "dense_conv2d",
    "(Tensor x, Tensor weight, str impl) -> Tensor",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=(0, 1),
    plain=lambda *args: reference(*args[:-1]),
)
register_flops("dense_conv2d", flops, gradients=lambda grad_y, x, weight, *want: sum(want[:2]))
register(CASES, dense_conv2d, reference)
