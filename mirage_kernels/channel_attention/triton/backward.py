"""``channel_attention`` and ``channel_attention_fusion`` backward in Triton: through the product with v (and first the
fusion), the softmax, and the products of q and k."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import index_dtype, launch, plane_strides
from mirage_kernels.channel_attention.triton.device import load_matrix, store_matrix, sum_matrices, tile_offsets
from mirage_kernels.channel_attention.triton.forward import Branches, branch_arguments
from mirage_kernels.channel_attention.triton.plan import HeadTile, head_tile, small_options
from mirage_kernels.tri_branch_fusion.triton import fuse_backward, scalar_gradients


@triton.jit
def apply_backward_kernel(
    p_grad,  # [B, C, H, W], any strides; with FUSE [B, 3 C, H, W]
    p_v,  # [B, C, H, W], any strides
    p_matrices,  # [B * heads, 2 d + 2, d], of which attn comes first
    p_conv,  # [B, C, H, W], any strides, like the next; these and the weights only with FUSE
    p_mlp,
    p_l_att,  # [1], like the next two
    p_l_conv,
    p_l_mlp,
    p_grad_v,  # [B, C, N]
    p_grad_conv,  # [B, C, N], like the next; only with FUSE
    p_grad_mlp,
    p_partial,  # [programs, d, d]: parts of the gradient of attn
    p_partial_l,  # [programs, 3]: parts of those of the three weights; only with FUSE
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
    FUSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Through attn v; with FUSE, through the fusion first, for which attn v is computed again."""
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // splits
    i_b, i_c = i_head // HEADS, i_head % HEADS * D
    i_first = i_program % splits * blocks
    C = index_dtype(HEADS * D, INT64)
    o_d = tl.arange(0, BLOCK_D)
    b_attn = load_matrix(p_matrices + i_head * (2 * D + 2) * D, o_d, D)
    b_sum = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    if FUSE:
        l_a, l_g = tl.load(p_l_att).to(tl.float32), tl.load(p_l_conv).to(tl.float32)
        l_m = tl.load(p_l_mlp).to(tl.float32)
        b_sum_a = tl.zeros([BLOCK_D], tl.float32)
        b_sum_g = tl.zeros([BLOCK_D], tl.float32)
        b_sum_m = tl.zeros([BLOCK_D], tl.float32)
    for i in range(blocks):
        o_n = (i_first + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = (o_d < D)[:, None] & (o_n < N)[None, :]
        o_v = tile_offsets(i_b, i_c, o_d, o_n, W, s_b, s_c, s_row, s_pixel, LINE)
        o_grad = tile_offsets(i_b, i_c, o_d, o_n, W, sd_b, sd_c, sd_row, sd_pixel, LINE)
        o_out = ((i_b * C + i_c) + o_d)[:, None] * N + o_n[None, :]
        b_v = tl.load(p_v + o_v, mask=m, other=0.0).to(tl.float32)
        b_da = tl.load(p_grad + o_grad, mask=m, other=0.0).to(tl.float32)
        if FUSE:
            o_g = tile_offsets(i_b, i_c, o_d, o_n, W, sg_b, sg_c, sg_row, sg_pixel, LINE)
            o_m = tile_offsets(i_b, i_c, o_d, o_n, W, sm_b, sm_c, sm_row, sm_pixel, LINE)
            b_g = tl.load(p_conv + o_g, mask=m, other=0.0).to(tl.float32)
            b_m = tl.load(p_mlp + o_m, mask=m, other=0.0).to(tl.float32)
            b_dg = tl.load(p_grad + o_grad + C * sd_c, mask=m, other=0.0).to(tl.float32)
            b_dm = tl.load(p_grad + o_grad + 2 * C * sd_c, mask=m, other=0.0).to(tl.float32)
            b_a = tl.dot(b_attn, b_v, input_precision=PRECISION)
            b_da, b_g, b_m, b_ta, b_tg, b_tm = fuse_backward(b_a, b_g, b_m, b_da, b_dg, b_dm, l_a, l_g, l_m)
            b_sum_a += tl.sum(b_ta, 1)
            b_sum_g += tl.sum(b_tg, 1)
            b_sum_m += tl.sum(b_tm, 1)
            tl.store(p_grad_conv + o_out, b_g.to(p_grad_conv.dtype.element_ty), mask=m)
            tl.store(p_grad_mlp + o_out, b_m.to(p_grad_mlp.dtype.element_ty), mask=m)
        b_sum += tl.dot(b_da, tl.trans(b_v), input_precision=PRECISION)
        b_grad_v = tl.dot(tl.trans(b_attn), b_da, input_precision=PRECISION)
        tl.store(p_grad_v + o_out, b_grad_v.to(p_grad_v.dtype.element_ty), mask=m)
    store_matrix(p_partial + i_program * D * D, b_sum, o_d, D)
    if FUSE:
        tl.store(p_partial_l + i_program * 3, tl.sum(b_sum_a, 0))
        tl.store(p_partial_l + i_program * 3 + 1, tl.sum(b_sum_g, 0))
        tl.store(p_partial_l + i_program * 3 + 2, tl.sum(b_sum_m, 0))


@triton.jit
def _softmax_backward_kernel(
    p_partial,  # [B * heads, splits, d, d]: parts of the gradient of attn
    p_temperature,  # [heads]
    p_matrices,  # [B * heads, 2 d + 2, d]
    p_small,  # [B * heads, d + 2, d]: the gradient of q k^T, then what q and k are scaled by in their own gradients
    p_grad_t,  # [B * heads]
    HEADS,
    splits,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_grad = sum_matrices(p_partial + i_head * splits * D * D, splits, D * D, D, BLOCK_D, BLOCK_S)
    p_in = p_matrices + i_head * (2 * D + 2) * D
    b_attn = load_matrix(p_in, o_d, D)
    b_gram = load_matrix(p_in + D * D, o_d, D)
    b_q = tl.load(p_in + 2 * D * D + o_d, mask=m_d, other=1.0)
    b_k = tl.load(p_in + 2 * D * D + D + o_d, mask=m_d, other=1.0)
    b_iq = 1.0 / tl.maximum(b_q, EPS)
    b_ik = 1.0 / tl.maximum(b_k, EPS)
    t = tl.load(p_temperature + i_head % HEADS).to(tl.float32)
    b_grad_s = b_attn * (b_grad - tl.sum(b_grad * b_attn, 1)[:, None])
    b_cosine = b_gram * b_iq[:, None] * b_ik[None, :]
    b_product = b_grad_s * b_cosine
    b_grad_gram = b_grad_s * b_iq[:, None] * b_ik[None, :] * t
    # Below eps the division is by a constant, and the norm has no gradient.
    b_scale_q = tl.where(b_q < EPS, 0.0, -t * tl.sum(b_product, 1) * b_iq * b_iq)
    b_scale_k = tl.where(b_k < EPS, 0.0, -t * tl.sum(b_product, 0) * b_ik * b_ik)
    p_out = p_small + i_head * (D + 2) * D
    store_matrix(p_out, b_grad_gram, o_d, D)
    tl.store(p_out + D * D + o_d, b_scale_q, mask=m_d)
    tl.store(p_out + D * D + D + o_d, b_scale_k, mask=m_d)
    tl.store(p_grad_t + i_head, tl.sum(tl.sum(b_product, 1), 0))


@triton.jit
def _grad_qk_kernel(
    p_q,  # [B, C, H, W], any strides
    p_k,  # [B, C, H, W], any strides
    p_small,  # [B * heads, d + 2, d]
    p_grad_q,  # [B, C, N]
    p_grad_k,  # [B, C, N]
    N,
    W,
    HEADS,
    splits,
    blocks,
    sq_b,
    sq_c,
    sq_row,
    sq_pixel,
    sk_b,
    sk_c,
    sk_row,
    sk_pixel,
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
    p_in = p_small + i_head * (D + 2) * D
    b_m = load_matrix(p_in, o_d, D)
    b_scale_q = tl.load(p_in + D * D + o_d, mask=o_d < D, other=0.0)
    b_scale_k = tl.load(p_in + D * D + D + o_d, mask=o_d < D, other=0.0)
    o_q = tile_offsets(i_b, i_c, o_d, o_n, W, sq_b, sq_c, sq_row, sq_pixel, LINE)
    o_k = tile_offsets(i_b, i_c, o_d, o_n, W, sk_b, sk_c, sk_row, sk_pixel, LINE)
    b_q = tl.load(p_q + o_q, mask=m, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + o_k, mask=m, other=0.0).to(tl.float32)
    b_grad_q = tl.dot(b_m, b_k, input_precision=PRECISION) + b_q * b_scale_q[:, None]
    b_grad_k = tl.dot(tl.trans(b_m), b_q, input_precision=PRECISION) + b_k * b_scale_k[:, None]
    o_out = ((i_b * HEADS * D + i_c) + o_d)[:, None] * N + o_n[None, :]
    tl.store(p_grad_q + o_out, b_grad_q.to(p_grad_q.dtype.element_ty), mask=m)
    tl.store(p_grad_k + o_out, b_grad_k.to(p_grad_k.dtype.element_ty), mask=m)


def softmax_backward(partial: Tensor, splits: int, temperature: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """From `splits` parts of the gradient of attn [B, heads, splits, d, d] what the gradients of q and k are made of,
    [B * heads, d + 2, d], and the gradient of temperature. `matrices`: see `attention_matrices`."""
    batch, heads, _, d = matrices.shape
    small = torch.empty(batch * heads, d + 2, d, dtype=torch.float32, device=partial.device)
    grad_t = torch.empty(batch, heads, dtype=torch.float32, device=partial.device)
    arguments = (partial, temperature.reshape(heads), matrices, small, grad_t, heads, splits)
    options = small_options(max(16, next_power_of_2(d)), d)
    launch(_softmax_backward_kernel, batch * heads, partial.device, *arguments, **options)
    return small, grad_t.sum(0).reshape(temperature.shape).to(temperature.dtype)


def attention_matrices_backward(
    partial: Tensor, tile: HeadTile, q: Tensor, k: Tensor, temperature: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and temperature, given parts of the gradient of attn [programs of `tile`, d, d]."""
    heads, device = tile.heads, q.device
    small, grad_temperature = softmax_backward(partial, tile.splits, temperature, matrices)
    grad_q, grad_k = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (q, k))
    last = head_tile(q, heads, elements=1024, most_splits=2**31)
    launch(
        _grad_qk_kernel,
        last.programs,
        device,
        p_q=q,
        p_k=k,
        p_small=small,
        p_grad_q=grad_q,
        p_grad_k=grad_k,
        **plane_strides(q, "sq"),
        **plane_strides(k, "sk"),
        **last.sizes(),
        **last.options(q, k, grad_q),
    )
    return grad_q, grad_k, grad_temperature


def apply_backward(
    grad_out: Tensor, v: Tensor, matrices: Tensor, grad_v: Tensor, branches: Branches | None = None
) -> tuple[Tensor, HeadTile, tuple[Tensor, ...]]:
    """Fills `grad_v`. Parts of the gradient of attn and their tile, for :func:`attention_matrices_backward`; and the
    gradients of the branches and of their weights, where there are any."""
    maps = (grad_out, v) if branches is None else (grad_out, v, branches.conv, branches.mlp)
    tile = head_tile(v, matrices.shape[1], elements=1024 if branches is None else 512)
    sums = torch.empty(tile.programs, tile.d, tile.d, dtype=torch.float32, device=v.device)
    sums_l = sums if branches is None else torch.empty(tile.programs, 3, dtype=torch.float32, device=v.device)
    of_branches = (grad_v, grad_v)
    if branches is not None:
        of_branches = tuple(torch.empty(t.shape, dtype=t.dtype, device=v.device) for t in branches[:2])
    options = tile.options(*maps, grad_v)
    if branches is not None:
        options["num_warps"] = 8
    launch(
        apply_backward_kernel,
        tile.programs,
        v.device,
        p_grad=grad_out,
        p_v=v,
        p_matrices=matrices,
        p_grad_v=grad_v,
        p_grad_conv=of_branches[0],
        p_grad_mlp=of_branches[1],
        p_partial=sums,
        p_partial_l=sums_l,
        **plane_strides(grad_out, "sd"),
        **plane_strides(v),
        **branch_arguments(v, branches),
        **tile.sizes(),
        **options,
    )
    if branches is None:
        return sums, tile, ()
    return sums, tile, (*of_branches, *scalar_gradients(sums_l, branches.scalars))


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sums, tile, _ = apply_backward(grad_out, v, matrices, grad_v)
    grad_q, grad_k, grad_temperature = attention_matrices_backward(sums, tile, q, k, temperature, matrices)
    return grad_q, grad_k, grad_v, grad_temperature
