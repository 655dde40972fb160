"""Sizes of ``mixer_stage``'s Triton launches, and the launch with which forward and backward begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mirage_kernels._runtime.library import is_exact
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import is_line, launch, needs_int64, plane_strides
from mirage_kernels._triton.tiles import filling_run, precision
from mirage_kernels.mixer_stage.triton_branches import prepare_kernel
from mirage_kernels.mixer_stage.weights import MixerWeights

MOST_CHANNELS, MOST_WITHOUT_TENSOR_CORES, MOST_OF_A_HEAD = 384, 96, 32
"""Of x, since a program holds all of a branch, a third of them, for its pixels (without tensor cores in registers); and
of a head, whose products of q and k one holds."""


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
        return {**self.channels(), "BLOCK_N": self.block_n, "LINE": is_line(x), "INT64": self.wide}


def plan_of(x: Tensor, w: MixerWeights) -> Plan:
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    branch, hidden = channels // 3, w.gic2.shape[1]
    block_c, block_b = (max(16, next_power_of_2(n)) for n in (channels, channels // 3))
    block_n = 64 if block_c <= 128 else 32
    most = x.shape[0] * pixels * max(channels, 2 * hidden - branch)  # of a map; backward writes those of gic1's rows
    wide = needs_int64(x) or most > 2**31 - 1
    heads = w.temperature.shape[0]
    return Plan(branch, heads, block_c, block_b, filling_run(x, block_n), precision(x.dtype), wide)


def can_run(x: Tensor, heads: int) -> bool:
    """Whether the kernels hold the channels of a pixel and of a head; and there are pixels."""
    branch = x.shape[1] // 3
    most = MOST_WITHOUT_TENSOR_CORES if is_exact(x.dtype) else MOST_CHANNELS
    return 0 < x.numel() and branch * 3 <= most and branch // heads <= MOST_OF_A_HEAD


def prepare(
    x: Tensor,
    w: MixerWeights,
    sums: Tensor | None,
    mean: Tensor,
    var: Tensor,
    norm_eps: float,
    bn_eps: float,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v before their convolution, the detail before its own, and parts of each sample's sums [B, parts, c]."""
    batch, channels, height, width = x.shape
    pixels = height * width
    blocks = triton.cdiv(pixels, plan.block_n)
    qkv, detail = (x.new_empty(batch, count, height, width) for count in (channels, plan.branch))
    parts = sums if sums is not None else torch.empty(batch, blocks, plan.branch, dtype=torch.float32, device=x.device)
    launch(
        prepare_kernel,
        batch * blocks,
        x.device,
        *(x, w.norm_weight, w.norm_bias, w.qkv, w.gic1[-plan.branch :], mean, var, w.bn_weight, w.bn_bias),
        *(qkv, detail, parts, norm_eps, bn_eps, pixels, width, *plane_strides(x)),
        **plan.rows(x),
        BLOCK_M=32,
        SUMS=sums is None,
        PRECISION=plan.precision,
        num_warps=4 if plan.block_c <= 128 else 8,
        num_stages=1,
    )
    return qkv, detail, parts
