"""``channel_attention_fusion`` in Triton: the pass over v with the fusion of the branches in registers; the passes
over q and k are those of ``channel_attention``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.launch import launch, plane_strides, widened
from mirage_kernels.channel_attention.triton.backward import attention_matrices_backward
from mirage_kernels.channel_attention.triton.device import load_matrix, store_matrix, tile_offsets
from mirage_kernels.channel_attention.triton.forward import attention_matrices
from mirage_kernels.channel_attention.triton.plan import head_tile
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes
from mirage_kernels.tri_branch_fusion.triton import fuse, fuse_backward, scalar_gradients


@triton.jit
def _forward_kernel(
    p_v,  # [B, C, H, W], any strides, like the next two
    p_conv,
    p_mlp,
    p_matrices,  # [B * heads, 2 d + 2, d], of which attn comes first
    p_la,  # [1], like the next two
    p_lg,
    p_lm,
    p_out,  # [B, 3 C, N]
    N,
    W,
    HEADS,
    splits,
    blocks,
    s_b,
    s_c,
    s_row,
    s_pixel,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    sm_b,
    sm_c,
    sm_row,
    sm_pixel,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // splits
    i_b, i_c = i_head // HEADS, i_head % HEADS * D
    o_d = tl.arange(0, BLOCK_D)
    o_n = i_program % splits * BLOCK_N + tl.arange(0, BLOCK_N)  # blocks is 1
    m = (o_d < D)[:, None] & (o_n < N)[None, :]
    o_v = tile_offsets(i_b, i_c, o_d, o_n, W, s_b, s_c, s_row, s_pixel, LINE)
    o_g = tile_offsets(i_b, i_c, o_d, o_n, W, sg_b, sg_c, sg_row, sg_pixel, LINE)
    o_m = tile_offsets(i_b, i_c, o_d, o_n, W, sm_b, sm_c, sm_row, sm_pixel, LINE)
    b_v = tl.load(p_v + o_v, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_conv + o_g, mask=m, other=0.0).to(tl.float32)
    b_m = tl.load(p_mlp + o_m, mask=m, other=0.0).to(tl.float32)
    b_attn = load_matrix(p_matrices + i_head * (2 * D + 2) * D, o_d, D)
    b_a = tl.dot(b_attn, b_v, input_precision=PRECISION)
    l_a, l_g, l_m = tl.load(p_la).to(tl.float32), tl.load(p_lg).to(tl.float32), tl.load(p_lm).to(tl.float32)
    b_a, b_g, b_m = fuse(b_a, b_g, b_m, l_a, l_g, l_m)
    C = widened(HEADS * D, INT64)
    o_out = ((i_b * 3 * C + i_c) + o_d)[:, None] * N + o_n[None, :]
    tl.store(p_out + o_out, b_a.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + o_out + C * N, b_g.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + o_out + 2 * C * N, b_m.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _backward_kernel(
    p_grad,  # [B, 3 C, H, W], any strides
    p_v,  # [B, C, H, W], any strides, like the next two
    p_conv,
    p_mlp,
    p_matrices,  # [B * heads, 2 d + 2, d], of which attn comes first
    p_la,  # [1], like the next two
    p_lg,
    p_lm,
    p_grad_v,  # [B, C, N], like the next two
    p_grad_conv,
    p_grad_mlp,
    p_partial,  # [programs, d, d]: parts of the gradient of attn
    p_partial_l,  # [programs, 3]: parts of those of the three weights
    N,
    W,
    HEADS,
    splits,
    blocks,
    sd_b,
    sd_c,
    sd_row,
    sd_pixel,
    s_b,
    s_c,
    s_row,
    s_pixel,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    sm_b,
    sm_c,
    sm_row,
    sm_pixel,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // splits
    i_b, i_c = i_head // HEADS, i_head % HEADS * D
    i_first = i_program % splits * blocks
    C = widened(HEADS * D, INT64)
    o_d = tl.arange(0, BLOCK_D)
    b_attn = load_matrix(p_matrices + i_head * (2 * D + 2) * D, o_d, D)
    l_a, l_g, l_m = tl.load(p_la).to(tl.float32), tl.load(p_lg).to(tl.float32), tl.load(p_lm).to(tl.float32)
    b_sum = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    b_sum_a = tl.zeros([BLOCK_D], tl.float32)
    b_sum_g = tl.zeros([BLOCK_D], tl.float32)
    b_sum_m = tl.zeros([BLOCK_D], tl.float32)
    for i in range(blocks):
        o_n = (i_first + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = (o_d < D)[:, None] & (o_n < N)[None, :]
        o_v = tile_offsets(i_b, i_c, o_d, o_n, W, s_b, s_c, s_row, s_pixel, LINE)
        o_g = tile_offsets(i_b, i_c, o_d, o_n, W, sg_b, sg_c, sg_row, sg_pixel, LINE)
        o_m = tile_offsets(i_b, i_c, o_d, o_n, W, sm_b, sm_c, sm_row, sm_pixel, LINE)
        o_grad = tile_offsets(i_b, i_c, o_d, o_n, W, sd_b, sd_c, sd_row, sd_pixel, LINE)
        b_v = tl.load(p_v + o_v, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(p_conv + o_g, mask=m, other=0.0).to(tl.float32)
        b_m = tl.load(p_mlp + o_m, mask=m, other=0.0).to(tl.float32)
        b_da = tl.load(p_grad + o_grad, mask=m, other=0.0).to(tl.float32)
        b_dg = tl.load(p_grad + o_grad + C * sd_c, mask=m, other=0.0).to(tl.float32)
        b_dm = tl.load(p_grad + o_grad + 2 * C * sd_c, mask=m, other=0.0).to(tl.float32)
        b_a = tl.dot(b_attn, b_v, input_precision=PRECISION)
        b_a, b_g, b_m, b_ta, b_tg, b_tm = fuse_backward(b_a, b_g, b_m, b_da, b_dg, b_dm, l_a, l_g, l_m)
        b_sum_a += tl.sum(b_ta, 1)
        b_sum_g += tl.sum(b_tg, 1)
        b_sum_m += tl.sum(b_tm, 1)
        b_sum += tl.dot(b_a, tl.trans(b_v), input_precision=PRECISION)
        b_grad_v = tl.dot(tl.trans(b_attn), b_a, input_precision=PRECISION)
        o_out = ((i_b * C + i_c) + o_d)[:, None] * N + o_n[None, :]
        tl.store(p_grad_v + o_out, b_grad_v.to(p_grad_v.dtype.element_ty), mask=m)
        tl.store(p_grad_conv + o_out, b_g.to(p_grad_conv.dtype.element_ty), mask=m)
        tl.store(p_grad_mlp + o_out, b_m.to(p_grad_mlp.dtype.element_ty), mask=m)
    store_matrix(p_partial + i_program * D * D, b_sum, o_d, D)
    tl.store(p_partial_l + i_program * 3, tl.sum(b_sum_a, 0))
    tl.store(p_partial_l + i_program * 3 + 1, tl.sum(b_sum_g, 0))
    tl.store(p_partial_l + i_program * 3 + 2, tl.sum(b_sum_m, 0))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    num_heads: int,
    conv: Tensor,
    mlp: Tensor,
    l_att: Tensor,
    l_conv: Tensor,
    l_mlp: Tensor,
) -> tuple[Tensor, Tensor]:
    matrices = attention_matrices(q, k, temperature, num_heads)
    scalars, maps = (l_att, l_conv, l_mlp), (v, conv, mlp)
    result = fusion_dtypes(q, conv, mlp, *scalars)[1]
    out = torch.empty(concatenated(q), dtype=result, device=q.device)
    tile = head_tile(v, num_heads, elements=1024, most_splits=2**31)
    strides = (stride for t in maps for stride in plane_strides(t))
    arguments = (*maps, matrices, *scalars, out, *tile.sizes(), *strides)
    launch(_forward_kernel, tile.programs, q.device, *arguments, **tile.options(*maps, out))
    return out, matrices


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    conv: Tensor,
    mlp: Tensor,
    l_att: Tensor,
    l_conv: Tensor,
    l_mlp: Tensor,
    matrices: Tensor,
) -> tuple[Tensor, ...]:
    scalars, maps, device = (l_att, l_conv, l_mlp), (v, conv, mlp), q.device
    grad_v, grad_conv, grad_mlp = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in maps)
    tile = head_tile(v, matrices.shape[1], elements=512)
    sums = torch.empty(tile.programs, tile.d, tile.d, dtype=torch.float32, device=device)
    sums_l = torch.empty(tile.programs, 3, dtype=torch.float32, device=device)
    strides = (stride for t in (grad_out, *maps) for stride in plane_strides(t))
    arguments = (grad_out, *maps, matrices, *scalars, grad_v, grad_conv, grad_mlp, sums, sums_l)
    options = tile.options(grad_out, *maps, grad_v) | {"num_warps": 8}
    launch(_backward_kernel, tile.programs, device, *arguments, *tile.sizes(), *strides, **options)
    grad_q, grad_k, grad_temperature = attention_matrices_backward(sums, tile, q, k, temperature, matrices)
    return grad_q, grad_k, grad_v, grad_temperature, grad_conv, grad_mlp, *scalar_gradients(sums_l, scalars)
