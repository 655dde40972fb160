"""The kernels of ``mixer_stage``'s backward on vectors of a sample: the gradients of the kernel generator and of the
batch norm. Small tensors all, of which PyTorch would take some forty launches."""

from __future__ import annotations

import triton
import triton.language as tl

from mirage_kernels._triton.launch import gelu, gelu_slope
from mirage_kernels._triton.tiles import matrix
from mirage_kernels.mixer_stage.triton.device import batch_normalised, times


@triton.jit
def _times_transposed(p, b_x, o_r, m_r, o_c, m_c, COUNT: tl.constexpr):
    """A vector times rows o_r of a matrix of COUNT columns, in float32."""
    return tl.sum(matrix(p, o_r, m_r, o_c, m_c, COUNT).to(tl.float32) * b_x[:, None], 0)


@triton.jit
def generator_kernel(
    p_branch_mean,  # [B, c]
    p_bn_mean,  # [c], like the next three
    p_bn_var,
    p_bn_weight,
    p_bn_bias,
    p_detail_weight,  # [c, c]
    p_generator_in,  # [c, c]
    p_generator_out,  # [49 c, c]
    p_grad_kernels,  # [B, 49 c]
    p_vectors,  # [B, 6, c]: inputs of the three matrices, and the gradients of their outputs and of the first's input
    bn_eps,
    BRANCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < BRANCH
    b_mean = tl.load(p_branch_mean + i_b * BRANCH + o_b, mask=m_b, other=0.0)
    b_in = batch_normalised(b_mean[:, None], p_bn_mean, p_bn_var, p_bn_weight, p_bn_bias, o_b, m_b, bn_eps)
    b_in = tl.sum(b_in, 1)
    b_average = times(p_detail_weight, o_b, m_b, b_in, o_b, m_b, BRANCH)
    b_inner = times(p_generator_in, o_b, m_b, b_average, o_b, m_b, BRANCH)
    b_grad = tl.zeros([BLOCK_B], tl.float32)
    for i_r in range(0, 49 * BRANCH, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < 49 * BRANCH
        b_g = tl.load(p_grad_kernels + i_b * 49 * BRANCH + o_r, mask=m_r, other=0.0).to(tl.float32)
        b_grad += _times_transposed(p_generator_out, b_g, o_r, m_r, o_b, m_b, BRANCH)
    b_grad *= gelu_slope(b_inner)
    p = p_vectors + i_b * 6 * BRANCH + o_b
    tl.store(p, b_in, mask=m_b)
    tl.store(p + BRANCH, b_average, mask=m_b)
    tl.store(p + 2 * BRANCH, gelu(b_inner), mask=m_b)
    tl.store(p + 3 * BRANCH, b_grad, mask=m_b)
    b_grad = _times_transposed(p_generator_in, b_grad, o_b, m_b, o_b, m_b, BRANCH)
    tl.store(p + 4 * BRANCH, b_grad, mask=m_b)
    b_grad = _times_transposed(p_detail_weight, b_grad, o_b, m_b, o_b, m_b, BRANCH)
    tl.store(p + 5 * BRANCH, b_grad, mask=m_b)


@triton.jit
def outer_products_kernel(
    p_vectors,  # [B, 6, c], as above
    p_grad_kernels,  # [B, 49 c]
    p_grads,  # [51 c, c]: of the three matrices, the last first
    batch,
    BRANCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums over the samples of outer products: the gradients of matrices that every sample multiplies one vector by."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < BRANCH
    b_sum = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    o_small = o_r - 49 * BRANCH  # rows of the second matrix and then of the first one
    m_small = (o_small >= 0) & (o_small < 2 * BRANCH)
    for i in range(batch):
        p = p_vectors + i * 6 * BRANCH
        b_g = tl.load(p_grad_kernels + i * 49 * BRANCH + o_r, mask=o_small < 0, other=0.0).to(tl.float32)
        b_x = tl.load(p + 2 * BRANCH + o_b, mask=m_b, other=0.0)
        b_sum += b_g[:, None] * b_x[None, :]
        b_g = tl.load(p + 3 * BRANCH + o_small, mask=m_small, other=0.0)
        b_x = tl.load(p + BRANCH + o_b, mask=m_b, other=0.0)
        b_sum += tl.where((o_small < BRANCH)[:, None], b_g[:, None] * b_x[None, :], 0.0)
        b_x = tl.load(p + o_b, mask=m_b, other=0.0)
        b_sum += tl.where((o_small >= BRANCH)[:, None], b_g[:, None] * b_x[None, :], 0.0)
    m = (o_small < 2 * BRANCH)[:, None] & m_b[None, :]
    tl.store(p_grads + o_r[:, None] * BRANCH + o_b[None, :], b_sum, mask=m)


@triton.jit
def batch_norm_kernel(
    p_sums,  # [2, c]: of the gradient of the batch norm's output, and of it times the normalised input
    p_vectors,  # [B, 6, c], of which the last is the gradient of each sample's mean of that output
    p_branch_mean,  # [B, c]
    p_bn_mean,  # [c], like the next two
    p_bn_var,
    p_bn_weight,
    p_grads,  # [2, c]: of weight and bias
    p_coefficients,  # [B, 3, c]: of the gradient of the output, of the input, and what is added
    bn_eps,
    batch,
    pixels,  # of a sample, and of all, as floating-point numbers
    count,
    BRANCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRAINING: tl.constexpr,
):
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < BRANCH
    b_mean = tl.load(p_bn_mean + o_b, mask=m_b, other=0.0)
    b_scale = 1.0 / tl.sqrt(tl.load(p_bn_var + o_b, mask=m_b, other=1.0) + bn_eps)
    b_bias = tl.load(p_sums + o_b, mask=m_b, other=0.0)
    b_weight = tl.load(p_sums + BRANCH + o_b, mask=m_b, other=0.0)
    for i in range(batch):
        b_g = tl.load(p_vectors + (i * 6 + 5) * BRANCH + o_b, mask=m_b, other=0.0)
        b_bias += b_g
        b_x = tl.load(p_branch_mean + i * BRANCH + o_b, mask=m_b, other=0.0)
        b_weight += b_g * (b_x - b_mean) * b_scale
    tl.store(p_grads + o_b, b_weight, mask=m_b)
    tl.store(p_grads + BRANCH + o_b, b_bias, mask=m_b)
    b_factor = tl.load(p_bn_weight + o_b, mask=m_b, other=0.0).to(tl.float32) * b_scale
    b_of_input = tl.zeros([BLOCK_B], tl.float32)
    b_shared = tl.zeros([BLOCK_B], tl.float32)
    if TRAINING:  # through the statistics
        b_of_input = -b_weight * b_factor * b_scale / count
        b_shared = -b_bias / count
    for i in range(batch):
        b_g = tl.load(p_vectors + (i * 6 + 5) * BRANCH + o_b, mask=m_b, other=0.0)
        b_added = b_factor * (b_g / pixels + b_shared) - b_of_input * b_mean
        p = p_coefficients + i * 3 * BRANCH + o_b
        tl.store(p, b_factor, mask=m_b)
        tl.store(p + BRANCH, b_of_input, mask=m_b)
        tl.store(p + 2 * BRANCH, b_added, mask=m_b)
