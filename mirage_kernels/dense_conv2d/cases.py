"""What is true of ``dense_conv2d``. A shape is [B, C, H, W, M, K]: M output channels, kernels of K x K."""

from __future__ import annotations

import math
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, pixels, randn

DECLINED = {name: f"dense_conv2d has no kernel in {name}: on GPUs it is cuDNN's" for name in ("triton", "cuda")}


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    *of_x, outputs, size = shape
    x = randn(*of_x, generator=generator)
    weight = randn(outputs, of_x[1], size, size, generator=generator)
    return x, weight / (of_x[1] * size * size) ** 0.5


def in_network(dim: int, size: int) -> list[Shape]:
    """Embedding, output, the first downsampling and the upsamplings; the other downsamplings take the same inputs."""
    places = [(3, dim, 1), (2 * dim, 3, 1), (dim, dim // 2, 1)]
    places += [(2 * dim, 4 * dim, 2), (4 * dim, 8 * dim, 4), (4 * dim, 8 * dim, 8)]
    return [(1, channels, size // scale, size // scale, outputs, 3) for channels, outputs, scale in places]


def flops(x: Shape, weight: Shape, *_: Any) -> int:
    return 2 * pixels(x) * math.prod(weight)


CASES = (
    Operator(
        name="dense_conv2d",
        arguments=("x", "weight"),
        make=make,
        shapes=(
            (2, 6, 9, 13, 10, 3),
            (1, 3, 1, 1, 4, 3),
            (1, 5, 1, 37, 3, 3),
            (2, 2, 19, 1, 7, 3),
            (1, 1, 16, 16, 1, 3),
            (1, 3, 12, 20, 24, 3),
            (1, 24, 20, 12, 3, 3),
            (1, 96, 7, 8, 20, 3),
            (2, 9, 6, 11, 5, 1),
            (1, 2, 1, 1, 8, 1),
            (1, 30, 67, 131, 12, 3),
        ),
        empty=(0, 6, 9, 13, 10, 3),
        large=(1, 2, 1024, 1024, 3, 3),
        in_network=in_network,
        flops=flops,
        declined=DECLINED,
    ),
)
