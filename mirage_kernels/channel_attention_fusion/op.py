"""The public function ``channel_attention_fusion`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels._runtime import dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, define
from mirage_kernels.channel_attention.checks import check_attention, declined
from mirage_kernels.channel_attention.matrices import plain_matrices, small_matrices
from mirage_kernels.channel_attention_fusion.cases import CASES, flops
from mirage_kernels.channel_attention_fusion.reference import channel_attention_fusion as reference
from mirage_kernels.tri_branch_fusion.checks import check_branch, check_scalars
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes, widest

_implementations = Implementations(__package__)


def channel_attention_fusion(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    num_heads: int,
    conv: Tensor,
    mlp: Tensor,
    l_att: Tensor,
    l_conv: Tensor,
    l_mlp: Tensor,
) -> Tensor:
    """``tri_branch_fusion(channel_attention(q, k, v, temperature, num_heads), conv, mlp, l_att, l_conv, l_mlp)``.

    The attention's output is computed tile by tile where the fusion needs it, in forward and again in backward, and
    never written by itself. Backward keeps the arguments and a few d x d matrices per head.

    Args:
        q, k, v: [B, C, H, W], all of one dtype, any strides.
        temperature: [num_heads, 1, 1] or [num_heads].
        num_heads: A divisor of C.
        conv, mlp: [B, C, H, W], the other two branches, any strides; their dtypes may differ from that of `q`.
        l_att, l_conv, l_mlp: The weights of the modulations, [1] or [].

    Returns:
        [B, 3C, H, W], contiguous, of the dtype that the reference gives: that to which the attention (rounded under
        autocast), the branches and the weights promote.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    check_attention(q, k, v, temperature, num_heads)
    check_branch("conv", conv, "q", q)
    check_branch("mlp", mlp, "q", q)
    check_scalars("q", q, l_att=l_att, l_conv=l_conv, l_mlp=l_mlp)
    main = widest(q, conv, mlp, l_att, l_conv, l_mlp)
    impl = dispatch.choose("channel_attention_fusion", main, declined(q, num_heads))
    if impl == "torch":
        return reference(q, k, v, temperature, num_heads, conv, mlp, l_att, l_conv, l_mlp)
    return _forward_op(q, k, v, temperature, num_heads, conv, mlp, l_att, l_conv, l_mlp, impl)[0]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, impl = arguments
    dispatch.record("channel_attention_fusion", impl)
    return _implementations[impl].forward(*inputs)


def _plain(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, _, temperature, num_heads, conv, mlp, *scalars, _ = arguments
    dtype, _ = fusion_dtypes(q, conv, mlp, *scalars)
    return reference(*arguments[:-1]), plain_matrices(q, k, temperature, num_heads, dtype)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int, conv: Tensor, mlp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype, result = fusion_dtypes(q, conv, mlp, *rest[:3])
    return q.new_empty(concatenated(q), dtype=result), small_matrices(q, num_heads, dtype)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, impl = arguments
    return _implementations[impl].backward(*tensors)


def _backward_fake(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in arguments[:9])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, temperature, _, *rest, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, temperature, *rest, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, unused: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 11
    grad_q, grad_k, grad_v, grad_temperature, *rest = _backward_op(grad_out, *ctx.saved_tensors, ctx.impl)
    return grad_q, grad_k, grad_v, grad_temperature, None, *rest, None


_backward_op = define(
    "channel_attention_fusion_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor conv, Tensor mlp, Tensor l_att, "
    "Tensor l_conv, Tensor l_mlp, Tensor matrices, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = define(
    "channel_attention_fusion",
    "(Tensor q, Tensor k, Tensor v, Tensor temperature, int num_heads, Tensor conv, Tensor mlp, Tensor l_att, "
    "Tensor l_conv, Tensor l_mlp, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=(0, 1, 2),
    plain=_plain,
)
register_flops("channel_attention_fusion", flops)
register(CASES, channel_attention_fusion, reference)
