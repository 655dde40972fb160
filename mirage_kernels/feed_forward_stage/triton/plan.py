"""Sizes of ``feed_forward_stage``'s Triton launches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mirage_kernels._runtime.library import is_exact
from mirage_kernels._triton import tiles as triton_tiles
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.tiles import ImageTile, filling_tile

MOST_CHANNELS = 256
"""The limit on channels of x: a program holds the sums of all of them for its pixels."""
MOST_WITHOUT_TENSOR_CORES = 128
"""The limit in backward where operands of products are in registers: with more channels they spill."""


@dataclass(frozen=True)
class ExpandTile:
    """A program of the first kernel: `block_n` pixels, `block_m` hidden channels at a time from `block_k` of x."""

    block_c: int  # channels of x, as a power of two that `tl.dot` takes
    block_k: int
    block_m: int
    block_n: int


def expand_tile(channels: int, exact: bool) -> ExpandTile:
    """`exact`: float32 products without tensor cores, whose operands lie in registers."""
    block_c = max(16, next_power_of_2(channels))
    if exact:
        return ExpandTile(block_c, 16, 32, 64 if block_c <= 128 else 32)
    return ExpandTile(block_c, min(64, block_c), 64, 64 if block_c <= 128 else 32)


def contract_tile(x: Tensor) -> ImageTile:
    return filling_tile(x, 64 if x.shape[1] <= 128 else 32)


def most_pixels(block_c: int, exact: bool) -> int:
    """Pixels of a program that holds `block_c` channels of each; without tensor cores operands are in registers."""
    return 64 if block_c <= (64 if exact else 128) else 32


def forward_problem(x: Tensor, project_out: Tensor, keep_hidden: bool, other: str = "") -> str:
    """Why the kernels do not take such a call: they hold a pixel's channels, and want about a program of the second
    kernel for each multiprocessor. `other`: what `beyond_mirage` says of the stage."""
    if other:
        return other
    if keep_hidden:
        return "its kernels keep no hidden tensor from forward to backward"
    if x.shape[1] > MOST_CHANNELS:
        return f"its kernels hold up to {MOST_CHANNELS} channels of x, not {x.shape[1]}"
    if 2 * contract_tile(x).programs(x) < triton_tiles.FILL:
        return f"its kernels want an image that fills a GPU, not {x.shape[0]} of {x.shape[2]} x {x.shape[3]} pixels"
    return ""


def backward_problem(x: Tensor, project_out: Tensor, keep_hidden: bool, other: str = "") -> str:
    problem = forward_problem(x, project_out, keep_hidden, other)
    if not problem and x.shape[1] > MOST_WITHOUT_TENSOR_CORES and is_exact(x.dtype):
        return f"without tensor cores its backward holds up to {MOST_WITHOUT_TENSOR_CORES} channels, not {x.shape[1]}"
    return problem
