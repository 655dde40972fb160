"""Launch configurations of the Triton kernels: static, named, chosen by shape bucket (never by timing).

Timing would change results between ranks and cost minutes at first use. Warps and stages measured beforehand are read
from a file (`tuning`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelTile:
    """A program that holds all channels of `block_n` neighbouring pixels."""

    block_c: int  # channels, rounded up to a power of two
    block_n: int  # pixels
    num_warps: int
    num_stages: int = 1


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def channel_tile(channels: int, elements: int = 8192) -> ChannelTile:
    """A tile of about `elements` values: 64 of them per thread at 4 warps, which leaves registers for two tiles."""
    block_c = next_power_of_2(channels)
    block_n = max(16, min(512, elements // block_c))
    return ChannelTile(block_c, block_n, num_warps=4 if block_c * block_n <= 8192 else 8)
