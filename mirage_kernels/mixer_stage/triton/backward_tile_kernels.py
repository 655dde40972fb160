"""The kernels of ``mixer_stage``'s backward that work on a tile of the image, in the order in which they run.

All maps but x and the gradient of y are contiguous, of the dtype of x. What one kernel writes for the product that
gives a weight's gradient (`mirage_kernels._triton.weight_gradient`) is listed with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirage_kernels._triton.launch import gelu, gelu_slope, index_dtype
from mirage_kernels._triton.tiles import depthwise, image_tile_of, matrix
from mirage_kernels.channel_attention.triton.device import load_matrix
from mirage_kernels.mixer_stage.triton.device import batch_normalised, gated_sum, head_matrices, pixel_mlp
from mirage_kernels.tri_branch_fusion.triton import fuse, fuse_backward


@triton.jit
def fusion_gradient_kernel(
    p_normal,  # [B, 3 c, N], the layer norm's output
    p_qkv,  # [B, 3 c, N], of which v is read
    p_qkv_taps,  # [3 c, 9]
    p_matrices,  # [B, heads, 2 d + 2, d], of which attn comes first
    p_detail,  # [B, c, N]
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
    p_alpha_att,  # [1], like the next two
    p_alpha_conv,
    p_alpha_mlp,
    p_project_out,  # [3 c, 3 c]
    p_grad_y,  # [B, 3 c, N]
    p_fused,  # [B, 3 c, N]: what project_out multiplied
    p_total,  # [B, c, N]: what proj_out multiplied
    p_grad_conv,  # [B, c, N]: of proj_out's output
    p_grad_mlp,  # [B, c, N]: of mlp_out's output
    p_grad_qkv,  # [B, 3 c, N]: its last third, of v after the depthwise convolution
    p_grad_attn,  # [B, heads, tiles, d, d], a part for each tile
    p_grad_alphas,  # [B * tiles, 3]
    bn_eps,
    H,
    W,
    HEADS,
    HIDDEN,  # h
    tiles,  # of a sample
    BRANCH: tl.constexpr,  # c
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SCALE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradient of y to those of the three branches, which are computed again."""
    i_tile = tl.program_id(0)
    if INT64:
        i_tile = i_tile.to(tl.int64)
    i_b, o_y, o_x = image_tile_of(i_tile, H, W, BLOCK_H, BLOCK_W)
    m_n = (o_y < H) & (o_x < W)
    o_n = o_y * W + o_x
    dtype = p_fused.dtype.element_ty
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH
    m = m_b[:, None] & m_n[None, :]
    o_map = o_b[:, None] * H * W + o_n[None, :]
    plane = index_dtype(BRANCH, INT64) * H * W  # of a branch

    p_n = p_normal + i_b * 3 * plane + o_map
    b_g = tl.load(p_n + plane, mask=m, other=0.0).to(tl.float32)
    b_in = batch_normalised(b_g, p_bn_mean, p_bn_var, p_bn_weight, p_bn_bias, o_b, m_b, bn_eps).to(dtype)
    b_mixed = gated_sum(b_in, p_detail + i_b * plane, p_kernels + i_b * BRANCH * 49, p_gic1, p_gate_temperature,
                        p_gic2, o_b, m_b, o_y, o_x, H, W, HIDDEN, BRANCH, BLOCK_K, INT64, PRECISION)  # fmt: skip
    if SCALE:
        b_mixed *= tl.load(p_branch_scale + i_b).to(tl.float32)
    b_total = (b_mixed + b_g).to(dtype)
    tl.store(p_total + i_b * plane + o_map, b_total, mask=m)
    b_g = tl.dot(matrix(p_proj_out, o_b, m_b, o_b, m_b, BRANCH).to(dtype), b_total, input_precision=PRECISION)

    b_in = tl.load(p_n + 2 * plane, mask=m, other=0.0)
    b_m = pixel_mlp(b_in, p_mlp_in, p_mlp_out, o_b, m_b, BRANCH, BLOCK_K, PRECISION)

    p_v = p_qkv + (i_b * 3 + 2) * plane
    b_v = depthwise(p_v, p_qkv_taps + 2 * BRANCH * 9, o_b, m_b, o_y, o_x, H, W, H * W, W, 1, 3)
    b_v = tl.where(m, b_v, 0.0).to(dtype)
    p_attn, m_heads = head_matrices(p_matrices, i_b, o_b, m_b, o_b, m_b, HEADS, (2 * D + 2) * D, D)
    b_attn = tl.load(p_attn, mask=m_heads, other=0.0).to(dtype)
    b_a = tl.dot(b_attn, b_v, input_precision=PRECISION)

    l_a, l_g = tl.load(p_alpha_att).to(tl.float32), tl.load(p_alpha_conv).to(tl.float32)
    l_m = tl.load(p_alpha_mlp).to(tl.float32)
    b_ya, b_yg, b_ym = fuse(b_a, b_g, b_m, l_a, l_g, l_m)
    p_out = p_fused + i_b * 3 * plane + o_map
    tl.store(p_out, b_ya.to(dtype), mask=m)
    tl.store(p_out + plane, b_yg.to(dtype), mask=m)
    tl.store(p_out + 2 * plane, b_ym.to(dtype), mask=m)

    b_da = tl.zeros([BLOCK_B, BLOCK_H * BLOCK_W], tl.float32)
    b_dg = tl.zeros([BLOCK_B, BLOCK_H * BLOCK_W], tl.float32)
    b_dm = tl.zeros([BLOCK_B, BLOCK_H * BLOCK_W], tl.float32)
    for i_k in range(0, 3 * BRANCH, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < 3 * BRANCH
        p_grad = p_grad_y + i_b * 3 * plane + o_k[:, None] * H * W + o_n[None, :]
        b_d = tl.load(p_grad, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_w = tl.trans(matrix(p_project_out, o_k, m_k, o_b, m_b, 3 * BRANCH)).to(dtype)
        b_da = tl.dot(b_w, b_d, b_da, input_precision=PRECISION)
        b_w = tl.trans(matrix(p_project_out + BRANCH, o_k, m_k, o_b, m_b, 3 * BRANCH)).to(dtype)
        b_dg = tl.dot(b_w, b_d, b_dg, input_precision=PRECISION)
        b_w = tl.trans(matrix(p_project_out + 2 * BRANCH, o_k, m_k, o_b, m_b, 3 * BRANCH)).to(dtype)
        b_dm = tl.dot(b_w, b_d, b_dm, input_precision=PRECISION)
    b_da, b_dg, b_dm, b_ta, b_tg, b_tm = fuse_backward(b_a, b_g, b_m, b_da, b_dg, b_dm, l_a, l_g, l_m)
    p_sums = p_grad_alphas + i_tile * 3
    tl.store(p_sums, tl.sum(tl.sum(b_ta, 1), 0))
    tl.store(p_sums + 1, tl.sum(tl.sum(b_tg, 1), 0))
    tl.store(p_sums + 2, tl.sum(tl.sum(b_tm, 1), 0))
    tl.store(p_grad_conv + i_b * plane + o_map, b_dg.to(dtype), mask=m)
    tl.store(p_grad_mlp + i_b * plane + o_map, b_dm.to(dtype), mask=m)

    b_d = tl.where(m, b_da, 0.0).to(dtype)
    b_grad_v = tl.dot(tl.trans(b_attn), b_d, input_precision=PRECISION)
    tl.store(p_grad_qkv + (i_b * 3 + 2) * plane + o_map, b_grad_v.to(dtype), mask=m)
    p_parts, m_heads = head_matrices(
        p_grad_attn + i_tile % tiles * D * D, i_b, o_b, m_b, o_b, m_b, HEADS, tiles * D * D, D
    )
    tl.store(p_parts, tl.dot(b_d, tl.trans(b_v), input_precision=PRECISION), mask=m_heads)


@triton.jit
def gated_gradient_kernel(
    p_normal,  # [B, 3 c, N], of which the second third is read
    p_detail,  # [B, c, N]
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
    p_grad_conv,  # [B, c, N]: of proj_out's output
    p_bn,  # [B, c, N]: what gic1 multiplied
    p_product,  # [B, h, N]: what gic2 multiplied, times the branch's scale
    p_grad_total,  # [B, c, N]: of gic2's output, not yet times that scale, and of the sum with the branch's input
    p_grad_gates,  # [B, 2 h - c, N]: of gic1's first rows, which make gates and identities
    p_grad_bn,  # [B, c, N]: of the batch norm's output, through those rows
    p_grad_content,  # [B, c, N]: of the detail after the generated kernels
    p_grad_temperature,  # [B * tiles]: parts of the gradient of the temperature times itself, negative
    bn_eps,
    H,
    W,
    HIDDEN,  # h
    BRANCH: tl.constexpr,  # c
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SCALE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Through the gated CNN, up to the generated kernels and the batch norm."""
    i_tile = tl.program_id(0)
    if INT64:
        i_tile = i_tile.to(tl.int64)
    i_b, o_y, o_x = image_tile_of(i_tile, H, W, BLOCK_H, BLOCK_W)
    m_n = (o_y < H) & (o_x < W)
    o_n = o_y * W + o_x
    dtype = p_bn.dtype.element_ty
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH
    m = m_b[:, None] & m_n[None, :]
    plane = index_dtype(BRANCH, INT64) * H * W
    o_map = i_b * plane + o_b[:, None] * H * W + o_n[None, :]

    b_n = tl.load(p_normal + o_map + (i_b * 2 + 1) * plane, mask=m, other=0.0).to(tl.float32)
    b_in = batch_normalised(b_n, p_bn_mean, p_bn_var, p_bn_weight, p_bn_bias, o_b, m_b, bn_eps).to(dtype)
    tl.store(p_bn + o_map, b_in, mask=m)
    b_d = tl.load(p_grad_conv + o_map, mask=m, other=0.0)
    b_proj = tl.trans(matrix(p_proj_out, o_b, m_b, o_b, m_b, BRANCH)).to(dtype)
    b_d = tl.dot(b_proj, b_d, input_precision=PRECISION)
    tl.store(p_grad_total + o_map, b_d.to(dtype), mask=m)
    scale = 1.0
    if SCALE:
        scale = tl.load(p_branch_scale + i_b).to(tl.float32)
    b_d = (b_d * scale).to(dtype)

    temperature = tl.load(p_gate_temperature).to(tl.float32)
    identities = HIDDEN - BRANCH
    p_gates = p_grad_gates + (i_b * (HIDDEN + identities) * H) * W + o_n[None, :]
    p_gated = p_product + i_b * HIDDEN * H * W + o_n[None, :]
    b_grad = tl.zeros([BLOCK_B, BLOCK_H * BLOCK_W], tl.float32)
    b_sum = tl.zeros([BLOCK_K, BLOCK_H * BLOCK_W], tl.float32)
    for i_k in range(0, identities, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < identities
        m_out = m_k[:, None] & m_n[None, :]
        b_wg = matrix(p_gic1, o_k, m_k, o_b, m_b, BRANCH).to(dtype)
        b_gate = tl.dot(b_wg, b_in, input_precision=PRECISION) / temperature
        b_wi = matrix(p_gic1, HIDDEN + o_k, m_k, o_b, m_b, BRANCH).to(dtype)
        b_content = tl.dot(b_wi, b_in, input_precision=PRECISION)
        b_w = tl.trans(matrix(p_gic2, o_b, m_b, o_k, m_k, HIDDEN)).to(dtype)
        b_dp = tl.dot(b_w, b_d, input_precision=PRECISION)
        tl.store(p_gated + o_k[:, None] * H * W, (gelu(b_gate) * b_content * scale).to(dtype), mask=m_out)
        b_dg = b_dp * b_content * gelu_slope(b_gate)
        b_sum += b_dg * b_gate
        b_dg = (b_dg / temperature).to(dtype)
        b_dc = (b_dp * gelu(b_gate)).to(dtype)
        tl.store(p_gates + o_k[:, None] * H * W, b_dg, mask=m_out)
        tl.store(p_gates + (HIDDEN + o_k)[:, None] * H * W, b_dc, mask=m_out)
        b_grad = tl.dot(tl.trans(b_wg), b_dg, b_grad, input_precision=PRECISION)
        b_grad = tl.dot(tl.trans(b_wi), b_dc, b_grad, input_precision=PRECISION)
    for i_k in range(0, BRANCH, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < BRANCH
        m_out = m_k[:, None] & m_n[None, :]
        b_wg = matrix(p_gic1, identities + o_k, m_k, o_b, m_b, BRANCH).to(dtype)
        b_gate = tl.dot(b_wg, b_in, input_precision=PRECISION) / temperature
        p_taps = p_kernels + i_b * BRANCH * 49
        b_content = depthwise(p_detail + i_b * plane, p_taps, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 7)
        b_w = tl.trans(matrix(p_gic2, o_b, m_b, identities + o_k, m_k, HIDDEN)).to(dtype)
        b_dp = tl.dot(b_w, b_d, input_precision=PRECISION)
        o_out = (identities + o_k)[:, None] * H * W
        tl.store(p_gated + o_out, (gelu(b_gate) * b_content * scale).to(dtype), mask=m_out)
        b_dg = b_dp * b_content * gelu_slope(b_gate)
        b_sum += tl.where(m_out, b_dg * b_gate, 0.0)
        b_dg = (b_dg / temperature).to(dtype)
        tl.store(p_gates + o_out, b_dg, mask=m_out)
        p_out = p_grad_content + i_b * plane + o_k[:, None] * H * W + o_n[None, :]
        tl.store(p_out, (b_dp * gelu(b_gate)).to(dtype), mask=m_out)
        b_grad = tl.dot(tl.trans(b_wg), b_dg, b_grad, input_precision=PRECISION)
    tl.store(p_grad_bn + o_map, b_grad.to(dtype), mask=m)
    tl.store(p_grad_temperature + i_tile, tl.sum(tl.sum(b_sum, 1), 0))


@triton.jit
def query_key_gradient_kernel(
    p_qkv,  # [B, 3 c, N]
    p_taps,  # [3 c, 9]
    p_small,  # [B * heads, d + 2, d]: the gradient of q k^T, and what q and k are scaled by in their own gradients
    p_grad_qkv,  # [B, 3 c, N]: its first two thirds, of q and k after the depthwise convolution
    H,
    W,
    HEADS,
    tiles,  # of a sample
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // tiles
    i_b = i_head // HEADS
    _, o_y, o_x = image_tile_of(i_program % tiles, H, W, BLOCK_H, BLOCK_W)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_q = i_head % HEADS * D + index_dtype(o_d, INT64)
    o_k = o_q + HEADS * D
    dtype = p_grad_qkv.dtype.element_ty
    p_sample = p_qkv + i_b * 3 * HEADS * D * H * W
    b_q = depthwise(p_sample, p_taps, o_q, m_d, o_y, o_x, H, W, H * W, W, 1, 3).to(dtype).to(tl.float32)
    b_k = depthwise(p_sample, p_taps, o_k, m_d, o_y, o_x, H, W, H * W, W, 1, 3).to(dtype).to(tl.float32)
    p_in = p_small + i_head * (D + 2) * D
    b_m = load_matrix(p_in, o_d, D)
    b_scale_q = tl.load(p_in + D * D + o_d, mask=m_d, other=0.0)
    b_scale_k = tl.load(p_in + D * D + D + o_d, mask=m_d, other=0.0)
    b_grad_q = tl.dot(b_m, b_k, input_precision=PRECISION) + b_q * b_scale_q[:, None]
    b_grad_k = tl.dot(tl.trans(b_m), b_q, input_precision=PRECISION) + b_k * b_scale_k[:, None]
    m = m_d[:, None] & ((o_y < H) & (o_x < W))[None, :]
    p_out = p_grad_qkv + i_b * 3 * HEADS * D * H * W + (o_y * W + o_x)[None, :]
    tl.store(p_out + o_q[:, None] * H * W, b_grad_q.to(dtype), mask=m)
    tl.store(p_out + o_k[:, None] * H * W, b_grad_k.to(dtype), mask=m)
