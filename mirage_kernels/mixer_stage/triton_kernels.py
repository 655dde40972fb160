"""``mixer_stage`` forward in Triton: four kernels, three more in training (`triton_branches`; the last of them here).

The last holds a tile of the image: of its x, detail and v it computes the three branches, their fusion and the sum.
Gate, identity, the MLP's hidden channels and the branches are never in memory; what they are made of is read again.
Backward is in `triton_backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton import tiles as triton_tiles
from mirage_kernels._triton.cases import HEADS, meta, stage_variants
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import launch, plane_strides, widened
from mirage_kernels._triton.tiles import (
    depthwise,
    filling_tile,
    image_tile,
    image_tile_of,
    matrix,
    moments,
    normalised,
)
from mirage_kernels.channel_attention.arguments import small_matrices
from mirage_kernels.channel_attention.triton_parts import small_options
from mirage_kernels.mixer_stage.composite import Statistics
from mirage_kernels.mixer_stage.triton_backward import backward
from mirage_kernels.mixer_stage.triton_branches import (
    batch_moments_kernel,
    gram_kernel,
    merge_moments_kernel,
    moments_kernel,
    statistics_kernel,
)
from mirage_kernels.mixer_stage.triton_parts import batch_normalised, gated_sum, head_matrices, pixel_mlp
from mirage_kernels.mixer_stage.triton_plan import Plan, can_run, plan_of, prepare
from mirage_kernels.mixer_stage.weights import TAPS, MixerWeights, shapes
from mirage_kernels.tri_branch_fusion.triton_kernels import fuse

__all__ = ["backward", "can_run", "forward", "triton_cases"]

MOST_PARTS = 1024
"""Of a sample's sums, which each program that generates kernels adds up; of more PyTorch's reduction is faster."""


@triton.jit
def _finish_kernel(
    p_x,  # [B, 3 c, H, W], any strides
    p_norm_weight,  # [3 c], like the next
    p_norm_bias,
    p_qkv,  # [B, 3 c, H, W], contiguous, of which v is read
    p_qkv_taps,  # [3 c, 9]
    p_matrices,  # [B, heads, 2 d + 2, d], of which attn comes first
    p_detail,  # [B, c, H, W], contiguous
    p_kernels,  # [B, c, 49]
    p_bn_mean,  # [c], like the next three
    p_bn_var,
    p_bn_weight,
    p_bn_bias,
    p_gic1,  # [2 h, c]
    p_gate_temperature,  # [1]
    p_gic2,  # [c, h]
    p_branch_scale,  # [B]; only with SCALE
    p_proj_out,  # [c, c]
    p_mlp_in,  # [2 c, c]
    p_mlp_out,  # [c, 2 c]
    p_la,  # [1], like the next two
    p_lg,
    p_lm,
    p_project_out,  # [3 c, 3 c]
    p_y,  # [B, 3 c, H, W], contiguous
    norm_eps,
    bn_eps,
    H,
    W,
    HEADS,
    HIDDEN,  # h
    s_b,
    s_c,
    s_row,
    s_pixel,
    BRANCH: tl.constexpr,  # c
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SCALE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0)
    if INT64:
        i_tile = i_tile.to(tl.int64)
    i_b, o_y, o_x = image_tile_of(i_tile, H, W, BLOCK_H, BLOCK_W)
    m_n = (o_y < H) & (o_x < W)
    o_n = o_y * s_row + o_x * s_pixel
    dtype = p_y.dtype.element_ty
    p_x += i_b * s_b
    o_c = widened(tl.arange(0, BLOCK_C), INT64)
    b_mean, b_rstd = moments(p_x, o_c, o_n, s_c, m_n, norm_eps, 3 * BRANCH)
    o_b = widened(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH

    b_g = normalised(p_x, p_norm_weight, p_norm_bias, BRANCH + o_b, m_b, o_n, s_c, m_n, b_mean, b_rstd)
    b_in = batch_normalised(b_g, p_bn_mean, p_bn_var, p_bn_weight, p_bn_bias, o_b, m_b, bn_eps).to(dtype)
    p_plane, p_taps = p_detail + i_b * BRANCH * H * W, p_kernels + i_b * BRANCH * 49
    b_mixed = gated_sum(b_in, p_plane, p_taps, p_gic1, p_gate_temperature, p_gic2, o_b, m_b, o_y, o_x, H, W,
                        HIDDEN, BRANCH, BLOCK_K, INT64, PRECISION)  # fmt: skip
    if SCALE:
        b_mixed *= tl.load(p_branch_scale + i_b).to(tl.float32)
    b_proj = matrix(p_proj_out, o_b, m_b, o_b, m_b, BRANCH).to(dtype)
    b_g = tl.dot(b_proj, (b_mixed + b_g).to(dtype), input_precision=PRECISION)

    b_in = normalised(p_x, p_norm_weight, p_norm_bias, 2 * BRANCH + o_b, m_b, o_n, s_c, m_n, b_mean, b_rstd).to(dtype)
    b_m = pixel_mlp(b_in, p_mlp_in, p_mlp_out, o_b, m_b, BRANCH, BLOCK_K, PRECISION)

    # the attention: all heads as one matrix, zero where row and column are not of the same
    b_a = tl.zeros([BLOCK_B, BLOCK_H * BLOCK_W], tl.float32)
    p_plane = p_qkv + (i_b * 3 + 2) * BRANCH * H * W
    for i_k in range(0, BRANCH, BLOCK_K):
        o_k = widened(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < BRANCH
        b_v = depthwise(p_plane, p_qkv_taps + 2 * BRANCH * 9, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 3).to(dtype)
        p_attn, m = head_matrices(p_matrices, i_b, o_b, m_b, o_k, m_k, HEADS, (2 * D + 2) * D, D)
        b_a = tl.dot(tl.load(p_attn, mask=m, other=0.0).to(dtype), b_v, b_a, input_precision=PRECISION)

    l_a, l_g, l_m = tl.load(p_la).to(tl.float32), tl.load(p_lg).to(tl.float32), tl.load(p_lm).to(tl.float32)
    b_a, b_g, b_m = fuse(b_a, b_g, b_m, l_a, l_g, l_m)
    b_a, b_g, b_m = b_a.to(dtype), b_g.to(dtype), b_m.to(dtype)
    for i_k in range(0, 3 * BRANCH, BLOCK_K):
        o_k = widened(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < 3 * BRANCH
        m = m_k[:, None] & m_n[None, :]
        b_y = tl.load(p_x + o_k[:, None] * s_c + o_n[None, :], mask=m, other=0.0).to(tl.float32)
        b_w = matrix(p_project_out, o_k, m_k, o_b, m_b, 3 * BRANCH).to(dtype)
        b_y = tl.dot(b_w, b_a, b_y, input_precision=PRECISION)
        b_w = matrix(p_project_out + BRANCH, o_k, m_k, o_b, m_b, 3 * BRANCH).to(dtype)
        b_y = tl.dot(b_w, b_g, b_y, input_precision=PRECISION)
        b_w = matrix(p_project_out + 2 * BRANCH, o_k, m_k, o_b, m_b, 3 * BRANCH).to(dtype)
        b_y = tl.dot(b_w, b_m, b_y, input_precision=PRECISION)
        o_out = (i_b * 3 * BRANCH + o_k[:, None]) * H * W + (o_y * W + o_x)[None, :]
        tl.store(p_y + o_out, b_y.to(dtype), mask=m)


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
        *(x, w.norm_weight.contiguous(), w.norm_bias.contiguous(), sums, norm_eps, pixels, width, *plane_strides(x)),
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
        _finish_kernel,
        image.programs(x),
        x.device,
        *(x, w.norm_weight, w.norm_bias, qkv, w.qkv_dwconv, statistics.attention, detail, statistics.kernels),
        *(mean, var, w.bn_weight, w.bn_bias, w.gic1, w.gate_temperature, w.gic2),
        *(x if branch_scale is None else branch_scale.contiguous(), w.proj_out, w.mlp_in, w.mlp_out),
        *(w.alpha_att, w.alpha_conv, w.alpha_mlp, w.project_out, y, norm_eps, bn_eps, *x.shape[2:]),
        *(plan.heads, w.gic2.shape[1], *x.stride()),
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
        *(qkv, taps, parts, height, width, plan.heads, splits, per_split),
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
        *(products, w.temperature, matrices, sums, mean, var, w.bn_weight, w.bn_bias, w.gic1[-branch:]),
        *(w.generator_in, w.generator_out, kernels, branch_mean, batch_mean, batch_var),
        *(bn_eps, pixels, sums.shape[1], plan.heads, products.shape[2], heads_of_all),
        BRANCH=branch,
        BLOCK_B=plan.block_b,
        BLOCK_R=rows,
        BLOCK_P=rows,
        **small_options(max(16, next_power_of_2(plan.d)), plan.d),
    )
    return Statistics(matrices, kernels, branch_mean, batch_mean, batch_var)


def triton_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_triton.py compiles for GPUs that are not there."""
    for label, (channels, side), dtype, wide in stage_variants():
        x, heads = meta(1, channels, side, side, dtype=dtype, wide=wide), HEADS[channels, side]
        if can_run(x, heads):
            yield label, partial(_compile, x, heads)
    yield "float32 training C=48 112x112", partial(_compile, meta(2, 48, 112, 112), 2, training=True)


def _compile(x: Tensor, heads: int, training: bool = False) -> None:
    """Forward on x and weights of its dtype, and backward."""
    sizes = shapes(x.shape[1], heads, int(8 / 3 * (x.shape[1] // 3)))
    weights = MixerWeights(**{name: meta(*size, dtype=x.dtype) for name, size in sizes.items()})
    scale = meta(x.shape[0], dtype=x.dtype) if training else None
    _, statistics = forward(x, weights, scale, training, 1e-5, 1e-5)
    backward(x, x, weights, scale, statistics, training, 1e-5, 1e-5)
