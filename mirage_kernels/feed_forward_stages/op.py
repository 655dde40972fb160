"""The public function ``feed_forward_stages`` and its registration with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import define, fake_like_x, run_or_explain, wants_gradient
from mirage_kernels.feed_forward_stage import cases as stage_cases
from mirage_kernels.feed_forward_stage import op as stage_op
from mirage_kernels.feed_forward_stage.weights import COUNT, FeedForwardWeights, Form
from mirage_kernels.feed_forward_stages import cpp
from mirage_kernels.feed_forward_stages.cases import CASES
from mirage_kernels.feed_forward_stages.reference import feed_forward_stages as reference
from mirage_kernels.feed_forward_stages.weights import (
    TENSORS,
    ScaledFeedForward,
    folded,
    packed,
    unpacked,
    with_absent,
)


def feed_forward_stages(
    x: Tensor,
    stages: Sequence[ScaledFeedForward],
    keep_hidden: bool = False,
    *,
    norm: str = "centred",
    activation: str = "gelu",
    gate: str = "gelu",
) -> Tensor:
    r"""Feed-forward stages one after the other, what each adds to its input multiplied by a number for each channel.

    .. math::
        x_{i + 1} = x_i + \beta_i \odot (\mathrm{feed\_forward\_stage}_i(x_i) - x_i)

    The two halves of a block of NAFNet are such stages, and so are all blocks of one of its levels. On the C++ library,
    where no gradient is wanted, they are one operator: what is added is scaled as it is added, and a stage without
    `excite` is written over the result of the one before. Elsewhere each is
    :func:`mirage_kernels.feed_forward_stage`, whose `project_out` takes the scale in.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides. Under autocast it is rounded to its dtype.
        stages: Of C channels each, at least one. See :class:`mirage_kernels.ScaledFeedForward`; weights and scales are
            floating point, of any dtype, and each has its gradient in its own.
        keep_hidden, norm, activation, gate: Of all stages, as in :func:`mirage_kernels.feed_forward_stage`.

    Returns:
        [B, C, H, W] of the dtype of `x` (of autocast's under autocast); in channels_last where `x` is, else contiguous.

    Raises:
        TypeError, ValueError: naming the argument or weight that has the wrong type, dtype, shape, device or value.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    form = norm, activation, gate
    _check_stages(stages)
    return run_or_explain(lambda: _run(x, stages, keep_hidden, form), lambda: _check(x, stages, form))


def _run(x: Tensor, stages: Sequence[ScaledFeedForward], keep_hidden: bool, form: tuple[str, str, str]) -> Tensor:
    impl = dispatch.choose("feed_forward_stages", x, otherwise="composite")
    if impl == "cpp":
        tensors, present, eps = packed(stages)
        if not wants_gradient(x, *tensors):
            return _composite.laid_out_like(_forward_op(x, tensors, present, eps, *form, impl), x)
    if not torch.compiler.is_compiling():
        dispatch.record("feed_forward_stages", impl)
    norm, activation, gate = form
    y = x.contiguous() if impl != "torch" and _composite.is_channels_last(x) else x
    for stage in stages:
        if stage.scale is not None:  # a product with it would make other weights fit
            stage_op.check(x, stage.weights, Form(stage.eps, *form))
            _check_scale(x, stage.scale)
        of_stage = {"norm": norm, "activation": activation, "gate": gate}
        y = stage_op.feed_forward_stage(y, *folded(stage), eps=stage.eps, keep_hidden=keep_hidden, **of_stage)
    return _composite.laid_out_like(y, x)


def _check_stages(stages: Sequence[ScaledFeedForward]) -> None:
    if len(stages) == 0:
        raise ValueError("stages: expected at least one, got none")
    for stage in stages:
        if not isinstance(stage, ScaledFeedForward):
            raise TypeError(f"stages: expected ScaledFeedForward, got {type(stage).__name__}")
        if not isinstance(stage.weights, FeedForwardWeights):
            raise TypeError(f"weights: expected FeedForwardWeights, got {type(stage.weights).__name__}")


def _check(x: Tensor, stages: Sequence[ScaledFeedForward], form: tuple[str, str, str]) -> None:
    """Raise what the function raises of arguments that do not fit."""
    for weights, eps, scale in stages:
        stage_op.check(x, weights, Form(eps, *form))
        if scale is not None:
            _check_scale(x, scale)


def _check_scale(x: Tensor, scale: Tensor) -> None:
    checks.check_tensor("scale", scale)
    if scale.numel() != x.shape[1]:
        raise ValueError(f"scale: expected {x.shape[1]} elements (C channels of x), got {list(scale.shape)}")
    checks.check_same_device("x", x, scale=scale)


def _forward(x: Tensor, tensors: Sequence[Tensor], present: Sequence[int], eps: Sequence[float], *rest: str) -> Tensor:
    *form, impl = rest
    dispatch.record("feed_forward_stages", impl)
    return cpp.forward(x, tensors, present, eps, *form)


def _in_turn(x: Tensor, tensors: Sequence[Tensor], present: Sequence[int], eps: Sequence[float], *rest: str) -> Tensor:
    """The same of the stage's operator."""
    *form, impl = rest
    for stage in unpacked(tensors, present, eps):
        x = stage_op._forward_op(x, *folded(stage), *Form(stage.eps, *form), False, impl)[0]
    return x


def _plain(*args: Any) -> Tensor:
    return _in_turn(*args[:-1], "composite")


_forward_op = define(
    "feed_forward_stages",
    "(Tensor x, Tensor[] weights, int[] present, float[] eps, str norm, str activation, str gate, str impl) -> Tensor",
    _forward,
    fake_like_x,
    autocast=(0,),
    plain=_plain,
    differentiable=_in_turn,
)


def _flops(x: Any, tensors: Any, present: Any, *_: Any) -> int:
    every = with_absent(tensors, present)
    return sum(stage_cases.flops(x, *every[i : i + COUNT]) for i in range(0, len(every), TENSORS))


register_flops("feed_forward_stages", _flops)
register(CASES, feed_forward_stages, reference)
