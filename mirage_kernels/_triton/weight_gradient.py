"""The gradient of a channel product's weight in Triton: a matrix product over all pixels of a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton import tiles as triton_tiles
from mirage_kernels._triton.launch import index_dtype, is_flat_plane, launch, needs_int64, pixel_offsets, plane_strides
from mirage_kernels._triton.tiles import precision

BLOCK = 32
"""Channels of each factor that a program multiplies."""


@triton.jit
def _product_kernel(
    p_left,  # [B, R, H, W], any strides
    p_right,  # [B, S, H, W], any strides
    p_partial,  # [splits, R, S]
    R,
    S,
    N,
    W,
    blocks,  # runs of pixels, of all samples
    splits,
    sl_b,
    sl_c,
    sl_row,
    sl_pixel,
    sr_b,
    sr_c,
    sr_row,
    sr_pixel,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    columns = tl.cdiv(S, BLOCK_C)
    tiles = tl.cdiv(R, BLOCK_C) * columns
    i_split, i_tile = i_program // tiles, i_program % tiles
    o_r = index_dtype(i_tile // columns * BLOCK_C + tl.arange(0, BLOCK_C), INT64)
    o_s = index_dtype(i_tile % columns * BLOCK_C + tl.arange(0, BLOCK_C), INT64)
    of_sample = tl.cdiv(N, BLOCK_N)
    per_split = tl.cdiv(blocks, splits)
    b_sum = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for i in range(i_split * per_split, tl.minimum((i_split + 1) * per_split, blocks)):
        i_b = i // of_sample
        o_n = i % of_sample * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = (o_n < N)[None, :]
        o_l = i_b * sl_b + o_r[:, None] * sl_c + pixel_offsets(o_n, W, sl_row, sl_pixel, LINE)[None, :]
        b_left = tl.load(p_left + o_l, mask=(o_r < R)[:, None] & m_n, other=0.0)
        o_p = i_b * sr_b + o_s[:, None] * sr_c + pixel_offsets(o_n, W, sr_row, sr_pixel, LINE)[None, :]
        b_right = tl.load(p_right + o_p, mask=(o_s < S)[:, None] & m_n, other=0.0)
        b_sum = tl.dot(b_left, tl.trans(b_right), b_sum, input_precision=PRECISION)
    p_out = p_partial + (i_split * R + o_r[:, None]) * S + o_s[None, :]
    tl.store(p_out, b_sum, mask=(o_r < R)[:, None] & (o_s < S)[None, :])


def product_over_pixels(left: Tensor, right: Tensor) -> Tensor:
    """[R, S] in float32: the sums of left [B, R, H, W] times right [B, S, H, W], of one dtype, over samples and pixels.

    Summed in parts of runs of pixels, then the parts in order: the same bits every time.
    """
    batch, rows, height, width = left.shape
    columns, pixels = right.shape[1], height * width
    tiles = triton.cdiv(rows, BLOCK) * triton.cdiv(columns, BLOCK)
    block_n = 64
    blocks = batch * triton.cdiv(pixels, block_n)
    splits = max(1, min(blocks, 2 * triton_tiles.FILL // tiles))
    partial = torch.empty(splits, rows, columns, dtype=torch.float32, device=left.device)
    wide = needs_int64(left, right)
    launch(
        _product_kernel,
        tiles * splits,
        left.device,
        p_left=left,
        p_right=right,
        p_partial=partial,
        R=rows,
        S=columns,
        N=pixels,
        W=width,
        blocks=blocks,
        splits=splits,
        **plane_strides(left, "sl"),
        **plane_strides(right, "sr"),
        BLOCK_C=BLOCK,
        BLOCK_N=block_n,
        LINE=is_flat_plane(left) and is_flat_plane(right),
        INT64=wide,
        PRECISION=precision(left.dtype),
        num_warps=4,
        num_stages=2,
    )
    return partial.sum(0)
