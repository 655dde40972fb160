"""The kernels of ``mixer_stage``'s forward, in the order in which they run: the moments of the batch norm (in
training), the branches' first products, the generated kernels and the attention's small matrices, and the rest.

For a pixel of 3c channels they write 4c values besides y: q, k and v before their depthwise convolution, and the detail
channels before theirs. The last kernel holds a tile of the image: from its x, detail and v it computes the three
branches, their fusion and the sum. q and k after their convolution, gate, identity, the MLP's hidden channels and the
branches exist in registers only; what they are made of is read again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirage_kernels._triton.launch import gelu, index_dtype, pixel_offsets
from mirage_kernels._triton.tiles import depthwise, image_tile_of, matrix, moments, normalised
from mirage_kernels.channel_attention.triton.device import softmax_of_head, store_matrix, sum_rows
from mirage_kernels.mixer_stage.triton.device import batch_normalised, gated_sum, head_matrices, pixel_mlp, times
from mirage_kernels.tri_branch_fusion.triton import fuse


@triton.jit
def moments_kernel(
    p_x,  # [B, 3 c, H, W], any strides
    p_norm_weight,  # [3 c], like the next
    p_norm_bias,
    p_sums,  # [B, blocks, 2, c]: of the gated branch's input, and of its squared distances from the block's mean
    norm_eps,
    N,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    BRANCH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
):
    """The moments of the gated CNN's input, for the batch norm in training."""
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    i_begin = i_program % blocks * BLOCK_N
    o_n = i_begin + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_x = pixel_offsets(o_n, W, s_row, s_pixel, LINE)
    p_x += i_program // blocks * s_b
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    b_mean, b_rstd = moments(p_x, o_c, o_x, s_c, m_n, norm_eps, 3 * BRANCH)
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH
    b_n = normalised(p_x, p_norm_weight, p_norm_bias, BRANCH + o_b, m_b, o_x, s_c, m_n, b_mean, b_rstd)
    b_sum = tl.sum(tl.where(m_n[None, :], b_n, 0.0), 1)
    b_centred = b_n - (b_sum / tl.minimum(N - i_begin, BLOCK_N))[:, None]
    b_square = tl.sum(tl.where(m_n[None, :], b_centred * b_centred, 0.0), 1)
    p_out = p_sums + i_program * 2 * BRANCH + o_b
    tl.store(p_out, b_sum, mask=m_b)
    tl.store(p_out + BRANCH, b_square, mask=m_b)


@triton.jit
def merge_moments_kernel(
    p_sums,  # [B, blocks, 2, c]: what moments_kernel wrote
    p_totals,  # [B, c]: sums over the pixels
    p_squares,  # [B, c]: of the squared distances from the sample's mean
    N,
    blocks,
    BRANCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,  # pixels of a block
    BLOCK_P: tl.constexpr,
):
    """Moments of a sample from those of its blocks."""
    i_b = tl.program_id(0)
    p_sums += i_b.to(tl.int64) * blocks * 2 * BRANCH
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < BRANCH
    b_total = sum_rows(p_sums, blocks, 2 * BRANCH, BRANCH, BLOCK_B, BLOCK_P)
    b_mean = b_total / N
    b_square = sum_rows(p_sums + BRANCH, blocks, 2 * BRANCH, BRANCH, BLOCK_B, BLOCK_P)
    for i in range(0, blocks, BLOCK_P):
        o_p = i + tl.arange(0, BLOCK_P)
        m = (o_p < blocks)[:, None] & m_b[None, :]
        b_sum = tl.load(p_sums + (o_p * 2 * BRANCH)[:, None] + o_b[None, :], mask=m, other=0.0)
        b_count = tl.maximum(tl.minimum(N - o_p * BLOCK_N, BLOCK_N), 1).to(tl.float32)
        b_apart = tl.where(m, b_sum / b_count[:, None] - b_mean[None, :], 0.0)
        b_square += tl.sum(b_apart * b_apart * b_count[:, None], 0)
    tl.store(p_totals + i_b * BRANCH + o_b, b_total, mask=m_b)
    tl.store(p_squares + i_b * BRANCH + o_b, b_square, mask=m_b)


@triton.jit
def batch_moments_kernel(
    p_totals,  # [B, c]
    p_squares,  # [B, c]
    p_mean,  # [c], like the next
    p_var,
    batch,
    pixels,  # a floating-point number, like the next
    count,  # of the batch
    BRANCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean and biased variance of the batch from the moments of its samples, which have the same number of pixels."""
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < BRANCH
    b_mean = sum_rows(p_totals, batch, BRANCH, BRANCH, BLOCK_B, BLOCK_P) / count
    b_square = sum_rows(p_squares, batch, BRANCH, BRANCH, BLOCK_B, BLOCK_P)
    for i in range(batch):
        b_apart = tl.load(p_totals + i * BRANCH + o_b, mask=m_b, other=0.0) / pixels - b_mean
        b_square += b_apart * b_apart * pixels
    tl.store(p_mean + o_b, b_mean, mask=m_b)
    tl.store(p_var + o_b, b_square / count, mask=m_b)


@triton.jit
def prepare_kernel(
    p_x,  # [B, 3 c, H, W], any strides
    p_norm_weight,  # [3 c], like the next
    p_norm_bias,
    p_qkv_weight,  # [3 c, c]
    p_detail_weight,  # [c, c]: the last rows of gic1
    p_bn_mean,  # [c], like the next three
    p_bn_var,
    p_bn_weight,
    p_bn_bias,
    p_qkv,  # [B, 3 c, N]
    p_detail,  # [B, c, N]
    p_sums,  # [B, blocks, c]: of the gated branch's input; only with SUMS
    norm_eps,
    bn_eps,
    N,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    BRANCH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUMS: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    i_b = i_program // blocks
    o_n = i_program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_x = pixel_offsets(o_n, W, s_row, s_pixel, LINE)
    p_x += i_b * s_b
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    b_mean, b_rstd = moments(p_x, o_c, o_x, s_c, m_n, norm_eps, 3 * BRANCH)
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH
    b_n = normalised(p_x, p_norm_weight, p_norm_bias, o_b, m_b, o_x, s_c, m_n, b_mean, b_rstd)
    b_n = b_n.to(p_qkv.dtype.element_ty)
    for i_m in range(0, 3 * BRANCH, BLOCK_M):
        o_m = index_dtype(i_m + tl.arange(0, BLOCK_M), INT64)
        m_m = o_m < 3 * BRANCH
        b_w = matrix(p_qkv_weight, o_m, m_m, o_b, m_b, BRANCH).to(p_qkv.dtype.element_ty)
        b_y = tl.dot(b_w, b_n, input_precision=PRECISION)
        o_out = (i_b * 3 * BRANCH + o_m[:, None]) * N + o_n[None, :]
        tl.store(p_qkv + o_out, b_y.to(p_qkv.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
    b_g = normalised(p_x, p_norm_weight, p_norm_bias, BRANCH + o_b, m_b, o_x, s_c, m_n, b_mean, b_rstd)
    if SUMS:
        tl.store(p_sums + i_program * BRANCH + o_b, tl.sum(tl.where(m_n[None, :], b_g, 0.0), 1), mask=m_b)
    b_g = batch_normalised(b_g, p_bn_mean, p_bn_var, p_bn_weight, p_bn_bias, o_b, m_b, bn_eps)
    b_g = b_g.to(p_qkv.dtype.element_ty)
    for i_m in range(0, BRANCH, BLOCK_M):
        o_m = index_dtype(i_m + tl.arange(0, BLOCK_M), INT64)
        m_m = o_m < BRANCH
        b_w = matrix(p_detail_weight, o_m, m_m, o_b, m_b, BRANCH).to(p_qkv.dtype.element_ty)
        b_y = tl.dot(b_w, b_g, input_precision=PRECISION)
        o_out = (i_b * BRANCH + o_m[:, None]) * N + o_n[None, :]
        tl.store(p_detail + o_out, b_y.to(p_detail.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def gram_kernel(
    p_qkv,  # [B, 3 c, H, W], contiguous
    p_taps,  # [3 c, 9]
    p_partial,  # [B, heads, splits, d + 2, d]: q k^T, |q|^2, |k|^2
    H,
    W,
    HEADS,
    splits,
    tiles_per_split,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products of q and k after their depthwise convolution, which are not written."""
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // splits
    i_b = i_head // HEADS
    tiles = tl.cdiv(H, BLOCK_H) * tl.cdiv(W, BLOCK_W)
    i_first = i_program % splits * tiles_per_split
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_q = i_head % HEADS * D + index_dtype(o_d, INT64)
    o_k = o_q + HEADS * D
    p_qkv += i_b * 3 * HEADS * D * H * W
    b_gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    b_qq = tl.zeros([BLOCK_D], tl.float32)
    b_kk = tl.zeros([BLOCK_D], tl.float32)
    for i_tile in range(i_first, tl.minimum(i_first + tiles_per_split, tiles)):
        _, o_y, o_x = image_tile_of(i_tile, H, W, BLOCK_H, BLOCK_W)
        m = m_d[:, None] & ((o_y < H) & (o_x < W))[None, :]
        b_q = depthwise(p_qkv, p_taps, o_q, m_d, o_y, o_x, H, W, H * W, W, 1, 3)
        b_k = depthwise(p_qkv, p_taps, o_k, m_d, o_y, o_x, H, W, H * W, W, 1, 3)
        b_q = tl.where(m, b_q, 0.0).to(p_qkv.dtype.element_ty)
        b_k = tl.where(m, b_k, 0.0).to(p_qkv.dtype.element_ty)
        b_gram = tl.dot(b_q, tl.trans(b_k), b_gram, input_precision=PRECISION)
        b_q = b_q.to(tl.float32)
        b_k = b_k.to(tl.float32)
        b_qq += tl.sum(b_q * b_q, 1)
        b_kk += tl.sum(b_k * b_k, 1)
    p_out = p_partial + i_program * (D + 2) * D
    store_matrix(p_out, b_gram, o_d, D)
    tl.store(p_out + D * D + o_d, b_qq, mask=m_d)
    tl.store(p_out + D * D + D + o_d, b_kk, mask=m_d)


@triton.jit
def statistics_kernel(
    p_partial,  # [B, heads, splits, d + 2, d]: what gram_kernel wrote
    p_temperature,  # [heads]
    p_matrices,  # [B, heads, 2 d + 2, d]: attn, q k^T, |q|, |k|
    p_sums,  # [B, parts, c]: of the gated branch's input over the pixels
    p_bn_mean,  # [c], like the next three
    p_bn_var,
    p_bn_weight,
    p_bn_bias,
    p_detail_weight,  # [c, c]
    p_generator_in,  # [c, c]: the generator's two matrices
    p_generator_out,  # [49 c, c]
    p_kernels,  # [B, 49 c]
    p_branch_mean,  # [B, c]
    p_batch_mean,  # [c], like the next: copies of what the batch norm used
    p_batch_var,
    bn_eps,
    N,
    parts,
    HEADS,
    splits,
    heads_of_all,  # B * heads: programs for the attention; those for the generated kernels come after them
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BRANCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """All that is small, in one launch: the attention's matrices, and rows of the generated kernels, for which every
    program adds the sums and computes the two small products again."""
    i = tl.program_id(0)
    if i < heads_of_all:
        i_head = i.to(tl.int64)
        softmax_of_head(i_head, p_partial, p_temperature, p_matrices, HEADS, splits, EPS, D, BLOCK_D, BLOCK_S)
    else:
        blocks: tl.constexpr = (49 * BRANCH + BLOCK_R - 1) // BLOCK_R
        i_b = (i - heads_of_all) // blocks
        i_r = (i - heads_of_all) % blocks
        o_b = tl.arange(0, BLOCK_B)
        m_b = o_b < BRANCH
        b_mean = sum_rows(p_sums + i_b * parts * BRANCH, parts, BRANCH, BRANCH, BLOCK_B, BLOCK_P) / N
        b_x = batch_normalised(b_mean[:, None], p_bn_mean, p_bn_var, p_bn_weight, p_bn_bias, o_b, m_b, bn_eps)
        b_x = times(p_detail_weight, o_b, m_b, tl.sum(b_x, 1), o_b, m_b, BRANCH)
        b_x = gelu(times(p_generator_in, o_b, m_b, b_x, o_b, m_b, BRANCH))
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < 49 * BRANCH
        tl.store(p_kernels + i_b * 49 * BRANCH + o_r, times(p_generator_out, o_r, m_r, b_x, o_b, m_b, BRANCH), mask=m_r)
        if i_r == 0:
            tl.store(p_branch_mean + i_b * BRANCH + o_b, b_mean, mask=m_b)
            if i_b == 0:
                b_copy = tl.load(p_bn_mean + o_b, mask=m_b, other=0.0).to(tl.float32)
                tl.store(p_batch_mean + o_b, b_copy, mask=m_b)
                b_copy = tl.load(p_bn_var + o_b, mask=m_b, other=0.0).to(tl.float32)
                tl.store(p_batch_var + o_b, b_copy, mask=m_b)


@triton.jit
def finish_kernel(
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
    p_alpha_att,  # [1], like the next two
    p_alpha_conv,
    p_alpha_mlp,
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
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    b_mean, b_rstd = moments(p_x, o_c, o_n, s_c, m_n, norm_eps, 3 * BRANCH)
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
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
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < BRANCH
        b_v = depthwise(p_plane, p_qkv_taps + 2 * BRANCH * 9, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 3).to(dtype)
        p_attn, m = head_matrices(p_matrices, i_b, o_b, m_b, o_k, m_k, HEADS, (2 * D + 2) * D, D)
        b_a = tl.dot(tl.load(p_attn, mask=m, other=0.0).to(dtype), b_v, b_a, input_precision=PRECISION)

    l_a, l_g = tl.load(p_alpha_att).to(tl.float32), tl.load(p_alpha_conv).to(tl.float32)
    l_m = tl.load(p_alpha_mlp).to(tl.float32)
    b_a, b_g, b_m = fuse(b_a, b_g, b_m, l_a, l_g, l_m)
    b_a, b_g, b_m = b_a.to(dtype), b_g.to(dtype), b_m.to(dtype)
    for i_k in range(0, 3 * BRANCH, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
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
