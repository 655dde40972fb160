"""What the forward and backward kernels of ``mixer_stage`` share: the gated CNN and the MLP of a tile of pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from mirage_kernels._triton.launch import gelu, index_dtype
from mirage_kernels._triton.tiles import depthwise, matrix


@triton.jit
def batch_normalised(b_x, p_mean, p_var, p_weight, p_bias, o_c, m_c, eps):
    """The batch norm's output of b_x [channels, pixels]; zero where m_c is false."""
    b_mean = tl.load(p_mean + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_var = tl.load(p_var + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_w = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = (b_x - b_mean[:, None]) * (b_w / tl.sqrt(b_var + eps))[:, None] + b_b[:, None]
    return tl.where(m_c[:, None], b_y, 0.0)


@triton.jit
def gated_sum(
    b_in,  # [c, pixels], the batch norm's output
    p_detail,  # [c, H, W], contiguous
    p_taps,  # [c, 49]
    p_gic1,  # [2 h, c]
    p_gate_temperature,  # [1]
    p_gic2,  # [c, h]
    o_b,
    m_b,
    o_y,
    o_x,
    H,
    W,
    HIDDEN,  # h
    BRANCH: tl.constexpr,  # c
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gic2 of the gated channels: those whose content is the identity, then those where it is the detail."""
    temperature = tl.load(p_gate_temperature).to(tl.float32)
    identities = HIDDEN - BRANCH
    b_mixed = tl.zeros(b_in.shape, tl.float32)
    for i_k in range(0, identities, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < identities
        b_w = matrix(p_gic1, o_k, m_k, o_b, m_b, BRANCH).to(b_in.dtype)
        b_gate = gelu(tl.dot(b_w, b_in, input_precision=PRECISION) / temperature)
        b_w = matrix(p_gic1, HIDDEN + o_k, m_k, o_b, m_b, BRANCH).to(b_in.dtype)
        b_gate = (b_gate * tl.dot(b_w, b_in, input_precision=PRECISION)).to(b_in.dtype)
        b_w = matrix(p_gic2, o_b, m_b, o_k, m_k, HIDDEN).to(b_in.dtype)
        b_mixed = tl.dot(b_w, b_gate, b_mixed, input_precision=PRECISION)
    for i_k in range(0, BRANCH, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < BRANCH
        b_w = matrix(p_gic1, identities + o_k, m_k, o_b, m_b, BRANCH).to(b_in.dtype)
        b_gate = gelu(tl.dot(b_w, b_in, input_precision=PRECISION) / temperature)
        b_gate *= depthwise(p_detail, p_taps, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 7)
        b_w = matrix(p_gic2, o_b, m_b, identities + o_k, m_k, HIDDEN).to(b_in.dtype)
        b_mixed = tl.dot(b_w, b_gate.to(b_in.dtype), b_mixed, input_precision=PRECISION)
    return b_mixed


@triton.jit
def pixel_mlp(
    b_in,  # [c, pixels]
    p_in,  # [2 c, c]
    p_out,  # [c, 2 c]
    o_b,
    m_b,
    BRANCH: tl.constexpr,  # c
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_m = tl.zeros(b_in.shape, tl.float32)
    for i_k in range(0, 2 * BRANCH, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < 2 * BRANCH
        b_w = matrix(p_in, o_k, m_k, o_b, m_b, BRANCH).to(b_in.dtype)
        b_hidden = gelu(tl.dot(b_w, b_in, input_precision=PRECISION)).to(b_in.dtype)
        b_w = matrix(p_out, o_b, m_b, o_k, m_k, 2 * BRANCH).to(b_in.dtype)
        b_m = tl.dot(b_w, b_hidden, b_m, input_precision=PRECISION)
    return b_m


@triton.jit
def head_matrices(p, i_b, o_r, m_r, o_c, m_c, HEADS, stride, D: tl.constexpr):
    """Rows o_r and columns o_c of the block-diagonal matrix of all heads of a sample, whose D x D matrices lie `stride`
    apart: pointers, and where they are of one head."""
    m = m_r[:, None] & m_c[None, :] & ((o_r // D)[:, None] == (o_c // D)[None, :])
    p_rows = p + (i_b * HEADS + o_r // D) * stride + o_r % D * D
    return p_rows[:, None] + (o_c % D)[None, :], m


@triton.jit
def times(p, o_r, m_r, b_x, o_c, m_c, COUNT: tl.constexpr):
    """Rows o_r of a matrix of COUNT columns times a vector, in float32."""
    return tl.sum(matrix(p, o_r, m_r, o_c, m_c, COUNT).to(tl.float32) * b_x[None, :], 1)
