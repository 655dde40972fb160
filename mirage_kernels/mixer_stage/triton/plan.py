"""Sizes of ``mixer_stage``'s Triton launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mirage_kernels._runtime.library import is_exact
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import is_flat_plane, needs_int64
from mirage_kernels._triton.tiles import filling_run, precision
from mirage_kernels.mixer_stage.weights import MixerWeights

MOST_CHANNELS, MOST_WITHOUT_TENSOR_CORES, MOST_OF_A_HEAD = 384, 96, 32
"""Limits on channels: of x, because a program holds a branch, a third of them, for all its pixels (without tensor cores
in registers); and of a head, because a program holds its products of q and k."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the launches for one x."""

    branch: int
    heads: int
    block_c: int  # channels of x, as a power of two that `tl.dot` takes, and those of a branch
    block_b: int
    block_n: int  # pixels of a program that walks along the rows
    precision: str
    wide: bool  # 64-bit offsets

    @property
    def d(self) -> int:
        return self.branch // self.heads

    def channels(self) -> dict[str, Any]:
        return {"BRANCH": self.branch, "BLOCK_C": self.block_c, "BLOCK_B": self.block_b}

    def rows(self, x: Tensor) -> dict[str, Any]:
        return {**self.channels(), "BLOCK_N": self.block_n, "LINE": is_flat_plane(x), "INT64": self.wide}


def plan_of(x: Tensor, w: MixerWeights) -> Plan:
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    branch, hidden = channels // 3, w.gic2.shape[1]
    block_c, block_b = (max(16, next_power_of_2(n)) for n in (channels, channels // 3))
    block_n = 64 if block_c <= 128 else 32
    most = x.shape[0] * pixels * max(channels, 2 * hidden - branch)  # of a map; backward writes those of gic1's rows
    wide = needs_int64(x) or most > 2**31 - 1
    heads = w.temperature.shape[0]
    return Plan(branch, heads, block_c, block_b, filling_run(x, block_n), precision(x.dtype), wide)


def forward_problem(x: Tensor, w: MixerWeights) -> str:
    """Why the kernels do not take such a call: they hold the channels of a pixel and of a head, and there are some."""
    branch, heads = x.shape[1] // 3, w.temperature.shape[0]
    most = MOST_WITHOUT_TENSOR_CORES if is_exact(x.dtype) else MOST_CHANNELS
    if x.numel() == 0:
        return "x has no elements"
    if branch * 3 > most:
        return f"its kernels hold up to {most} channels of x in {x.dtype}, not {x.shape[1]}"
    if branch // heads > MOST_OF_A_HEAD:
        return f"its kernels hold up to {MOST_OF_A_HEAD} channels of a head, not {branch // heads}"
    return ""


backward_problem = forward_problem
