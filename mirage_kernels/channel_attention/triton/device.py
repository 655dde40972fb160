"""What the kernels of both attention operators call: addresses of a head's tile, and small d x d matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from mirage_kernels._triton.launch import pixel_offsets


@triton.jit
def tile_offsets(i_b, i_c, o_d, o_n, W, s_b, s_c, s_row, s_pixel, LINE: tl.constexpr):
    """Offsets of the channels i_c + o_d at the pixels o_n of sample i_b."""
    return i_b * s_b + (i_c + o_d)[:, None] * s_c + pixel_offsets(o_n, W, s_row, s_pixel, LINE)[None, :]


@triton.jit
def load_matrix(p, o_d, D: tl.constexpr):
    """A d x d matrix, padded with zeros."""
    return tl.load(p + o_d[:, None] * D + o_d[None, :], mask=(o_d < D)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_matrix(p, b, o_d, D: tl.constexpr):
    tl.store(p + o_d[:, None] * D + o_d[None, :], b, mask=(o_d < D)[:, None] & (o_d < D)[None, :])


@triton.jit
def sum_matrices(p, splits, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sum of `splits` d x d matrices that lie `stride` apart."""
    o_d = tl.arange(0, BLOCK_D)
    o_m = o_d[:, None] * D + o_d[None, :]
    m_m = (o_d < D)[:, None] & (o_d < D)[None, :]
    b_sum = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for s in range(0, splits, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        m = (o_s < splits)[:, None, None] & m_m[None, :, :]
        b_sum += tl.sum(tl.load(p + (o_s * stride)[:, None, None] + o_m[None, :, :], mask=m, other=0.0), 0)
    return b_sum


@triton.jit
def sum_rows(p, splits, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sum of `splits` rows of d elements that lie `stride` apart."""
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for s in range(0, splits, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        m = (o_s < splits)[:, None] & (o_d < D)[None, :]
        b_sum += tl.sum(tl.load(p + (o_s * stride)[:, None] + o_d[None, :], mask=m, other=0.0), 0)
    return b_sum


@triton.jit
def softmax_of_head(
    i_head,  # over samples and their heads
    p_partial,  # [B * heads, splits, d + 2, d]
    p_temperature,  # [heads]
    p_matrices,  # [B * heads, 2 d + 2, d]: attn, q k^T, |q|, |k|
    HEADS,
    splits,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    p_in = p_partial + i_head * splits * (D + 2) * D
    b_gram = sum_matrices(p_in, splits, (D + 2) * D, D, BLOCK_D, BLOCK_S)
    b_q = tl.sqrt(sum_rows(p_in + D * D, splits, (D + 2) * D, D, BLOCK_D, BLOCK_S))
    b_k = tl.sqrt(sum_rows(p_in + D * D + D, splits, (D + 2) * D, D, BLOCK_D, BLOCK_S))
    t = tl.load(p_temperature + i_head % HEADS).to(tl.float32)
    b_scores = b_gram / tl.maximum(b_q, EPS)[:, None] / tl.maximum(b_k, EPS)[None, :] * t
    b_scores = tl.where((o_d < D)[None, :], b_scores, -float("inf"))
    b_attn = tl.exp(b_scores - tl.max(b_scores, 1)[:, None])
    b_attn = b_attn / tl.sum(b_attn, 1)[:, None]
    p_out = p_matrices + i_head * (2 * D + 2) * D
    store_matrix(p_out, b_attn, o_d, D)
    store_matrix(p_out + D * D, b_gram, o_d, D)
    tl.store(p_out + 2 * D * D + o_d, b_q, mask=o_d < D)
    tl.store(p_out + 2 * D * D + D + o_d, b_k, mask=o_d < D)
