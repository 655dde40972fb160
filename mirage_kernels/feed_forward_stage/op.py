"""The public function ``feed_forward_stage`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, define
from mirage_kernels.feed_forward_stage import composite, cpp
from mirage_kernels.feed_forward_stage.cases import CASES, flops
from mirage_kernels.feed_forward_stage.reference import feed_forward_stage as reference
from mirage_kernels.feed_forward_stage.weights import DESCRIPTION, FeedForwardWeights, shapes

_implementations = Implementations(__package__)


def feed_forward_stage(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float = 1e-5,
    keep_hidden: bool = False,
) -> Tensor:
    r"""Layer norm, feed-forward network and residual: the second half of a MIRAGE block.

    .. math::
        y = x + W_o (\mathrm{gelu}(d_1) \odot d_2), \qquad
        d = \mathrm{depthwise}_{3\times3}(\mathrm{gelu}(W_i \, \mathrm{LN}(x)))

    Autograd keeps `x` and the weights, no tensor of 2M channels: backward recomputes what it needs. On the C++ library
    forward is one pass in which the hidden tensor exists a tile at a time, in cache; on Triton it is two launches with
    the activated hidden tensor between them, and backward four, for images that fill a GPU. In CUDA C++ forward is one
    launch (two for small images) and backward three (up to 240 channels, in float32 96; Triton's for more), each after
    one that packs the weights; the hidden tensor exists a tile at a time, in shared memory. For others, and on devices
    that have none of these, both are a chain of operators with the same formulas (`mirage_kernels._composite`). Under
    ``use("torch")`` it is the reference expression with PyTorch's autograd, which keeps everything and can be
    differentiated twice.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides. Under autocast it is rounded to its dtype.
        norm_weight, norm_bias: [C]. project_in: [2M, C, 1, 1]. dwconv: [2M, 1, 3, 3]. project_out: [C, M, 1, 1].
            Floating point, of any dtype: each has its gradient in its own.
        eps: Added to the variance.
        keep_hidden: Keep the output of `project_in` too, 2M channels in the dtype of `x`: more memory, and backward
            has less to recompute. Without effect where no gradient is wanted, and on Triton, whose backward would
            take longer to read them than to compute them again.

    Returns:
        [B, C, H, W] of the dtype of `x` (of autocast's under autocast); in channels_last where `x` is, else contiguous.
        The kernels write it contiguous: channels_last costs a copy.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    weights = FeedForwardWeights(norm_weight, norm_bias, project_in, dwconv, project_out)
    check(x, weights)
    impl = dispatch.choose("feed_forward_stage", x, otherwise="composite")
    if impl == "torch":
        return reference(x, *weights, eps)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    keep = keep_hidden and differentiable and impl not in ("triton", "cuda")
    return _composite.laid_out_like(_forward_op(x, *weights, eps, keep, impl)[0], x)


def check(x: Tensor, weights: FeedForwardWeights) -> None:
    """Raise what :func:`feed_forward_stage` raises of arguments that do not fit."""
    checks.check_tensor("x", x, ndim=4)
    checks.check_tensor("project_out", weights.project_out, ndim=4)
    expected = shapes(x.shape[1], weights.project_out.shape[1])
    checks.check_tensors("x", x, weights, expected, "C channels of x, M inputs of project_out")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, impl = arguments
    if impl == "cpp":
        dispatch.record("feed_forward_stage", impl)
        return cpp.forward(*inputs)
    *tensors, eps, keep_hidden = inputs
    impl, module = _implementations.taking("feed_forward_stage", impl, tensors[0], tensors[-1], keep_hidden)
    dispatch.record("feed_forward_stage", impl)
    if module is None:
        return composite.forward(*inputs, impl)
    return module.forward(*inputs) if module is cpp else (module.forward(*tensors, eps), tensors[0].new_empty(0))


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, dwconv, _, _, keep_hidden, _ = rest
    hidden = (x.shape[0], dwconv.shape[0], x.shape[2], x.shape[3]) if keep_hidden else 0
    return x.new_empty(x.shape), x.new_empty(hidden)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, impl = arguments
    if impl == "cpp":
        return cpp.backward(*inputs)
    *tensors, hidden, eps = inputs
    is_kept = hidden.dim() == 4
    impl, module = _implementations.taking("feed_forward_stage_backward", impl, tensors[1], tensors[-1], is_kept)
    if module is None:
        return composite.backward(*inputs, impl)
    return module.backward(*inputs) if module is cpp else module.backward(*tensors, eps)


def _backward_fake(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in arguments[:6])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, _, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, unused: None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 9
    return *_backward_op(grad_y, *ctx.saved_tensors, ctx.eps, ctx.impl), None, None, None


_WEIGHTS = DESCRIPTION.schema
_backward_op = define(
    "feed_forward_stage_backward",
    f"(Tensor grad_y, Tensor x, {_WEIGHTS}, Tensor hidden, float eps, str impl) -> "
    f"({', '.join(['Tensor'] * (1 + len(FeedForwardWeights._fields)))})",
    _backward,
    _backward_fake,
    plain=lambda *args: _backward(*args[:-1], "composite"),
)
_forward_op = define(
    "feed_forward_stage",
    f"(Tensor x, {_WEIGHTS}, float eps, bool keep_hidden, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=(0,),
    plain=lambda *args: _forward(*args[:-1], "composite"),
)
register_flops("feed_forward_stage", flops)
register(CASES, feed_forward_stage, reference)
