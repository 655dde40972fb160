"""The launches of ``mixer_stage``'s forward: four, in training seven. The kernels are in `forward_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mirage_kernels._triton import tiles as triton_tiles
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import image_strides, launch, plane_strides, pointers
from mirage_kernels._triton.tiles import filling_tile, image_tile
from mirage_kernels.channel_attention.matrices import small_matrices
from mirage_kernels.channel_attention.triton.plan import small_options
from mirage_kernels.mixer_stage.triton.forward_kernels import (
    batch_moments_kernel,
    finish_kernel,
    gram_kernel,
    merge_moments_kernel,
    moments_kernel,
    prepare_kernel,
    statistics_kernel,
)
from mirage_kernels.mixer_stage.triton.plan import Plan, plan_of
from mirage_kernels.mixer_stage.weights import TAPS, MixerWeights, Statistics

MOST_PARTS = 1024
"""Programs that generate kernels add up a sample's partial sums; of more than these PyTorch's reduction is faster."""


def forward(
    x: Tensor,
    w: MixerWeights,
    branch_scale: Tensor | None,
    training: bool,
    norm_eps: float,
    bn_eps: float,
) -> tuple[Tensor, Statistics]:
    """y and the statistics, as `composite.forward`."""
    w = MixerWeights(*(t.contiguous() for t in w))
    plan = plan_of(x, w)
    sums, mean, var = _moments(x, w, norm_eps, plan) if training else (None, w.bn_mean, w.bn_var)
    qkv, detail, sums = prepare(x, w, sums, mean, var, norm_eps, bn_eps, plan)
    statistics = _statistics(x, w, qkv, sums, mean, var, bn_eps, plan)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    image = filling_tile(x, 64 if plan.block_b <= 16 else 32)
    launch(
        finish_kernel,
        image.programs(x),
        x.device,
        p_x=x,
        p_qkv=qkv,
        p_qkv_taps=w.qkv_dwconv,
        p_matrices=statistics.attention,
        p_detail=detail,
        p_kernels=statistics.kernels,
        p_bn_mean=mean,
        p_bn_var=var,
        p_branch_scale=x if branch_scale is None else branch_scale.contiguous(),
        **pointers(w, "norm_weight", "norm_bias", "bn_weight", "bn_bias", "gic1", "gate_temperature", "gic2"),
        **pointers(w, "proj_out", "mlp_in", "mlp_out", "alpha_att", "alpha_conv", "alpha_mlp", "project_out"),
        p_y=y,
        norm_eps=norm_eps,
        bn_eps=bn_eps,
        H=x.shape[2],
        W=x.shape[3],
        HEADS=plan.heads,
        HIDDEN=w.gic2.shape[1],
        **image_strides(x),
        **plan.channels(),
        D=plan.d,
        BLOCK_K=16,
        BLOCK_H=image.block_h,
        BLOCK_W=image.block_w,
        SCALE=branch_scale is not None,
        INT64=plan.wide,
        PRECISION=plan.precision,
        num_warps=4 if plan.block_b <= 16 else image.warps(plan.wide),
        num_stages=1,
    )
    return y, statistics


def _moments(x: Tensor, w: MixerWeights, norm_eps: float, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's sums [B, 1, c], and mean and variance of the batch [c], merged from those of blocks of pixels."""
    batch, _, height, width = x.shape
    pixels = height * width
    blocks = triton.cdiv(pixels, plan.block_n)
    sums = torch.empty(batch, blocks, 2, plan.branch, dtype=torch.float32, device=x.device)
    launch(
        moments_kernel,
        batch * blocks,
        x.device,
        p_x=x,
        **pointers(w, "norm_weight", "norm_bias"),
        p_sums=sums,
        norm_eps=norm_eps,
        N=pixels,
        W=width,
        **plane_strides(x),
        **plan.rows(x),
        num_warps=4,
    )
    totals, squares = (sums.new_empty(batch, plan.branch) for _ in range(2))
    sizes = {"BRANCH": plan.branch, "BLOCK_B": plan.block_b, "BLOCK_P": max(1, 2048 // plan.block_b)}
    arguments = (sums, totals, squares, pixels, blocks)
    launch(merge_moments_kernel, batch, x.device, *arguments, **sizes, BLOCK_N=plan.block_n, num_warps=4)
    mean, var = (sums.new_empty(plan.branch) for _ in range(2))
    arguments = (totals, squares, mean, var, batch, float(pixels), float(batch * pixels))
    launch(batch_moments_kernel, 1, x.device, *arguments, **sizes, num_warps=4)
    return totals.unsqueeze(1), mean, var


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
        p_x=x,
        **pointers(w, "norm_weight", "norm_bias", "bn_weight", "bn_bias"),
        p_qkv_weight=w.qkv,
        p_detail_weight=w.gic1[-plan.branch :],
        p_bn_mean=mean,
        p_bn_var=var,
        p_qkv=qkv,
        p_detail=detail,
        p_sums=parts,
        norm_eps=norm_eps,
        bn_eps=bn_eps,
        N=pixels,
        W=width,
        **plane_strides(x),
        **plan.rows(x),
        BLOCK_M=32,
        SUMS=sums is None,
        PRECISION=plan.precision,
        num_warps=4 if plan.block_c <= 128 else 8,
        num_stages=1,
    )
    return qkv, detail, parts


def _gram(x: Tensor, qkv: Tensor, taps: Tensor, plan: Plan) -> Tensor:
    """Parts of the products of q and k, [B, heads, splits, d + 2, d]."""
    image, (batch, _, height, width) = image_tile(x, 64), x.shape
    tiles = image.programs(x[:1])
    per_split = max(1, tiles * batch * plan.heads // (4 * triton_tiles.FILL))
    splits = triton.cdiv(tiles, per_split)
    parts = x.new_empty(batch, plan.heads, splits, plan.d + 2, plan.d, dtype=torch.float32)
    launch(
        gram_kernel,
        batch * plan.heads * splits,
        x.device,
        p_qkv=qkv,
        p_taps=taps,
        p_partial=parts,
        H=height,
        W=width,
        HEADS=plan.heads,
        splits=splits,
        tiles_per_split=per_split,
        D=plan.d,
        BLOCK_D=max(16, next_power_of_2(plan.d)),
        BLOCK_H=image.block_h,
        BLOCK_W=image.block_w,
        INT64=plan.wide,
        PRECISION=plan.precision,
        num_warps=8,
        num_stages=1,
    )
    return parts


def _statistics(
    x: Tensor, w: MixerWeights, qkv: Tensor, sums: Tensor, mean: Tensor, var: Tensor, bn_eps: float, plan: Plan
) -> Statistics:
    batch, branch, pixels = x.shape[0], plan.branch, x.shape[2] * x.shape[3]
    products = _gram(x, qkv, w.qkv_dwconv, plan)
    if sums.shape[1] > MOST_PARTS:
        sums = sums.sum(1, keepdim=True)
    matrices = small_matrices(qkv[:, :branch], plan.heads, torch.float32)
    sizes = (batch, branch, TAPS), (batch, branch), (branch,), (branch,)
    kernels, branch_mean, batch_mean, batch_var = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    rows = max(16, 4096 // plan.block_b)
    heads_of_all = batch * plan.heads
    launch(
        statistics_kernel,
        heads_of_all + batch * triton.cdiv(TAPS * branch, rows),
        x.device,
        p_partial=products,
        **pointers(w, "temperature", "bn_weight", "bn_bias", "generator_in", "generator_out"),
        p_matrices=matrices,
        p_sums=sums,
        p_bn_mean=mean,
        p_bn_var=var,
        p_detail_weight=w.gic1[-branch:],
        p_kernels=kernels,
        p_branch_mean=branch_mean,
        p_batch_mean=batch_mean,
        p_batch_var=batch_var,
        bn_eps=bn_eps,
        N=pixels,
        parts=sums.shape[1],
        HEADS=plan.heads,
        splits=products.shape[2],
        heads_of_all=heads_of_all,
        BRANCH=branch,
        BLOCK_B=plan.block_b,
        BLOCK_R=rows,
        BLOCK_P=rows,
        **small_options(max(16, next_power_of_2(plan.d)), plan.d),
    )
    return Statistics(matrices, kernels, branch_mean, batch_mean, batch_var)
