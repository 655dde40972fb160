"""The public function ``channel_attention_stage`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Pass, accumulator, define_stage
from mirage_kernels._runtime.norms import check_norm
from mirage_kernels._runtime.weights import like, of_given
from mirage_kernels.channel_attention_stage import composite, cpp
from mirage_kernels.channel_attention_stage.cases import CASES, DECLINED, flops
from mirage_kernels.channel_attention_stage.reference import channel_attention_stage as reference
from mirage_kernels.channel_attention_stage.weights import (
    DESCRIPTION,
    ChannelAttentionWeights,
    kept_shape,
    shapes,
)

_COUNT = len(ChannelAttentionWeights._fields)


def channel_attention_stage(
    x: Tensor, weights: ChannelAttentionWeights, norm: str = "centred", eps: float = 1e-5
) -> Tensor:
    r"""Norm, channel attention and residual: the first half of a Restormer block.

    .. math::
        y = x + W_o \, \mathrm{softmax}\left(t_{\mathrm{head}}\, \hat q \hat k^\top\right) v, \qquad
        (q, k, v) = \mathrm{depthwise}_{3\times3}(W_{qkv} \, \mathrm{norm}(x)), \qquad
        \hat q_i = q_i / \max(\lVert q_i \rVert_2, 10^{-12})

    (Zamir et al., "Restormer", CVPR 2022, equation 1; the softmax runs over the channels of a head, norms and inner
    products over the pixels.) Autograd keeps `x`, the weights and a few d x d matrices a head: backward recomputes the
    rest. On the C++ library each direction is one call of a kernel that works on tiles: forward reduces
    :math:`q k^\top` without writing q and k, folds the softmax into :math:`W_o` and multiplies v by the product. Where
    there is no C++ library both are a chain of operators with the same formulas (`mirage_kernels._composite`), on GPUs
    Triton's. Under ``use("torch")`` it is the reference expression with PyTorch's autograd, which keeps everything and
    can be differentiated twice.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides. Under autocast it is rounded to its dtype.
        weights: See :class:`ChannelAttentionWeights`; floating point, of any dtype: each has its gradient in its own.
            The number of heads, a divisor of C, is that of temperatures.
        norm: ``"centred"``, a layer norm with or without bias, or ``"uncentred"``: x over its standard deviation.
        eps: Added to the variance.

    Returns:
        [B, C, H, W] of the dtype of `x` (of autocast's under autocast); in channels_last where `x` is, which costs a
        copy, else contiguous.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    check(x, weights, norm)
    impl = dispatch.choose("channel_attention_stage", x, DECLINED, otherwise="composite")
    if impl == "torch":
        return reference(x, weights, norm, eps)
    return _composite.laid_out_like(_forward_op(x, *weights, norm, eps, impl)[0], x)


def check(x: Tensor, weights: ChannelAttentionWeights, norm: str) -> None:
    """Raise what :func:`channel_attention_stage` raises of arguments that do not fit."""
    checks.check_tensor("x", x, ndim=4)
    if not isinstance(weights, ChannelAttentionWeights):
        raise TypeError(f"weights: expected ChannelAttentionWeights, got {type(weights).__name__}")
    check_norm(norm)
    checks.check_tensor("temperature", weights.temperature, ndim=3)
    channels, heads = x.shape[1], weights.temperature.shape[0]
    if heads == 0 or channels == 0 or channels % heads:
        raise ValueError(f"temperature: expected a head count that divides {channels} channels of x, got {heads}")
    expected = shapes(channels, heads)
    why = "C channels of x, heads of temperature"
    checks.check_tensors("x", x, weights, expected, why, DESCRIPTION.optional)


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weights, (*rest, impl) = ChannelAttentionWeights(*arguments[:_COUNT]), arguments[_COUNT:]
    dispatch.record("channel_attention_stage", impl)
    return cpp.forward(x, weights, *rest) if impl == "cpp" else composite.forward(x, weights, *rest, impl)


def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    heads = ChannelAttentionWeights(*arguments[:_COUNT]).temperature.shape[0]
    kept = kept_shape(x.shape[0], x.shape[1], heads)
    return x.new_empty(x.shape), x.new_empty(kept, dtype=accumulator(x.dtype))


def _backward(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (*rest, impl) = ChannelAttentionWeights(*arguments[:_COUNT]), arguments[_COUNT:]
    inputs = (grad_y, x, weights, *rest)
    return cpp.backward(*inputs) if impl == "cpp" else composite.backward(*inputs, impl)


def _backward_fake(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *like(arguments[:_COUNT])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = inputs[_COUNT + 1 :]
    ctx.save_for_backward(*inputs[: _COUNT + 1], output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, unused: None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * (_COUNT + 4)
    saved = ctx.saved_tensors
    grad_x, *grads = _backward_op(grad_y, *saved, *ctx.options)
    return grad_x, *of_given(grads, saved[1 : _COUNT + 1]), None, None, None


_forward_op, _backward_op = define_stage(
    "channel_attention_stage",
    Pass(_forward, _forward_fake, f"{DESCRIPTION.schema}, str norm, float eps", 2),
    Pass(_backward, _backward_fake, f"{DESCRIPTION.schema}, Tensor matrices, str norm, float eps", 1 + _COUNT),
    _setup_context,
    _autograd,
)
register_flops("channel_attention_stage", lambda x, *arguments: flops(x, ChannelAttentionWeights(*arguments[:_COUNT])))
register(CASES, channel_attention_stage, reference)
