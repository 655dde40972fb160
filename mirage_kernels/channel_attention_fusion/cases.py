"""What is true of ``channel_attention_fusion``. A shape is [B, C, H, W, heads]."""

from __future__ import annotations

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape
from mirage_kernels.channel_attention import cases as attention
from mirage_kernels.tri_branch_fusion import cases as fusion


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    _, conv, mlp, *weights = fusion.make(shape[:4], generator)
    return *attention.make(shape, generator), conv, mlp, *weights


flops = attention.flops

CASES = (
    Operator(
        name="channel_attention_fusion",
        arguments=("q", "k", "v", "temperature", "conv", "mlp", "l_att", "l_conv", "l_mlp"),
        make=make,
        shapes=attention.SHAPES,
        empty=attention.EMPTY,
        large=attention.LARGE,
        in_network=attention.in_network,
        flops=flops,
        call=attention.call,
        compiled=attention.COMPILED,
    ),
)
