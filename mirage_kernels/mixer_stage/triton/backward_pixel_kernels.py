"""The kernels of ``mixer_stage``'s backward that take pixels one after the other: the MLP, the batch norm's sums, and
the last, through the first products of all branches and the layer norm. All maps are contiguous."""

from __future__ import annotations

import triton
import triton.language as tl

from mirage_kernels._triton.launch import gelu, gelu_slope, index_dtype, pixel_offsets
from mirage_kernels._triton.tiles import matrix


@triton.jit
def _pixels(N, BLOCK_N: tl.constexpr, INT64: tl.constexpr):
    """Sample and pixels of a program."""
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    return i_program // blocks, i_program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def mlp_gradient_kernel(
    p_normal,  # [B, 3 c, N], of which the last third is read
    p_mlp_in,  # [2 c, c]
    p_mlp_out,  # [c, 2 c]
    p_grad_mlp,  # [B, c, N]: of mlp_out's output
    p_hidden,  # [B, 2 c, N]: what mlp_out multiplied
    p_grad_hidden,  # [B, 2 c, N]: of mlp_in's output
    p_grad_input,  # [B, c, N]
    N,
    BRANCH: tl.constexpr,  # c
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, o_n = _pixels(N, BLOCK_N, INT64)
    m_n = o_n < N
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH
    m = m_b[:, None] & m_n[None, :]
    dtype = p_hidden.dtype.element_ty
    plane = index_dtype(BRANCH, INT64) * N
    o_map = o_b[:, None] * N + o_n[None, :]
    b_in = tl.load(p_normal + (i_b * 3 + 2) * plane + o_map, mask=m, other=0.0)
    b_d = tl.load(p_grad_mlp + i_b * plane + o_map, mask=m, other=0.0)
    b_grad = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for i_k in range(0, 2 * BRANCH, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < 2 * BRANCH
        b_wi = matrix(p_mlp_in, o_k, m_k, o_b, m_b, BRANCH).to(dtype)
        b_inner = tl.dot(b_wi, b_in, input_precision=PRECISION)
        b_w = tl.trans(matrix(p_mlp_out, o_b, m_b, o_k, m_k, 2 * BRANCH)).to(dtype)
        b_di = (tl.dot(b_w, b_d, input_precision=PRECISION) * gelu_slope(b_inner)).to(dtype)
        o_out = i_b * 2 * plane + o_k[:, None] * N + o_n[None, :]
        m_out = m_k[:, None] & m_n[None, :]
        tl.store(p_hidden + o_out, gelu(b_inner).to(dtype), mask=m_out)
        tl.store(p_grad_hidden + o_out, b_di, mask=m_out)
        b_grad = tl.dot(tl.trans(b_wi), b_di, b_grad, input_precision=PRECISION)
    tl.store(p_grad_input + i_b * plane + o_map, b_grad.to(dtype), mask=m)


@triton.jit
def batch_norm_sums_kernel(
    p_normal,  # [B, 3 c, N], of which the second third is read
    p_bn_mean,  # [c], like the next
    p_bn_var,
    p_detail_weight,  # [c, c]: the last rows of gic1
    p_grad_detail,  # [B, c, N]
    p_grad_bn,  # [B, c, N]: read and, with what the detail adds, written
    p_sums,  # [B * blocks, 2, c]: of the gradient, and of it times the normalised input
    bn_eps,
    N,
    BRANCH: tl.constexpr,  # c
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, o_n = _pixels(N, BLOCK_N, INT64)
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH
    m = m_b[:, None] & (o_n < N)[None, :]
    dtype = p_grad_bn.dtype.element_ty
    plane = index_dtype(BRANCH, INT64) * N
    o_map = o_b[:, None] * N + o_n[None, :]
    b_d = tl.load(p_grad_detail + i_b * plane + o_map, mask=m, other=0.0)
    b_w = tl.trans(matrix(p_detail_weight, o_b, m_b, o_b, m_b, BRANCH)).to(dtype)
    b_grad = tl.load(p_grad_bn + i_b * plane + o_map, mask=m, other=0.0).to(tl.float32)
    b_grad = tl.dot(b_w, b_d, b_grad, input_precision=PRECISION)
    tl.store(p_grad_bn + i_b * plane + o_map, b_grad.to(dtype), mask=m)
    b_n = tl.load(p_normal + (i_b * 3 + 1) * plane + o_map, mask=m, other=0.0).to(tl.float32)
    b_mean = tl.load(p_bn_mean + o_b, mask=m_b, other=0.0)
    b_var = tl.load(p_bn_var + o_b, mask=m_b, other=0.0)
    b_hat = tl.where(m, (b_n - b_mean[:, None]) / tl.sqrt(b_var + bn_eps)[:, None], 0.0)
    p_out = p_sums + tl.program_id(0) * 2 * BRANCH + o_b
    tl.store(p_out, tl.sum(b_grad, 1), mask=m_b)
    tl.store(p_out + BRANCH, tl.sum(b_grad * b_hat, 1), mask=m_b)


@triton.jit
def _third(p_x, i_third, b_g, p_weight, o_x, s_c, o_b, m_b, m, b_mean, b_rstd, p_sums, BRANCH: tl.constexpr):
    """The layer norm's normalised input in one third of the channels, the gradient times the weight; stores the sums
    for weight and bias."""
    o_c = i_third * BRANCH + o_b
    b_x = tl.load(p_x + o_c[:, None] * s_c + o_x[None, :], mask=m, other=0.0).to(tl.float32)
    b_hat = tl.where(m, (b_x - b_mean[None, :]) * b_rstd[None, :], 0.0)
    b_g = tl.where(m, b_g, 0.0)
    tl.store(p_sums + o_c, tl.sum(b_g * b_hat, 1), mask=m_b)
    tl.store(p_sums + 3 * BRANCH + o_c, tl.sum(b_g, 1), mask=m_b)
    b_w = tl.load(p_weight + o_c, mask=m_b, other=0.0).to(tl.float32)
    return b_hat, b_g * b_w[:, None]


@triton.jit
def input_gradient_kernel(
    p_x,  # [B, 3 c, H, W], any strides
    p_mean,  # [B, N], like the next: of the layer norm
    p_rstd,
    p_norm_weight,  # [3 c]
    p_normal,  # [B, 3 c, N], of which the second third is read
    p_qkv_weight,  # [3 c, c]
    p_grad_projected,  # [B, 3 c, N]: of qkv before its depthwise convolution
    p_grad_bn,  # [B, c, N], like the next two
    p_grad_total,
    p_grad_mlp_input,
    p_coefficients,  # [B, 3, c]: of the batch norm's gradient: of grad_bn, of its input, and what is added
    p_grad_y,  # [B, 3 c, N]
    p_grad_x,  # [B, 3 c, N]
    p_sums,  # [B * blocks, 2, 3 c]: for the layer norm's weight and bias
    N,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    BRANCH: tl.constexpr,  # c
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, o_n = _pixels(N, BLOCK_N, INT64)
    m_n = o_n < N
    o_b = index_dtype(tl.arange(0, BLOCK_B), INT64)
    m_b = o_b < BRANCH
    m = m_b[:, None] & m_n[None, :]
    plane = index_dtype(BRANCH, INT64) * N
    o_map = o_b[:, None] * N + o_n[None, :]
    dtype = p_grad_x.dtype.element_ty
    b_ga = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for i_k in range(0, 3 * BRANCH, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < 3 * BRANCH
        p_d = p_grad_projected + i_b * 3 * plane + o_k[:, None] * N + o_n[None, :]
        b_d = tl.load(p_d, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_w = tl.trans(matrix(p_qkv_weight, o_k, m_k, o_b, m_b, BRANCH)).to(dtype)
        b_ga = tl.dot(b_w, b_d, b_ga, input_precision=PRECISION)
    p_c = p_coefficients + i_b * 3 * BRANCH + o_b
    b_gg = tl.load(p_grad_bn + i_b * plane + o_map, mask=m, other=0.0).to(tl.float32)
    b_gg *= tl.load(p_c, mask=m_b, other=0.0)[:, None]
    b_n = tl.load(p_normal + (i_b * 3 + 1) * plane + o_map, mask=m, other=0.0).to(tl.float32)
    b_gg += tl.load(p_c + BRANCH, mask=m_b, other=0.0)[:, None] * b_n
    b_gg += tl.load(p_c + 2 * BRANCH, mask=m_b, other=0.0)[:, None]
    b_gg += tl.load(p_grad_total + i_b * plane + o_map, mask=m, other=0.0).to(tl.float32)
    b_gm = tl.load(p_grad_mlp_input + i_b * plane + o_map, mask=m, other=0.0).to(tl.float32)

    b_mean = tl.load(p_mean + i_b * N + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(p_rstd + i_b * N + o_n, mask=m_n, other=0.0)
    p_x += i_b * s_b
    o_x = pixel_offsets(o_n, W, s_row, s_pixel, LINE)
    p_sums += tl.program_id(0) * 6 * BRANCH
    b_ha, b_ga = _third(p_x, 0, b_ga, p_norm_weight, o_x, s_c, o_b, m_b, m, b_mean, b_rstd, p_sums, BRANCH)
    b_hg, b_gg = _third(p_x, 1, b_gg, p_norm_weight, o_x, s_c, o_b, m_b, m, b_mean, b_rstd, p_sums, BRANCH)
    b_hm, b_gm = _third(p_x, 2, b_gm, p_norm_weight, o_x, s_c, o_b, m_b, m, b_mean, b_rstd, p_sums, BRANCH)
    b_along = (tl.sum(b_ga * b_ha, 0) + tl.sum(b_gg * b_hg, 0) + tl.sum(b_gm * b_hm, 0)) / (3 * BRANCH)
    b_shared = (tl.sum(b_ga, 0) + tl.sum(b_gg, 0) + tl.sum(b_gm, 0)) / (3 * BRANCH)
    o_out = i_b * 3 * plane + o_map
    b_y = tl.load(p_grad_y + o_out, mask=m, other=0.0).to(tl.float32)
    b_y += (b_ga - b_shared[None, :] - b_ha * b_along[None, :]) * b_rstd[None, :]
    tl.store(p_grad_x + o_out, b_y.to(dtype), mask=m)
    b_y = tl.load(p_grad_y + o_out + plane, mask=m, other=0.0).to(tl.float32)
    b_y += (b_gg - b_shared[None, :] - b_hg * b_along[None, :]) * b_rstd[None, :]
    tl.store(p_grad_x + o_out + plane, b_y.to(dtype), mask=m)
    b_y = tl.load(p_grad_y + o_out + 2 * plane, mask=m, other=0.0).to(tl.float32)
    b_y += (b_gm - b_shared[None, :] - b_hm * b_along[None, :]) * b_rstd[None, :]
    tl.store(p_grad_x + o_out + 2 * plane, b_y.to(dtype), mask=m)
