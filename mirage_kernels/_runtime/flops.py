"""FLOPs of registered operators for `torch.utils.flop_counter`, by the formulas of the operators' ``cases.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _both(*arguments: Any) -> int:
    return 2


def register_flops(name: str, flops: Callable[..., int], gradients: Callable[..., int] = _both) -> None:
    """Count ``mirage_kernels::<name>`` by `flops` of the shapes of its arguments, and its backward as the gradients of
    both factors of each product: as often. What backward recomputes is not counted.

    Args:
        gradients: how many of the two a call of backward computes, from its arguments: the gradient of the result, then
            forward's tensors.
    """
    namespace = torch.ops.mirage_kernels

    @register_flop_formula(getattr(namespace, name))
    def forward(*arguments: Any, **_: Any) -> int:
        return flops(*arguments)

    if hasattr(namespace, f"{name}_backward"):

        @register_flop_formula(getattr(namespace, f"{name}_backward"))
        def backward(*arguments: Any, **_: Any) -> int:
            return gradients(*arguments) * flops(*arguments[1:])
