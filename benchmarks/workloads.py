"""What is timed: the operators at the shapes that MIRAGE-T gives them, each beside the PyTorch expression it replaces.

One set-up serves time and floors. Bytes and multiply-adds are the least that the operator's inputs and outputs
demand; `benchmarks.report` divides them by the copy bandwidth and the matrix rate that were measured on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mirage import blocks
from mirage_kernels._runtime.cases import DIMS, Operator, Shape, operators


@dataclass(frozen=True)
class Workload:
    """One operator at one shape of its `cases.py`.

    Attributes:
        shape: what its `make` takes: [B, C, H, W] of its main tensor, and what else there is.
    """

    operator: Operator
    shape: Shape
    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def expression(self) -> Callable[..., Tensor]:
        """The PyTorch expression that the operator replaces: the network's own where the definition is another."""
        return EXPRESSIONS.get(self.operator.name, self.operator.reference)

    def make(self) -> list[Tensor]:
        """The arguments, in float32, on the CPU."""
        return [t.detach() for t in self.operator.inputs(self.shape, torch.float32)]

    def facts(self) -> dict[str, Any]:
        """What floors are made of: bytes in float32, and multiply-adds of forward; backward has twice as many."""
        forward, both = (self.operator.nbytes(self.shape, both) for both in (False, True))
        macs = self.operator.macs(self.shape)
        named = {"operator": self.operator.name, "shape": list(self.shape)}
        return named | {"bytes_forward": forward, "bytes_both": both, "macs_forward": macs}


@cache
def _module(kind: Callable[[int], nn.Module], channels: int) -> nn.Module:
    """Whose weights are arguments of each call."""
    return kind(channels)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    norm = _module(blocks.LayerNorm, x.shape[1])
    return torch.func.functional_call(norm, {"body.weight": weight, "body.bias": bias}, (x,))


def _feed_forward_stage(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *weights: Tensor) -> Tensor:
    ffn = _module(blocks.FeedForward, x.shape[1])
    named = dict(zip((name for name, _ in ffn.named_parameters()), weights, strict=True))
    return x + torch.func.functional_call(ffn, named, (_layer_norm(x, norm_weight, norm_bias),))


EXPRESSIONS = {"channel_layer_norm": _layer_norm, "feed_forward_stage": _feed_forward_stage}


def operator_workloads(size: int) -> list[Workload]:
    """Every operator with a gradient of its own at every shape of MIRAGE-T for an image of size x size.

    `mixer_stage` is timed with the halves of blocks (`stages.py`).
    """
    timed = [op for op in operators() if op.gradients and op.name != "mixer_stage" and not (op.is_stage and op.mode)]
    return [Workload(op, shape) for op in timed for shape in dict.fromkeys(op.in_network(DIMS["tiny"], size))]
