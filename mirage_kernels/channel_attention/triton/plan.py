"""Sizes of the launches of both attention operators.

Sums over the pixels are cut into `splits` per (sample, head), added up in a second kernel: no atomics, the same bits
every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import is_flat_plane, needs_int64, precision_of_widened
from mirage_kernels.channel_attention.reference import NORM_EPS


@dataclass(frozen=True)
class HeadTile:
    """A program that holds the channels of one head for `block_n` neighbouring pixels, `blocks` times over."""

    batch: int
    heads: int
    d: int
    pixels: int
    width: int
    block_d: int  # d, padded to a power of two that tl.dot takes
    block_n: int
    splits: int  # programs per (sample, head)
    blocks: int  # runs of block_n pixels per program
    precision: str  # of tl.dot

    @property
    def programs(self) -> int:
        return self.batch * self.heads * self.splits

    def sizes(self) -> dict[str, int]:
        return {"N": self.pixels, "W": self.width, "HEADS": self.heads, "splits": self.splits, "blocks": self.blocks}

    def options(self, *tensors: Tensor) -> dict[str, Any]:
        """The constexpr arguments; `tensors` are all that the kernel addresses."""
        return {
            "D": self.d,
            "BLOCK_D": self.block_d,
            "BLOCK_N": self.block_n,
            "LINE": all(is_flat_plane(t) for t in tensors),
            "INT64": needs_int64(*tensors),
            "PRECISION": self.precision,
            "num_warps": 4 if self.block_d <= 32 else 8,
            "num_stages": 1,
        }


def head_tile(x: Tensor, heads: int, elements: int = 2048, most_splits: int = 128) -> HeadTile:
    """Tiles of about `elements` values, at most `most_splits` programs per head."""
    batch, channels, height, width = x.shape
    d, pixels = channels // heads, height * width
    block_d = max(16, next_power_of_2(d))
    block_n = max(16, min(128, elements // block_d))
    blocks = triton.cdiv(triton.cdiv(pixels, block_n), most_splits) if pixels else 1
    splits = triton.cdiv(pixels, block_n * blocks)
    precision = precision_of_widened(x.dtype)
    return HeadTile(batch, heads, d, pixels, width, block_d, block_n, splits, blocks, precision)


def small_options(block_d: int, d: int) -> dict[str, Any]:
    """Constants of a program that works on the d x d matrices of a head."""
    block_s = max(1, min(16, 4096 // block_d**2))
    return {"EPS": NORM_EPS, "D": d, "BLOCK_D": block_d, "BLOCK_S": block_s, "num_warps": 4}
