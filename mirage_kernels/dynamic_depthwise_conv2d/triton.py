"""``dynamic_depthwise_conv2d`` in Triton.

Both kernels walk a plane in groups of four rows. An input row is loaded once per kernel column and serves the four
output rows of its group, so that an output takes K (K + 3) / 4 loads instead of K^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import image_strides, launch, needs_int64

_ROWS = 4  # rows of a group, spelled out in the kernels


@dataclass(frozen=True)
class GroupTile:
    """A program that holds `block_g` groups of four rows and `block_w` columns of a plane."""

    block_g: int
    block_w: int
    num_warps: int


NARROW = {"convolve": GroupTile(16, 16, num_warps=2), "correlate": GroupTile(16, 16, num_warps=2)}
WIDE = {"convolve": GroupTile(8, 32, num_warps=2), "correlate": GroupTile(8, 32, num_warps=2)}


def _tile(kernel: str, width: int) -> GroupTile:
    # A row of 32 columns is one transaction of float32; sums inside a single warp need no barriers.
    return (NARROW if width <= 16 else WIDE)[kernel]


@triton.jit
def _convolve_kernel(
    p_x,  # [B, C, H, W], any strides
    p_weight,  # [B, C, K, K], any strides
    p_y,  # [B, C, H, W], contiguous
    C,
    H,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    sw_b,
    sw_c,
    sw_row,
    sw_pixel,
    tiles_h,
    tiles_w,
    K: tl.constexpr,
    TURNED: tl.constexpr,  # the kernel turned by 180 degrees: the gradient of x
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    INT64: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_plane = i_program // (tiles_h * tiles_w)
    i_tile = i_program % (tiles_h * tiles_w)
    i_b = i_plane // C
    i_c = i_plane % C
    p_x += i_b * s_b + i_c * s_c
    p_weight += i_b * sw_b + i_c * sw_c
    o_row = ((i_tile // tiles_w) * BLOCK_G + tl.arange(0, BLOCK_G)) * 4  # first row of each group
    o_w = (i_tile % tiles_w) * BLOCK_W + tl.arange(0, BLOCK_W)

    b_0 = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    b_1 = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    b_2 = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    b_3 = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    for i_x in range(K):
        o_column = o_w + i_x - K // 2
        m_column = (o_column >= 0) & (o_column < W)
        p_column = p_x + o_column * s_pixel
        if TURNED:
            p_tap = p_weight + (K - 1 - i_x) * sw_pixel
        else:
            p_tap = p_weight + i_x * sw_pixel
        b_w0 = 0.0
        b_w1 = 0.0
        b_w2 = 0.0
        b_w3 = 0.0
        for i in tl.static_range(K + 3):  # input row o_row + i - K // 2 meets row i - r of the kernel in output row r
            b_w3 = b_w2
            b_w2 = b_w1
            b_w1 = b_w0
            if i < K:
                if TURNED:
                    b_w0 = tl.load(p_tap + (K - 1 - i) * sw_row).to(tl.float32)
                else:
                    b_w0 = tl.load(p_tap + i * sw_row).to(tl.float32)
            o_in = o_row + i - K // 2
            m = ((o_in >= 0) & (o_in < H))[:, None] & m_column[None, :]
            b_x = tl.load(p_column[None, :] + (o_in * s_row)[:, None], mask=m, other=0.0).to(tl.float32)
            if i < K:
                b_0 += b_x * b_w0
            if i >= 1 and i < K + 1:
                b_1 += b_x * b_w1
            if i >= 2 and i < K + 2:
                b_2 += b_x * b_w2
            if i >= 3:
                b_3 += b_x * b_w3

    p_y += i_plane * H * W + o_row[:, None] * W + o_w[None, :]
    m_w = (o_w < W)[None, :]
    tl.store(p_y, b_0.to(p_y.dtype.element_ty), mask=(o_row < H)[:, None] & m_w)
    tl.store(p_y + W, b_1.to(p_y.dtype.element_ty), mask=(o_row + 1 < H)[:, None] & m_w)
    tl.store(p_y + 2 * W, b_2.to(p_y.dtype.element_ty), mask=(o_row + 2 < H)[:, None] & m_w)
    tl.store(p_y + 3 * W, b_3.to(p_y.dtype.element_ty), mask=(o_row + 3 < H)[:, None] & m_w)


@triton.jit
def _load_row(p, o_row, s_row, m_w, H):
    """Row o_row of each group in float32, zero outside the plane; p: pointers to its columns, m_w: their mask."""
    m = ((o_row >= 0) & (o_row < H))[:, None] & m_w[None, :]
    return tl.load(p[None, :] + (o_row * s_row)[:, None], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _product(b_g, b_x, o_row, o_in, H):
    """g * x, and zero where the row of either is outside the plane: it is zero there, but the other may be infinite."""
    m = (o_row < H) & (o_in >= 0) & (o_in < H)
    return tl.where(m[:, None], b_g * b_x, 0.0)


@triton.jit
def _correlate_kernel(
    p_g,  # [B, C, H, W], any strides: the gradient of the output
    p_x,  # [B, C, H, W], any strides
    p_partial,  # [programs, K, K]
    C,
    H,
    W,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    s_b,
    s_c,
    s_row,
    s_pixel,
    tiles_w,
    tiles,
    programs_per_plane,
    tiles_per_program,
    K: tl.constexpr,
    TAPS: tl.constexpr,  # K * K rounded up to a power of two
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    INT64: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_plane = i_program // programs_per_plane
    i_first = (i_program % programs_per_plane) * tiles_per_program
    i_b = i_plane // C
    i_c = i_plane % C
    p_g += i_b * sg_b + i_c * sg_c
    p_x += i_b * s_b + i_c * s_c
    o_tap = tl.arange(0, TAPS)
    b_taps = tl.zeros([TAPS], tl.float32)

    for i_tile in range(i_first, tl.minimum(i_first + tiles_per_program, tiles)):
        o_row = ((i_tile // tiles_w) * BLOCK_G + tl.arange(0, BLOCK_G)) * 4
        o_w = (i_tile % tiles_w) * BLOCK_W + tl.arange(0, BLOCK_W)
        m_w = o_w < W
        p_gw = p_g + o_w * sg_pixel
        b_g0 = _load_row(p_gw, o_row, sg_row, m_w, H)
        b_g1 = _load_row(p_gw, o_row + 1, sg_row, m_w, H)
        b_g2 = _load_row(p_gw, o_row + 2, sg_row, m_w, H)
        b_g3 = _load_row(p_gw, o_row + 3, sg_row, m_w, H)
        o_in = o_row - K // 2
        for i_x in range(K):
            o_column = o_w + i_x - K // 2
            m_column = (o_column >= 0) & (o_column < W) & m_w
            p_column = p_x + o_column * s_pixel
            b_x0 = _load_row(p_column, o_in, s_row, m_column, H)
            b_x1 = _load_row(p_column, o_in + 1, s_row, m_column, H)
            b_x2 = _load_row(p_column, o_in + 2, s_row, m_column, H)
            for i_y in tl.static_range(K):
                b_x3 = _load_row(p_column, o_in + i_y + 3, s_row, m_column, H)
                b = _product(b_g0, b_x0, o_row, o_in + i_y, H)
                b += _product(b_g1, b_x1, o_row + 1, o_in + i_y + 1, H)
                b += _product(b_g2, b_x2, o_row + 2, o_in + i_y + 2, H)
                b += _product(b_g3, b_x3, o_row + 3, o_in + i_y + 3, H)
                b = tl.where(m_column[None, :], b, 0.0)
                b_taps = tl.where(o_tap == i_y * K + i_x, b_taps + tl.sum(b), b_taps)
                b_x0 = b_x1
                b_x1 = b_x2
                b_x2 = b_x3

    tl.store(p_partial + i_program * K * K + o_tap, b_taps, mask=o_tap < K * K)


def _convolve(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    batch, channels, height, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile("convolve", width)
    tiles_h, tiles_w = triton.cdiv(height, _ROWS * tile.block_g), triton.cdiv(width, tile.block_w)
    int64 = needs_int64(x, weight, y)
    launch(
        _convolve_kernel,
        batch * channels * tiles_h * tiles_w,
        x.device,
        p_x=x,
        p_weight=weight,
        p_y=y,
        C=channels,
        H=height,
        W=width,
        **image_strides(x),
        **image_strides(weight, "sw"),
        tiles_h=tiles_h,
        tiles_w=tiles_w,
        K=weight.shape[-1],
        TURNED=turned,
        BLOCK_G=tile.block_g,
        BLOCK_W=tile.block_w,
        INT64=int64,
        num_warps=tile.num_warps * (2 if int64 else 1),  # row offsets stay in registers, twice as wide
        num_stages=1,
    )
    return y


def _correlate(grad_y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    planes, taps = batch * channels, weight.shape[-1] ** 2
    tile = _tile("correlate", width)
    tiles_w = triton.cdiv(width, tile.block_w)
    tiles = triton.cdiv(height, _ROWS * tile.block_g) * tiles_w
    tiles_per_program = max(1, min(8, planes * tiles // 4096))
    programs_per_plane = triton.cdiv(tiles, tiles_per_program)
    partial = torch.empty(planes, programs_per_plane, taps, dtype=torch.float32, device=x.device)
    launch(
        _correlate_kernel,
        planes * programs_per_plane,
        x.device,
        p_g=grad_y,
        p_x=x,
        p_partial=partial,
        C=channels,
        H=height,
        W=width,
        **image_strides(grad_y, "sg"),
        **image_strides(x),
        tiles_w=tiles_w,
        tiles=tiles,
        programs_per_plane=programs_per_plane,
        tiles_per_program=tiles_per_program,
        K=weight.shape[-1],
        TAPS=next_power_of_2(taps),
        BLOCK_G=tile.block_g,
        BLOCK_W=tile.block_w,
        INT64=needs_int64(x, grad_y, partial),
        num_warps=tile.num_warps,
        num_stages=1,
    )
    return partial.sum(1).to(weight.dtype).view(weight.shape)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    return _convolve(x, weight, turned=False)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_x = _convolve(grad_y, weight, turned=True) if want_x else x.new_empty(0)
    grad_weight = _correlate(grad_y, x, weight) if want_weight else weight.new_empty(0)
    return grad_x, grad_weight
