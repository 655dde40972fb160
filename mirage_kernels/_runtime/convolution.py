"""Convolutions of x with a weight: what their operators share from the registered operator down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mirage_kernels._runtime import dispatch
from mirage_kernels._runtime.library import define

__all__ = ["define_convolution"]


def define_convolution(
    name: str,
    implementations: Mapping[str, ModuleType],
    shape: Callable[[Tensor, Tensor], Sequence[int]],
    reference: Callable[[Tensor, Tensor], Tensor],
) -> torch._ops.OpOverload:
    """Register ``mirage_kernels::<name>(Tensor x, Tensor weight, str impl) -> Tensor`` and its backward pass, which
    computes the gradients that are wanted.

    Args:
        implementations: each has ``forward(x, weight)`` and ``backward(grad_y, x, weight, want_x, want_weight)``, which
            returns tensors of shape [0] for gradients that are not wanted.
        shape: of the result, from x and the weight.
        reference: the same of PyTorch's operators.

    Returns:
        The operator; autocast rounds x and the weight.
    """

    def forward(x: Tensor, weight: Tensor, impl: str) -> Tensor:
        dispatch.record(name, impl)
        return implementations[impl].forward(x, weight)

    def forward_fake(x: Tensor, weight: Tensor, impl: str) -> Tensor:
        return x.new_empty(shape(x, weight))

    def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, impl: str
    ) -> tuple[Tensor, Tensor]:
        return implementations[impl].backward(grad_y, x, weight, want_x, want_weight)

    def backward_fake(
        grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, impl: str
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape if want_x else 0), weight.new_empty(weight.shape if want_weight else 0)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.impl = inputs
        ctx.save_for_backward(x, weight)

    def autograd(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        want_x, want_weight, *_ = ctx.needs_input_grad
        grad_x, grad_weight = backward_op(grad_y, x, weight, want_x, want_weight, ctx.impl)
        return grad_x if want_x else None, grad_weight if want_weight else None, None

    backward_op = define(
        f"{name}_backward",
        "(Tensor grad_y, Tensor x, Tensor weight, bool want_x, bool want_weight, str impl) -> (Tensor, Tensor)",
        backward,
        backward_fake,
    )
    return define(
        name,
        "(Tensor x, Tensor weight, str impl) -> Tensor",
        forward,
        forward_fake,
        backward=autograd,
        setup_context=setup_context,
        autocast=(0, 1),
        plain=lambda *args: reference(*args[:-1]),
    )
