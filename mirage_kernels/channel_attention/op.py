"""The public function ``channel_attention`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels._runtime import dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, define
from mirage_kernels.channel_attention.cases import CASES, flops
from mirage_kernels.channel_attention.checks import check_attention, declined
from mirage_kernels.channel_attention.matrices import plain_matrices, small_matrices
from mirage_kernels.channel_attention.reference import channel_attention as reference

_implementations = Implementations(__package__)


def channel_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int) -> Tensor:
    r"""Attention over the channels of each head, as in Restormer and the attention branch of MIRAGE.

    .. math:: \mathrm{out} = \mathrm{softmax}\left(t_{\mathrm{head}}\, \hat q \hat k^\top\right) v, \qquad
        \hat q_i = q_i / \max(\lVert q_i \rVert_2, 10^{-12})

    per sample and head of d = C / num_heads channels; the norms and inner products run over the H W pixels, the
    softmax over the d channels of k.

    Args:
        q, k, v: [B, C, H, W], float32, float64, float16 or bfloat16, all of one dtype, any strides (such as the
            chunks of one tensor).
        temperature: [num_heads, 1, 1] or [num_heads], the scale of the scores; its dtype may be wider.
        num_heads: A divisor of C.

    Returns:
        [B, C, H, W], contiguous, of the dtype of `v`. Under autocast q, k and v are rounded, the temperature is not.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    check_attention(q, k, v, temperature, num_heads)
    impl = dispatch.choose("channel_attention", q, declined(q, num_heads))
    if impl == "torch":
        return reference(q, k, v, temperature, num_heads)
    return _forward_op(q, k, v, temperature, num_heads, impl)[0]


Pair = tuple[Tensor, Tensor]
Quadruple = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int, impl: str) -> Pair:
    dispatch.record("channel_attention", impl)
    return _implementations[impl].forward(q, k, v, temperature, num_heads)


def _plain(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int, impl: str) -> Pair:
    return reference(q, k, v, temperature, num_heads), plain_matrices(q, k, temperature, num_heads, q.dtype)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int, impl: str) -> Pair:
    return q.new_empty(q.shape), small_matrices(q, num_heads, q.dtype)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    matrices: Tensor,
    impl: str,
) -> Quadruple:
    return _implementations[impl].backward(grad_out, q, k, v, temperature, matrices)


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    matrices: Tensor,
    impl: str,
) -> Quadruple:
    return *(t.new_empty(t.shape) for t in (q, k, v)), temperature.new_empty(temperature.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, unused: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 6
    return *_backward_op(grad_out, *ctx.saved_tensors, ctx.impl), None, None


_backward_op = define(
    "channel_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor matrices, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = define(
    "channel_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor temperature, int num_heads, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=(0, 1, 2),
    plain=_plain,
)
register_flops("channel_attention", flops)
register(CASES, channel_attention, reference)
