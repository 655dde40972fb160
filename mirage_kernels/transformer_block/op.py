"""The public function ``transformer_block`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from mirage_kernels import _dispatch, _stage
from mirage_kernels._library import define
from mirage_kernels.feed_forward_stage import op as feed_forward_op
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights
from mirage_kernels.mixer_stage import op as mixer_op
from mirage_kernels.mixer_stage.weights import MixerWeights
from mirage_kernels.transformer_block import native

_MIXER, _FEED_FORWARD = len(MixerWeights._fields), len(FeedForwardWeights._fields)
_WEIGHTS = _MIXER + _FEED_FORWARD


def transformer_block(
    x: Tensor,
    mixer: MixerWeights,
    feed_forward: FeedForwardWeights,
    norm1_eps: float = 1e-5,
    bn_eps: float = 1e-5,
    norm2_eps: float = 1e-5,
) -> Tensor:
    r"""A whole MIRAGE block, as ``mirage.blocks.TransformerBlock`` in eval mode.

    .. math::
        y = \mathrm{feed\_forward\_stage}(\mathrm{mixer\_stage}(x))

    On the C++ library, where no gradient is wanted, it is one operator: the sum between the halves is written over, and
    the statistics that a backward pass would need are not kept. Elsewhere it is the two operators
    :func:`mirage_kernels.mixer_stage` and :func:`mirage_kernels.feed_forward_stage`, with their gradients.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides. Under autocast it is rounded to its dtype.
        mixer: See :class:`mirage_kernels.MixerWeights`; floating point, of any dtype. The batch norm uses the running
            statistics among them.
        feed_forward: See :class:`mirage_kernels.FeedForwardWeights`; floating point, of any dtype.
        norm1_eps, bn_eps, norm2_eps: Added to the variances.

    Returns:
        [B, C, H, W], contiguous, of the dtype of `x` (of autocast's under autocast).

    Raises:
        TypeError, ValueError: naming the argument or weight that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    if torch.compiler.is_compiling():
        _check(x, mixer, feed_forward)
        return _run(x, mixer, feed_forward, norm1_eps, bn_eps, norm2_eps)
    # Kernels refuse what does not fit. Only then is it worth the time to find out what, for every call is a block.
    try:
        return _run(x, mixer, feed_forward, norm1_eps, bn_eps, norm2_eps)
    except Exception:
        _check(x, mixer, feed_forward)
        raise


def _run(x: Tensor, mixer: MixerWeights, feed_forward: FeedForwardWeights, *eps: float) -> Tensor:
    if type(mixer) is not MixerWeights or type(feed_forward) is not FeedForwardWeights:
        _check(x, mixer, feed_forward)
    impl = _stage.choose("transformer_block", x)
    if impl == "cpp" and not _wants_gradient(x, *mixer, *feed_forward):
        return _forward_op(x, *mixer, *feed_forward, *eps)
    if not torch.compiler.is_compiling():
        _dispatch.record("transformer_block", impl)
    norm1_eps, bn_eps, norm2_eps = eps
    middle = mixer_op.mixer_stage(x, mixer, None, False, norm1_eps, bn_eps).y
    return feed_forward_op.feed_forward_stage(middle, *feed_forward, norm2_eps)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check(x: Tensor, mixer: MixerWeights, feed_forward: FeedForwardWeights) -> None:
    if not isinstance(mixer, MixerWeights):
        raise TypeError(f"mixer: expected MixerWeights, got {type(mixer).__name__}")
    mixer_op.check(x, mixer)
    if not isinstance(feed_forward, FeedForwardWeights):
        raise TypeError(f"feed_forward: expected FeedForwardWeights, got {type(feed_forward).__name__}")
    feed_forward_op.check(x, feed_forward)


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    _dispatch.record("transformer_block", "cpp")
    return native.forward(x, arguments[:_MIXER], arguments[_MIXER:_WEIGHTS], *arguments[_WEIGHTS:])


def _forward_fake(x: Tensor, *arguments: Any) -> Tensor:
    if not isinstance(x, FakeTensor) and x.device.type != "meta":  # a weight is, or this would not have been called
        raise ValueError(f"weights: expected tensors on {x.device} like x, got some on the meta device")
    return x.new_empty(x.shape)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _autograd(ctx: Any, grad_y: Tensor) -> Any:
    raise NotImplementedError(
        "mirage_kernels::transformer_block has no gradient; the function mirage_kernels.transformer_block has, and "
        "calls it where none is wanted"
    )


_TENSORS = [f"Tensor {name}" for name in MixerWeights._fields]
_TENSORS += [f"Tensor ffn_{name}" for name in FeedForwardWeights._fields]
_forward_op = define(
    "transformer_block",
    f"(Tensor x, {', '.join(_TENSORS)}, float norm1_eps, float bn_eps, float norm2_eps) -> Tensor",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_keep_nothing,
    autocast=(0,),
)


@register_flop_formula(torch.ops.mirage_kernels.transformer_block)
def _flops(x: Any, *arguments: Any, **kwargs: Any) -> int:
    """Of both stages."""
    mixer, feed_forward = arguments[:_MIXER], arguments[_MIXER:_WEIGHTS]
    return mixer_op.flops(x, *mixer) + feed_forward_op.flops(x, *feed_forward)
