"""``gated_depthwise_ffn`` in Triton: programs walk down a strip of rows, so that a row's GELUs serve three rows.

The row that arrives adds to the three output rows around it; two unfinished rows of sums stay in registers. Backward is
two kernels of the same kind: one yields the gradient of d, the other those of h and of the weight. The weight's are
sums per program, added up in a second pass: two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import gelu, gelu_slope, image_strides, index_dtype, launch, needs_int64


@dataclass(frozen=True)
class StripTile:
    """A program covers `rows` rows, `block_x` columns and `block_p` channels (or pairs of them)."""

    block_p: int
    block_x: int
    rows: int
    num_warps: int = 4

    def programs(self, batch: int, channels: int, height: int, width: int) -> int:
        blocks = triton.cdiv(channels, self.block_p) * triton.cdiv(width, self.block_x)
        return batch * blocks * triton.cdiv(height, self.rows)


def strip_tile(batch: int, channels: int, height: int, width: int) -> StripTile:
    """Long strips compute few rows twice; short ones, of fewer channels, fill the GPU."""
    block_x = max(16, min(128, next_power_of_2(width)))
    for elements, rows in ((512, 64), (512, 32), (512, 16), (256, 8)):
        tile = StripTile(max(1, min(elements // block_x, next_power_of_2(channels))), block_x, rows)
        if tile.programs(batch, channels, height, width) >= 2048:
            break
    return tile


@triton.jit
def _load_row(p, row, o_x, s_pixel, end, W, m_p):
    """Elements o_x of a row; zeros where the row is not in [0, end) or the column not in [0, W)."""
    o_row = row + o_x * 0
    m_x = (o_x >= 0) & (o_x < W) & (o_row >= 0) & (o_row < end)
    m = m_p[:, None] & m_x[None, :]
    return tl.load(p + o_x[None, :] * s_pixel, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _load_taps(p_weight, o_c, m_c):
    """Nine weights of each channel, each [channels, 1]."""
    p = (p_weight + o_c * 9)[:, None]
    m = m_c[:, None]
    w0 = tl.load(p, mask=m, other=0.0).to(tl.float32)
    w1 = tl.load(p + 1, mask=m, other=0.0).to(tl.float32)
    w2 = tl.load(p + 2, mask=m, other=0.0).to(tl.float32)
    w3 = tl.load(p + 3, mask=m, other=0.0).to(tl.float32)
    w4 = tl.load(p + 4, mask=m, other=0.0).to(tl.float32)
    w5 = tl.load(p + 5, mask=m, other=0.0).to(tl.float32)
    w6 = tl.load(p + 6, mask=m, other=0.0).to(tl.float32)
    w7 = tl.load(p + 7, mask=m, other=0.0).to(tl.float32)
    w8 = tl.load(p + 8, mask=m, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def _program(C, H, W, ROWS, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr, INT64: tl.constexpr):
    """Sample, first channel, first row, first column."""
    i = tl.program_id(0)
    if INT64:
        i = i.to(tl.int64)
    tiles = tl.cdiv(W, BLOCK_X)
    strips = tl.cdiv(H, ROWS)
    blocks = tl.cdiv(C, BLOCK_P)
    i_x = i % tiles
    i_strip = (i // tiles) % strips
    i_p = (i // (tiles * strips)) % blocks
    return i // (tiles * strips * blocks), i_p * BLOCK_P, i_strip * ROWS, i_x * BLOCK_X


@triton.jit
def _pair_kernel(
    p_h,  # [B, 2M, H, W], any strides
    p_weight,  # [2M, 9]
    p_grad_y,  # [B, M, H, W], any strides; only with GRADIENT
    p_out,  # y [B, M, H, W]; with GRADIENT the gradient of d, [B, 2M, H, W]
    M,
    H,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    ROWS,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
    GRADIENT: tl.constexpr,
    INT64: tl.constexpr,
):
    i_b, i_p, i_first, i_x = _program(M, H, W, ROWS, BLOCK_P, BLOCK_X, INT64)
    o_c = i_p + tl.arange(0, BLOCK_P)
    o_x = i_x + tl.arange(0, BLOCK_X)
    m_c = o_c < M
    i_last = tl.minimum(i_first + ROWS, H)
    u0, u1, u2, u3, u4, u5, u6, u7, u8 = _load_taps(p_weight, o_c, m_c)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = _load_taps(p_weight, o_c + M, m_c)
    p_1 = p_h + i_b * s_b + o_c[:, None] * s_c
    half = index_dtype(M, INT64)
    p_2 = p_1 + half * s_c
    b_this1 = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)  # sums of the row that the next one completes
    b_this2 = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)
    b_next1 = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)
    b_next2 = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)

    for row in range(i_first - 1, i_last + 1):
        b_l = gelu(_load_row(p_1 + row * s_row, row, o_x - 1, s_pixel, H, W, m_c))
        b_m = gelu(_load_row(p_1 + row * s_row, row, o_x, s_pixel, H, W, m_c))
        b_r = gelu(_load_row(p_1 + row * s_row, row, o_x + 1, s_pixel, H, W, m_c))
        b_d1 = b_this1 + b_l * u6 + b_m * u7 + b_r * u8
        b_this1 = b_next1 + b_l * u3 + b_m * u4 + b_r * u5
        b_next1 = b_l * u0 + b_m * u1 + b_r * u2
        b_l = gelu(_load_row(p_2 + row * s_row, row, o_x - 1, s_pixel, H, W, m_c))
        b_m = gelu(_load_row(p_2 + row * s_row, row, o_x, s_pixel, H, W, m_c))
        b_r = gelu(_load_row(p_2 + row * s_row, row, o_x + 1, s_pixel, H, W, m_c))
        b_d2 = b_this2 + b_l * v6 + b_m * v7 + b_r * v8
        b_this2 = b_next2 + b_l * v3 + b_m * v4 + b_r * v5
        b_next2 = b_l * v0 + b_m * v1 + b_r * v2

        o_row = row - 1  # complete now
        m = m_c[:, None] & ((o_x < W) & (o_row + o_x * 0 >= i_first))[None, :]
        if GRADIENT:
            o_out = (i_b * 2 * M + o_c[:, None]) * H * W + o_row * W + o_x[None, :]
            o_g = i_b * sg_b + o_c[:, None] * sg_c + o_row * sg_row + o_x[None, :] * sg_pixel
            b_g = tl.load(p_grad_y + o_g, mask=m, other=0.0).to(tl.float32)
            b_g1 = b_g * b_d2 * gelu_slope(b_d1)
            b_g2 = b_g * gelu(b_d1)
            tl.store(p_out + o_out, b_g1.to(p_out.dtype.element_ty), mask=m)
            tl.store(p_out + o_out + half * H * W, b_g2.to(p_out.dtype.element_ty), mask=m)
        else:
            o_out = (i_b * M + o_c[:, None]) * H * W + o_row * W + o_x[None, :]
            tl.store(p_out + o_out, (gelu(b_d1) * b_d2).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _input_kernel(
    p_h,  # [B, C, H, W], any strides
    p_weight,  # [C, 9]
    p_grad_d,  # [B, C, H, W], contiguous
    p_grad_h,  # [B, C, H, W], contiguous
    p_partial,  # [B * strips * column tiles, C, 9]
    C,
    H,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    ROWS,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
    INT64: tl.constexpr,
):
    i_b, i_p, i_first, i_x = _program(C, H, W, ROWS, BLOCK_P, BLOCK_X, INT64)
    o_c = i_p + tl.arange(0, BLOCK_P)
    o_x = i_x + tl.arange(0, BLOCK_X)
    m_c = o_c < C
    i_last = tl.minimum(i_first + ROWS, H)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = _load_taps(p_weight, o_c, m_c)
    p_plane = p_h + i_b * s_b + o_c[:, None] * s_c
    o_plane = (i_b * C + o_c[:, None]) * H * W
    zero = tl.zeros([BLOCK_P, BLOCK_X], tl.float32)
    b_this, b_next = zero, zero
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    b_above = zero  # gelu(h) of the row above the one that arrives; its own; its slope; rows of other strips count as 0
    b_here = zero
    b_slope_above = zero
    b_slope = zero

    for row in range(i_first - 1, i_last + 1):
        p_row = p_grad_d + o_plane + row * W
        b_l = _load_row(p_row, row, o_x - 1, 1, H, W, m_c)
        b_m = _load_row(p_row, row, o_x, 1, H, W, m_c)
        b_r = _load_row(p_row, row, o_x + 1, 1, H, W, m_c)
        b_h = _load_row(p_plane + (row + 1) * s_row, row + 1, o_x, s_pixel, i_last, W, m_c)
        b_below = gelu(b_h)
        # grad_a[y] gathers grad_d[y - 1 .. y + 1] with the kernel turned by 180 degrees.
        b_done = b_this + b_l * w2 + b_m * w1 + b_r * w0
        b_this = b_next + b_l * w5 + b_m * w4 + b_r * w3
        b_next = b_l * w8 + b_m * w7 + b_r * w6
        # A tap takes pixels from where both are in the plane: zero times what is not finite is no zero.
        o_to = row + o_x * 0
        m_to = (o_to >= 0) & (o_to < H) & (o_x < W)
        m_above = m_to & (o_to > i_first)
        m_here = m_to & (o_to >= i_first) & (o_to < i_last)
        m_below = m_to & (o_to + 1 < i_last)
        m_l = o_x >= 1
        m_r = o_x + 1 < W
        g0 = tl.where((m_above & m_r)[None, :], g0 + b_r * b_above, g0)
        g1 = tl.where(m_above[None, :], g1 + b_m * b_above, g1)
        g2 = tl.where((m_above & m_l)[None, :], g2 + b_l * b_above, g2)
        g3 = tl.where((m_here & m_r)[None, :], g3 + b_r * b_here, g3)
        g4 = tl.where(m_here[None, :], g4 + b_m * b_here, g4)
        g5 = tl.where((m_here & m_l)[None, :], g5 + b_l * b_here, g5)
        g6 = tl.where((m_below & m_r)[None, :], g6 + b_r * b_below, g6)
        g7 = tl.where(m_below[None, :], g7 + b_m * b_below, g7)
        g8 = tl.where((m_below & m_l)[None, :], g8 + b_l * b_below, g8)
        o_row = row - 1
        m = m_c[:, None] & ((o_x < W) & (o_row + o_x * 0 >= i_first))[None, :]
        b_grad_h = (b_done * b_slope_above).to(p_grad_h.dtype.element_ty)
        tl.store(p_grad_h + o_plane + o_row * W + o_x[None, :], b_grad_h, mask=m)
        b_above = b_here
        b_here = b_below
        b_slope_above = b_slope
        b_slope = gelu_slope(b_h)

    tiles = tl.cdiv(W, BLOCK_X)
    i_part = (i_b * tl.cdiv(H, ROWS) + i_first // ROWS) * tiles + i_x // BLOCK_X
    p = p_partial + (i_part * C + o_c) * 9
    tl.store(p, tl.sum(g0, 1), mask=m_c)
    tl.store(p + 1, tl.sum(g1, 1), mask=m_c)
    tl.store(p + 2, tl.sum(g2, 1), mask=m_c)
    tl.store(p + 3, tl.sum(g3, 1), mask=m_c)
    tl.store(p + 4, tl.sum(g4, 1), mask=m_c)
    tl.store(p + 5, tl.sum(g5, 1), mask=m_c)
    tl.store(p + 6, tl.sum(g6, 1), mask=m_c)
    tl.store(p + 7, tl.sum(g7, 1), mask=m_c)
    tl.store(p + 8, tl.sum(g8, 1), mask=m_c)


def _run_pairs(h: Tensor, taps: Tensor, grad_y: Tensor, out: Tensor, gradient: bool) -> None:
    batch, channels, height, width = h.shape
    tile = strip_tile(batch, channels // 2, height, width)
    launch(
        _pair_kernel,
        tile.programs(batch, channels // 2, height, width) if out.numel() else 0,
        h.device,
        p_h=h,
        p_weight=taps,
        p_grad_y=grad_y,
        p_out=out,
        M=channels // 2,
        H=height,
        W=width,
        **image_strides(h),
        **image_strides(grad_y, "sg"),
        ROWS=tile.rows,
        BLOCK_P=tile.block_p,
        BLOCK_X=tile.block_x,
        GRADIENT=gradient,
        INT64=needs_int64(h, grad_y, out),
        num_warps=tile.num_warps,
    )


def forward(h: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = h.shape
    y = torch.empty(batch, channels // 2, height, width, dtype=h.dtype, device=h.device)
    _run_pairs(h, weight.reshape(channels, 9).contiguous(), y, y, gradient=False)
    return y


def backward(grad_y: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = h.shape
    taps = weight.reshape(channels, 9).contiguous()
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_d = torch.empty(h.shape, dtype=torch.float32, device=h.device)  # 16 bits would cost more accuracy than eager
    _run_pairs(h, taps, grad_y, grad_d, gradient=True)
    tile = strip_tile(batch, channels, height, width)
    parts = batch * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.block_x)
    sums = torch.empty(parts, channels, 9, dtype=torch.float32, device=h.device)
    launch(
        _input_kernel,
        tile.programs(batch, channels, height, width) if grad_h.numel() else 0,
        h.device,
        p_h=h,
        p_weight=taps,
        p_grad_d=grad_d,
        p_grad_h=grad_h,
        p_partial=sums,
        C=channels,
        H=height,
        W=width,
        **image_strides(h),
        ROWS=tile.rows,
        BLOCK_P=tile.block_p,
        BLOCK_X=tile.block_x,
        INT64=needs_int64(h, grad_h),
        num_warps=tile.num_warps,
    )
    return grad_h, sums.sum(0).to(h.dtype).view(weight.shape)
