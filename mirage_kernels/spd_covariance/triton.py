"""``spd_covariance`` in Triton: programs centre and square blocks of pixels, a second kernel merges their sums."""


import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import index_dtype, is_flat_plane, launch, needs_int64, pixel_offsets, plane_strides


@triton.jit
def _centred(p_pixels, o_c, s_c, b_base, m, n):
    """Channels o_c at n pixels minus their means there; the means (above b_base, a value of each channel, so that a
    large common offset does not round them); and the sums that rounding the means has left."""
    b_x = tl.load(p_pixels[None, :] + o_c[:, None] * s_c, mask=m, other=0.0).to(tl.float32)
    b_x = tl.where(m, b_x - b_base[:, None], 0.0)
    b_shift = tl.sum(b_x, 1) / tl.maximum(n, 1.0)
    b_centred = tl.where(m, b_x - b_shift[:, None], 0.0)
    return b_centred, b_shift, tl.sum(b_centred, 1)


@triton.jit
def _moments_kernel(
    p_x,  # [B, C, H, W], any strides
    p_products,  # [B, programs_per_sample, C, C]: centred products
    p_means,  # [B, programs_per_sample, C], above the base
    p_base,  # [B, C]: the first pixel
    N,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    programs_per_sample,
    blocks_per_program,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program takes the products of BLOCK_C channels with BLOCK_C channels over its part of the pixels.
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_part = i_program // (tiles * tiles)  # over samples and their parts
    i_r = i_program // tiles % tiles
    i_c = i_program % tiles
    i_b = i_part // programs_per_sample
    i_first = (i_part % programs_per_sample) * blocks_per_program
    o_r = i_r * BLOCK_C + tl.arange(0, BLOCK_C)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < C, o_c < C
    b_base_r = tl.load(p_x + i_b * s_b + o_r * s_c, mask=m_r, other=0.0).to(tl.float32)
    b_base_c = tl.load(p_x + i_b * s_b + o_c * s_c, mask=m_c, other=0.0).to(tl.float32)
    b_mean_r, b_mean_c = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    b_products = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)

    for i in range(blocks_per_program):
        i_begin = (i_first + i) * BLOCK_N
        o_n = i_begin + tl.arange(0, BLOCK_N)
        # The last program of a sample may reach past its end: such a block has no pixels and changes nothing.
        n_new = tl.maximum(tl.minimum(N - i_begin, BLOCK_N), 0).to(tl.float32)
        n_old = i * BLOCK_N * 1.0
        share = n_new / tl.maximum(n_old + n_new, 1.0)
        p_pixels = p_x + i_b * s_b + pixel_offsets(o_n, W, s_row, s_pixel, LINE)
        m_xr, m_xc = m_r[:, None] & (o_n < N)[None, :], m_c[:, None] & (o_n < N)[None, :]
        b_centred_r, b_shift_r, b_rest_r = _centred(p_pixels, o_r, s_c, b_base_r, m_xr, n_new)
        b_centred_c, b_shift_c, b_rest_c = _centred(p_pixels, o_c, s_c, b_base_c, m_xc, n_new)
        b_left_c = b_rest_c / tl.maximum(n_new, 1.0)
        b_step_r = (b_shift_r - b_mean_r) + b_rest_r / tl.maximum(n_new, 1.0)
        b_step_c = (b_shift_c - b_mean_c) + b_left_c
        b_products += tl.dot(b_centred_r, tl.trans(b_centred_c), input_precision=PRECISION)
        b_products += (n_old * share) * b_step_r[:, None] * b_step_c[None, :] - b_rest_r[:, None] * b_left_c[None, :]
        b_mean_r += b_step_r * share
        b_mean_c += b_step_c * share

    o = o_r[:, None] * C + o_c[None, :]
    tl.store(p_products + i_part * C * C + o, b_products, mask=m_r[:, None] & m_c[None, :])
    if i_c == 0:
        tl.store(p_means + i_part * C + o_r, b_mean_r, mask=m_r)
        if i_part % programs_per_sample == 0:
            tl.store(p_base + i_b * C + o_r, b_base_r, mask=m_r)


@triton.jit
def _merge_kernel(
    p_products,  # [B, programs_per_sample, C, C]
    p_means,  # [B, programs_per_sample, C], above the base
    p_base,  # [B, C]
    p_y,  # [B, C, C]
    p_mean,  # [B, 2, C]
    eps,
    N,
    pixels_per_program,
    programs_per_sample,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INT64: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    row_blocks: tl.constexpr = (C + BLOCK_R - 1) // BLOCK_R
    i_b = i_program // row_blocks
    o_r = (i_program % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < C, o_c < C
    m = m_r[:, None] & m_c[None, :]
    o = o_r[:, None] * C + o_c[None, :]
    o_mirrored = o_c[None, :] * C + o_r[:, None]

    b_mean_r, b_mean_c = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    b_products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(programs_per_sample):
        i_part = i_b * programs_per_sample + i
        n_old = i * pixels_per_program * 1.0
        n_new = tl.minimum(N - i * pixels_per_program, pixels_per_program) * 1.0
        share = n_new / (n_old + n_new)
        b_step_r = tl.load(p_means + i_part * C + o_r, mask=m_r, other=0.0) - b_mean_r
        b_step_c = tl.load(p_means + i_part * C + o_c, mask=m_c, other=0.0) - b_mean_c
        b_part = tl.load(p_products + i_part * C * C + o, mask=m, other=0.0)
        b_part += tl.load(p_products + i_part * C * C + o_mirrored, mask=m, other=0.0)
        b_products += 0.5 * b_part + (n_old * share) * (b_step_r[:, None] * b_step_c[None, :])
        b_mean_r += b_step_r * share
        b_mean_c += b_step_c * share

    b_y = b_products / (N - 1).to(tl.float32) + tl.where(o_r[:, None] == o_c[None, :], eps, 0.0)
    tl.store(p_y + i_b * C * C + o, b_y.to(p_y.dtype.element_ty), mask=m)
    b_base = tl.load(p_base + i_b * C + o_r, mask=m_r, other=0.0)
    b_mean = b_base + b_mean_r
    tl.store(p_mean + i_b * 2 * C + o_r, b_mean, mask=m_r)
    tl.store(p_mean + i_b * 2 * C + C + o_r, (b_base - b_mean) + b_mean_r, mask=m_r)


@triton.jit
def _backward_kernel(
    p_grad_y,  # [B, C, C], any strides
    p_x,  # [B, C, H, W], any strides
    p_mean,  # [B, 2, C]
    p_grad_x,  # [B, C, N]
    N,
    W,
    sg_b,
    sg_r,
    sg_c,
    s_b,
    s_c,
    s_row,
    s_pixel,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    blocks = tl.cdiv(N, BLOCK_N)
    i_b = i_program // (blocks * tiles)
    o_r = (i_program // blocks % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = (i_program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r, m_n = o_r < C, o_n < N
    p_g = p_grad_y + i_b * sg_b
    p_pixels = p_x + i_b * s_b + pixel_offsets(o_n, W, s_row, s_pixel, LINE)
    p_mean += i_b * 2 * C
    b_grad_x = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)

    for i in range(tiles):
        o_c = index_dtype(i * BLOCK_C + tl.arange(0, BLOCK_C), INT64)
        m_c = o_c < C
        m = m_c[:, None] & m_n[None, :]
        m_square = m_r[:, None] & m_c[None, :]
        b_g = tl.load(p_g + o_r[:, None] * sg_r + o_c[None, :] * sg_c, mask=m_square, other=0.0).to(tl.float32)
        b_g += tl.load(p_g + o_c[None, :] * sg_r + o_r[:, None] * sg_c, mask=m_square, other=0.0).to(tl.float32)
        b_x = tl.load(p_pixels[None, :] + o_c[:, None] * s_c, mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + o_c, mask=m_c, other=0.0)
        b_rest = tl.load(p_mean + C + o_c, mask=m_c, other=0.0)
        b_centred = tl.where(m, (b_x - b_mean[:, None]) - b_rest[:, None], 0.0)
        b_grad_x += tl.dot(b_g / (N - 1).to(tl.float32), b_centred, input_precision=PRECISION)

    o = i_b * C * N + o_r[:, None] * N + o_n[None, :]
    tl.store(p_grad_x + o, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_r[:, None] & m_n[None, :])


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _tile(channels: int) -> tuple[int, int]:
    """(channels, pixels) of a program: squares of sums that fit in registers, where a product in full float32 also
    holds its factors."""
    return (16, 64) if channels <= 16 else (32, 32)


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    pixels = height * width
    y = torch.empty(batch, channels, channels, dtype=x.dtype, device=x.device)
    mean = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    block_c, block_n = _tile(channels)
    tiles = triton.cdiv(channels, block_c)
    blocks = triton.cdiv(pixels, block_n)
    blocks_per_program = triton.cdiv(blocks, 128)
    programs = triton.cdiv(blocks, blocks_per_program)
    products = torch.empty(batch, programs, channels, channels, dtype=torch.float32, device=x.device)
    means = torch.empty(batch, programs, channels, dtype=torch.float32, device=x.device)
    base = torch.empty(batch, channels, dtype=torch.float32, device=x.device)
    launch(
        _moments_kernel,
        batch * programs * tiles * tiles,
        x.device,
        p_x=x,
        p_products=products,
        p_means=means,
        p_base=base,
        N=pixels,
        W=width,
        **plane_strides(x),
        programs_per_sample=programs,
        blocks_per_program=blocks_per_program,
        C=channels,
        BLOCK_C=block_c,
        BLOCK_N=block_n,
        LINE=is_flat_plane(x),
        INT64=needs_int64(x, products),
        PRECISION=_precision(),
        num_warps=4,
        num_stages=1,
    )
    block_r = 16
    launch(
        _merge_kernel,
        batch * triton.cdiv(channels, block_r),
        x.device,
        p_products=products,
        p_means=means,
        p_base=base,
        p_y=y,
        p_mean=mean,
        eps=eps,
        N=pixels,
        pixels_per_program=blocks_per_program * block_n,
        programs_per_sample=programs,
        C=channels,
        BLOCK_R=block_r,
        BLOCK_C=max(16, next_power_of_2(channels)),
        INT64=needs_int64(products),
        num_warps=4,
        num_stages=1,
    )
    return y, mean


def backward(grad_y: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    pixels = height * width
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_c, block_n = _tile(channels)
    tiles = triton.cdiv(channels, block_c)
    launch(
        _backward_kernel,
        batch * tiles * triton.cdiv(pixels, block_n),
        x.device,
        p_grad_y=grad_y,
        p_x=x,
        p_mean=mean,
        p_grad_x=grad_x,
        N=pixels,
        W=width,
        sg_b=grad_y.stride(0),
        sg_r=grad_y.stride(1),
        sg_c=grad_y.stride(2),
        **plane_strides(x),
        C=channels,
        BLOCK_C=block_c,
        BLOCK_N=block_n,
        LINE=is_flat_plane(x),
        INT64=needs_int64(x, grad_x, grad_y),
        PRECISION=_precision(),
        num_warps=4,
        num_stages=1,
    )
    return grad_x
