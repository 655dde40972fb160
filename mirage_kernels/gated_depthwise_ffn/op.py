"""The public function ``gated_depthwise_ffn`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, define
from mirage_kernels.gated_depthwise_ffn.cases import CASES, flops
from mirage_kernels.gated_depthwise_ffn.reference import gated_depthwise_ffn as reference

_implementations = Implementations(__package__)


def gated_depthwise_ffn(h: Tensor, weight: Tensor) -> Tensor:
    r"""The middle of a MIRAGE (and Restormer) feed-forward network, between its two 1x1 convolutions.

    .. math:: y = \mathrm{gelu}(d_{:M}) \odot d_{M:}, \qquad d = \mathrm{depthwise}_{3 \times 3}(\mathrm{gelu}(h))

    with zero padding 1 and the exact (erf) GELU. Backward recomputes from `h`: only `h` and `weight` are kept. In
    C++ and CUDA C++ forward is one pass over the maps and backward another; Triton's backward is two, with the gradient
    of `d` in memory between them.

    Args:
        h: [B, 2M, H, W], float32, float64, float16 or bfloat16, any strides.
        weight: [2M, 1, 3, 3], as ``nn.Conv2d(2 * M, 2 * M, 3, groups=2 * M)`` holds it, or [2M, 3, 3]; dtype of `h`.
            Under autocast both are rounded to its dtype.

    Returns:
        [B, M, H, W], contiguous, dtype of `h`.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    checks.check_tensor("h", h, ndim=4)
    checks.check_tensor("weight", weight)
    channels = h.shape[1]
    if channels == 0 or channels % 2:
        raise ValueError(f"h: expected an even number of channels, at least 2, got shape {list(h.shape)}")
    if tuple(weight.shape) not in ((channels, 1, 3, 3), (channels, 3, 3)):
        raise ValueError(
            f"weight: expected shape [{channels}, 1, 3, 3] or [{channels}, 3, 3] for the {channels} channels of h, "
            f"got {list(weight.shape)}"
        )
    checks.check_same_device("h", h, weight=weight)
    if not checks.under_autocast(h):
        checks.check_same_dtype("h", h, weight=weight)
    impl = dispatch.choose("gated_depthwise_ffn", h)
    if impl == "torch":
        return reference(h, weight)
    return _forward_op(h, weight, impl)


def _forward(h: Tensor, weight: Tensor, impl: str) -> Tensor:
    dispatch.record("gated_depthwise_ffn", impl)
    return _implementations[impl].forward(h, weight)


def _forward_fake(h: Tensor, weight: Tensor, impl: str) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2, h.shape[2], h.shape[3])


def _backward(grad_y: Tensor, h: Tensor, weight: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _implementations[impl].backward(grad_y, h, weight)


def _backward_fake(grad_y: Tensor, h: Tensor, weight: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    h, weight, ctx.impl = inputs
    ctx.save_for_backward(h, weight)


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    h, weight = ctx.saved_tensors
    return *_backward_op(grad_y, h, weight, ctx.impl), None


_backward_op = define(
    "gated_depthwise_ffn_backward",
    "(Tensor grad_y, Tensor h, Tensor weight, str impl) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = define(
    "gated_depthwise_ffn",
    "(Tensor h, Tensor weight, str impl) -> Tensor",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=(0, 1),
    plain=lambda *args: reference(*args[:-1]),
)
register_flops("gated_depthwise_ffn", flops)
register(CASES, gated_depthwise_ffn, reference)
