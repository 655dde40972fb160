"""``feed_forward_stage`` forward in Triton: two kernels, with only the activated hidden tensor between them.

The first normalises, mixes and activates: x is read, gelu(hidden) written. The second convolves, gates, mixes and adds
x: of the tensors in between none is written. Backward starts with the first again. Images too small to fill a GPU with
the second kernel's tiles are the composite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._runtime.library import is_exact
from mirage_kernels._triton import tiles as triton_tiles
from mirage_kernels._triton.launch import (
    gelu,
    image_strides,
    index_dtype,
    is_flat_plane,
    launch,
    needs_int64,
    pixel_offsets,
    plane_strides,
    pointers,
)
from mirage_kernels._triton.tiles import depthwise, image_tile_of, matrix, moments, normalised, precision
from mirage_kernels.feed_forward_stage.triton.plan import contract_tile, expand_tile
from mirage_kernels.feed_forward_stage.weights import OF_MIRAGE, FeedForwardWeights, Form


@triton.jit
def _expand_kernel(
    p_x,  # [B, C, H, W], any strides
    p_norm_weight,  # [C], like the next
    p_norm_bias,
    p_weight,  # [OUT, C]
    p_activated,  # [B, OUT, N]
    p_mean,  # [B, N], like the next; only with STATISTICS
    p_rstd,
    eps,
    OUT,
    N,
    W,
    splits,  # programs that share the hidden channels of the same pixels
    s_b,
    s_c,
    s_row,
    s_pixel,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATISTICS: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_split = i_program % splits
    blocks = tl.cdiv(N, BLOCK_N)
    i_b = i_program // splits // blocks
    o_n = i_program // splits % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_x = pixel_offsets(o_n, W, s_row, s_pixel, LINE)
    p_x += i_b * s_b
    b_mean, b_rstd = moments(p_x, index_dtype(tl.arange(0, BLOCK_C), INT64), o_x, s_c, m_n, eps, C)
    if STATISTICS:
        if i_split == 0:
            tl.store(p_mean + i_b * N + o_n, b_mean, mask=m_n)
            tl.store(p_rstd + i_b * N + o_n, b_rstd, mask=m_n)
    share = tl.cdiv(tl.cdiv(OUT, BLOCK_M), splits) * BLOCK_M
    for i_m in range(i_split * share, tl.minimum((i_split + 1) * share, OUT), BLOCK_M):
        o_m = index_dtype(i_m + tl.arange(0, BLOCK_M), INT64)
        m_m = o_m < OUT
        b_hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_k in range(0, C, BLOCK_K):
            o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
            m_k = o_k < C
            b_y = normalised(p_x, p_norm_weight, p_norm_bias, o_k, m_k, o_x, s_c, m_n, b_mean, b_rstd)
            b_y = b_y.to(p_activated.dtype.element_ty)
            b_w = matrix(p_weight, o_m, m_m, o_k, m_k, C).to(p_activated.dtype.element_ty)
            b_hidden = tl.dot(b_w, b_y, b_hidden, input_precision=PRECISION)
        o_out = (i_b * OUT + o_m[:, None]) * N + o_n[None, :]
        m = m_m[:, None] & m_n[None, :]
        tl.store(p_activated + o_out, gelu(b_hidden).to(p_activated.dtype.element_ty), mask=m)


@triton.jit
def _contract_kernel(
    p_activated,  # [B, 2 M, H, W], contiguous
    p_taps,  # [2 M, 9]
    p_weight,  # [C, M]
    p_x,  # [B, C, H, W], any strides
    p_y,  # [B, C, H, W], contiguous
    M,
    H,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0)
    if INT64:
        i_tile = i_tile.to(tl.int64)
    i_b, o_y, o_x = image_tile_of(i_tile, H, W, BLOCK_H, BLOCK_W)
    m_n = (o_y < H) & (o_x < W)
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    m_c = o_c < C
    p_first = p_activated + i_b * 2 * M * H * W
    p_second = p_first + index_dtype(M, INT64) * H * W
    b_y = tl.zeros([BLOCK_C, BLOCK_H * BLOCK_W], tl.float32)
    for i_k in range(0, M, BLOCK_K):
        o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
        m_k = o_k < M
        b_gate = gelu(depthwise(p_first, p_taps, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 3))
        b_gate *= depthwise(p_second, p_taps + M * 9, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 3)
        b_gate = b_gate.to(p_activated.dtype.element_ty)
        b_w = matrix(p_weight, o_c, m_c, o_k, m_k, M).to(p_activated.dtype.element_ty)
        b_y = tl.dot(b_w, b_gate, b_y, input_precision=PRECISION)
    m = m_c[:, None] & m_n[None, :]
    o_in = i_b * s_b + o_c[:, None] * s_c + (o_y * s_row + o_x * s_pixel)[None, :]
    b_y += tl.load(p_x + o_in, mask=m, other=0.0).to(tl.float32)
    o_out = (i_b * C + o_c[:, None]) * H * W + (o_y * W + o_x)[None, :]
    tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m)


class Norm(NamedTuple):
    """Statistics of the layer norm at each pixel, [B, H, W] in float32."""

    mean: Tensor
    rstd: Tensor


def forward(x: Tensor, of_stage: FeedForwardWeights, form: Form) -> Tensor:
    w = FeedForwardWeights(*(t.contiguous() for t in of_stage[: len(OF_MIRAGE)]))
    activated, _ = expand(x, w, form.eps)
    channels, (doubled, height, width) = x.shape[1], activated.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile, image = expand_tile(channels, is_exact(x.dtype)), contract_tile(x)
    wide = needs_int64(x, activated)
    launch(
        _contract_kernel,
        image.programs(x),
        x.device,
        p_activated=activated,
        p_taps=w.dwconv,
        p_weight=w.project_out,
        p_x=x,
        p_y=y,
        M=doubled // 2,
        H=height,
        W=width,
        **image_strides(x),
        C=channels,
        BLOCK_C=tile.block_c,
        BLOCK_K=16,
        BLOCK_H=image.block_h,
        BLOCK_W=image.block_w,
        INT64=wide or needs_int64(y),
        PRECISION=precision(x.dtype),
        num_warps=image.warps(wide),
        num_stages=1,  # more would hold 18 tiles of shared memory ready, and leave room for one program
    )
    return y


def expand(x: Tensor, w: FeedForwardWeights, eps: float, keep_norm: bool = False) -> tuple[Tensor, Norm]:
    """gelu(project_in(norm(x))), and the norm's statistics, which are empty unless `keep_norm`."""
    batch, channels, height, width = x.shape
    doubled, pixels = w.dwconv.shape[0], height * width
    tile = expand_tile(channels, is_exact(x.dtype))
    activated = torch.empty(batch, doubled, height, width, dtype=x.dtype, device=x.device)
    shape = (batch, height, width) if keep_norm else (0,)
    norm = Norm(*(torch.empty(shape, dtype=torch.float32, device=x.device) for _ in Norm._fields))
    blocks = batch * triton.cdiv(pixels, tile.block_n)
    splits = max(1, min(triton.cdiv(doubled, tile.block_m), 2 * triton_tiles.FILL // max(blocks, 1)))
    wide = needs_int64(x, activated)
    launch(
        _expand_kernel,
        blocks * splits,
        x.device,
        p_x=x,
        **pointers(w, "norm_weight", "norm_bias"),
        p_weight=w.project_in,
        p_activated=activated,
        **pointers(norm, "mean", "rstd"),
        eps=eps,
        OUT=doubled,
        N=pixels,
        W=width,
        splits=splits,
        **plane_strides(x),
        C=channels,
        BLOCK_C=tile.block_c,
        BLOCK_K=tile.block_k,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        STATISTICS=keep_norm,
        LINE=is_flat_plane(x),
        INT64=wide,
        PRECISION=precision(x.dtype),
        num_warps=8 if wide else 4,
        num_stages=2,
    )
    return activated, norm
