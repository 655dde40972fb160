"""The gradient of ``feed_forward_stage`` in Triton: three kernels, after the first one of forward.

1. :func:`gate_gradient_kernel`: from the activated hidden tensor and the gradient of y, the gradient of the depthwise
   convolution's output (written) and that of project_out.
2. :func:`hidden_gradient_kernel`: through the convolution and the first GELU, whose argument is computed again from x:
   the gradient of the hidden tensor (written), those of dwconv and project_in.
3. :func:`norm_gradient_kernel`: through project_in and the layer norm, and the sum with the gradient of y.

A program of the first two owns some hidden channels and walks over tiles of the image, so that it can hold their part
of a weight's gradient. Parts are added up afterwards, in the same order every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._runtime.library import is_exact
from mirage_kernels._triton import tiles as triton_tiles
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import (
    gelu,
    gelu_slope,
    image_strides,
    index_dtype,
    is_flat_plane,
    launch,
    needs_int64,
    pixel_offsets,
    plane_strides,
    pointers,
)
from mirage_kernels._triton.tiles import (
    depthwise,
    filling_run,
    filling_tile,
    image_tile_of,
    matrix,
    precision,
    scaled,
)
from mirage_kernels.feed_forward_stage.triton.forward import Norm, expand
from mirage_kernels.feed_forward_stage.triton.plan import most_pixels
from mirage_kernels.feed_forward_stage.weights import OF_MIRAGE, FeedForwardWeights, Form


@triton.jit
def _channels_and_tiles(COUNT, tiles, splits, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """Channels of a program, the part it computes, and its first and last tile. Neighbours share tiles."""
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    blocks = tl.cdiv(COUNT, BLOCK)
    i_split = i_program // blocks
    per_split = tl.cdiv(tiles, splits)
    i_first = i_split * per_split
    o_k = i_program % blocks * BLOCK + tl.arange(0, BLOCK)
    return o_k, i_split, i_first, tl.minimum(i_first + per_split, tiles)


@triton.jit
def gate_gradient_kernel(
    p_activated,  # [B, 2 M, H, W], contiguous
    p_grad_y,  # [B, C, H, W], any strides
    p_taps,  # [2 M, 9]
    p_weight,  # [C, M]
    p_grad_d,  # [B, 2 M, H, W], contiguous
    p_partial,  # [splits, ...]: of each part the gradient of p_weight, and what the next kernel adds
    M,
    H,
    W,
    tiles,
    splits,
    s_part,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_k, i_split, i_first, i_end = _channels_and_tiles(M, tiles, splits, BLOCK_K, INT64)
    o_k = index_dtype(o_k, INT64)
    m_k = o_k < M
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    m_c = o_c < C
    dtype = p_grad_d.dtype.element_ty
    half = index_dtype(M, INT64) * H * W
    b_w = tl.trans(matrix(p_weight, o_c, m_c, o_k, m_k, M)).to(dtype)
    b_grad_w = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for i_tile in range(i_first, i_end):
        i_b, o_y, o_x = image_tile_of(i_tile, H, W, BLOCK_H, BLOCK_W)
        m_n = (o_y < H) & (o_x < W)
        o_g = i_b * sg_b + o_c[:, None] * sg_c + (o_y * sg_row + o_x * sg_pixel)[None, :]
        b_g = tl.load(p_grad_y + o_g, mask=m_c[:, None] & m_n[None, :], other=0.0).to(dtype)
        b_grad = tl.dot(b_w, b_g, input_precision=PRECISION)
        p_first = p_activated + i_b * 2 * half
        b_d2 = depthwise(p_first + half, p_taps + M * 9, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 3)
        b_d1 = depthwise(p_first, p_taps, o_k, m_k, o_y, o_x, H, W, H * W, W, 1, 3)
        b_gate = gelu(b_d1)
        m = m_k[:, None] & m_n[None, :]
        p_out = p_grad_d + i_b * 2 * half + o_k[:, None] * H * W + (o_y * W + o_x)[None, :]
        tl.store(p_out, (b_grad * b_d2 * gelu_slope(b_d1)).to(dtype), mask=m)
        tl.store(p_out + half, (b_grad * b_gate).to(dtype), mask=m)
        b_gated = tl.where(m_n[None, :], b_gate * b_d2, 0.0)  # its window may lie on a pixel that is not finite
        b_grad_w = tl.dot(b_g, tl.trans(b_gated.to(dtype)), b_grad_w, input_precision=PRECISION)
    o_w = i_split * s_part + o_c[:, None] * M + o_k[None, :]
    tl.store(p_partial + o_w, b_grad_w, mask=m_c[:, None] & m_k[None, :])


@triton.jit
def hidden_gradient_kernel(
    p_x,  # [B, C, H, W], any strides
    p_mean,  # [B, N], like the next
    p_rstd,
    p_norm_weight,  # [C], like the next
    p_norm_bias,
    p_weight,  # [OUT, C]
    p_taps,  # [OUT, 9]
    p_grad_d,  # [B, OUT, H, W], contiguous
    p_grad_hidden,  # [B, OUT, H, W], contiguous
    p_partial,  # [splits, ...]: of each part the gradients of p_weight and, OUT * C further on, of p_taps
    OUT,
    H,
    W,
    tiles,
    splits,
    s_part,
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
    o_k, i_split, i_first, i_end = _channels_and_tiles(OUT, tiles, splits, BLOCK_K, INT64)
    o_k = index_dtype(o_k, INT64)
    m_k = o_k < OUT
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    m_c = o_c < C
    o_t = tl.arange(0, 16)  # the taps, padded
    dtype = p_grad_hidden.dtype.element_ty
    b_w = matrix(p_weight, o_k, m_k, o_c, m_c, C).to(dtype)
    b_grad_w = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    b_grad_taps = tl.zeros([BLOCK_K, 16], tl.float32)
    for i_tile in range(i_first, i_end):
        i_b, o_y, o_x = image_tile_of(i_tile, H, W, BLOCK_H, BLOCK_W)
        m_n = (o_y < H) & (o_x < W)
        o_n = o_y * W + o_x
        b_mean = tl.load(p_mean + i_b * H * W + o_n, mask=m_n, other=0.0)
        b_rstd = tl.load(p_rstd + i_b * H * W + o_n, mask=m_n, other=0.0)
        o_p = o_y * s_row + o_x * s_pixel
        b_x = tl.load(p_x + i_b * s_b + o_c[:, None] * s_c + o_p[None, :], mask=m_c[:, None] & m_n[None, :], other=0.0)
        b_hat = (b_x.to(tl.float32) - b_mean[None, :]) * b_rstd[None, :]
        b_normal = scaled(b_hat, p_norm_weight, p_norm_bias, o_c, m_c).to(dtype)
        b_hidden = tl.dot(b_w, b_normal, input_precision=PRECISION)
        b_a = tl.where(m_n[None, :], gelu(b_hidden), 0.0)
        b_grad = tl.zeros([BLOCK_K, BLOCK_H * BLOCK_W], tl.float32)
        p_plane = p_grad_d + (i_b * OUT + o_k[:, None]) * H * W
        for i in range(3):
            o_r = o_y - (i - 1)  # what the tap took from the pixel, at the pixel that it gave it to
            p_row = p_plane + (o_r * W + o_x)[None, :]
            for j in tl.static_range(3):
                m = m_n & (o_r >= 0) & (o_r < H) & (o_x + (1 - j) >= 0) & (o_x + (1 - j) < W)
                b_d = tl.load(p_row + (1 - j), mask=m_k[:, None] & m[None, :], other=0.0).to(tl.float32)
                b_tap = tl.load(p_taps + o_k * 9 + (i * 3 + j), mask=m_k, other=0.0).to(tl.float32)
                b_grad += b_tap[:, None] * b_d
                b_taken = tl.where(m[None, :], b_a, 0.0)  # zero times what is not finite is no zero
                b_grad_taps += tl.where((o_t == i * 3 + j)[None, :], tl.sum(b_taken * b_d, 1)[:, None], 0.0)
        b_grad = tl.where(m_n[None, :], b_grad * gelu_slope(b_hidden), 0.0).to(dtype)
        p_out = p_grad_hidden + (i_b * OUT + o_k[:, None]) * H * W + o_n[None, :]
        tl.store(p_out, b_grad, mask=m_k[:, None] & m_n[None, :])
        b_grad_w = tl.dot(b_grad, tl.trans(b_normal), b_grad_w, input_precision=PRECISION)
    p_partial += i_split * s_part
    tl.store(p_partial + o_k[:, None] * C + o_c[None, :], b_grad_w, mask=m_k[:, None] & m_c[None, :])
    o_w = OUT * C + o_k[:, None] * 9 + o_t[None, :]
    tl.store(p_partial + o_w, b_grad_taps, mask=m_k[:, None] & (o_t < 9)[None, :])


@triton.jit
def norm_gradient_kernel(
    p_grad_hidden,  # [B, OUT, N]
    p_weight,  # [OUT, C]
    p_x,  # [B, C, H, W], any strides, like the next
    p_grad_y,
    p_mean,  # [B, N], like the next
    p_rstd,
    p_norm_weight,  # [C]
    p_grad_x,  # [B, C, N]
    p_partial,  # [programs, 2, C]: of the norm's weight and bias
    OUT,
    N,
    W,
    blocks_per_program,
    s_b,
    s_c,
    s_row,
    s_pixel,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    LINE_G: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    programs = tl.cdiv(blocks, blocks_per_program)
    i_b = i_program // programs
    i_first = i_program % programs * blocks_per_program
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    m_c = o_c < C
    dtype = p_grad_hidden.dtype.element_ty
    b_w = tl.load(p_norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_grad_w = tl.zeros([BLOCK_C], tl.float32)
    b_grad_b = tl.zeros([BLOCK_C], tl.float32)
    for i_block in range(i_first, tl.minimum(i_first + blocks_per_program, blocks)):
        o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m = m_c[:, None] & m_n[None, :]
        b_g = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        for i_k in range(0, OUT, BLOCK_K):
            o_k = index_dtype(i_k + tl.arange(0, BLOCK_K), INT64)
            m_k = o_k < OUT
            b_weight = tl.trans(matrix(p_weight, o_k, m_k, o_c, m_c, C)).to(dtype)
            o_h = (i_b * OUT + o_k[:, None]) * N + o_n[None, :]
            b_hidden = tl.load(p_grad_hidden + o_h, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_g = tl.dot(b_weight, b_hidden, b_g, input_precision=PRECISION)
        b_mean = tl.load(p_mean + i_b * N + o_n, mask=m_n, other=0.0)
        b_rstd = tl.load(p_rstd + i_b * N + o_n, mask=m_n, other=0.0)
        o_x = i_b * s_b + o_c[:, None] * s_c + pixel_offsets(o_n, W, s_row, s_pixel, LINE)[None, :]
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
        b_hat = tl.where(m, (b_x - b_mean[None, :]) * b_rstd[None, :], 0.0)
        b_grad_w += tl.sum(b_g * b_hat, 1)
        b_grad_b += tl.sum(b_g, 1)
        b_g *= b_w[:, None]
        b_along = tl.sum(b_g * b_hat, 0) / C
        b_g = (b_g - (tl.sum(b_g, 0) / C)[None, :] - b_hat * b_along[None, :]) * b_rstd[None, :]
        o_g = i_b * sg_b + o_c[:, None] * sg_c + pixel_offsets(o_n, W, sg_row, sg_pixel, LINE_G)[None, :]
        b_g += tl.load(p_grad_y + o_g, mask=m, other=0.0).to(tl.float32)
        o_out = (i_b * C + o_c[:, None]) * N + o_n[None, :]
        tl.store(p_grad_x + o_out, b_g.to(p_grad_x.dtype.element_ty), mask=m)
    p_partial += i_program * 2 * C + o_c
    tl.store(p_partial, b_grad_w, mask=m_c)
    tl.store(p_partial + C, b_grad_b, mask=m_c)


def backward(grad_y: Tensor, x: Tensor, of_stage: FeedForwardWeights, form: Form) -> tuple[Tensor, ...]:
    """The gradients of x and of the weights that MIRAGE has, each in its own dtype."""
    weights = of_stage[: len(OF_MIRAGE)]
    w = FeedForwardWeights(*(t.contiguous() for t in weights))
    activated, norm = expand(x, w, form.eps, keep_norm=True)
    grad_x, grads = _gradients(grad_y, x, w, activated, norm)
    return grad_x, *(g.to(t.dtype).view(t.shape) for g, t in zip(grads[: len(weights)], weights, strict=True))


def _gradients(
    grad_y: Tensor, x: Tensor, w: FeedForwardWeights, activated: Tensor, norm: Norm
) -> tuple[Tensor, FeedForwardWeights]:
    """Of x and, in float32, of the contiguous weights. `activated`: gelu(project_in(normal)), [B, 2M, H, W]."""
    channels, doubled = x.shape[1], activated.shape[1]
    block_c = max(16, next_power_of_2(channels))
    exact = is_exact(x.dtype)
    tile = filling_tile(x, most_pixels(block_c, exact))
    tiles = tile.programs(x)
    wide = needs_int64(x, grad_y, activated)
    options: dict[str, Any] = {
        "C": channels,
        "BLOCK_C": block_c,
        "BLOCK_H": tile.block_h,
        "BLOCK_W": tile.block_w,
        "INT64": wide,
        "PRECISION": precision(x.dtype),
        "num_stages": 1,
    }
    splits = min(tiles, max(1, triton_tiles.FILL // triton.cdiv(doubled // 2, 16)))
    sizes = [channels * doubled // 2, channels * doubled, 9 * doubled]  # of project_out, project_in and dwconv
    partial = torch.empty(splits, sum(sizes), dtype=torch.float32, device=x.device)
    grad_d = torch.empty_like(activated)
    sizes_of_both = {"H": x.shape[2], "W": x.shape[3], "tiles": tiles, "splits": splits, "s_part": sum(sizes)}
    launch(
        gate_gradient_kernel,
        triton.cdiv(doubled // 2, 16) * splits,
        x.device,
        p_activated=activated,
        p_grad_y=grad_y,
        p_taps=w.dwconv,
        p_weight=w.project_out,
        p_grad_d=grad_d,
        p_partial=partial,
        M=doubled // 2,
        **image_strides(grad_y, "sg"),
        **sizes_of_both,
        BLOCK_K=16,
        num_warps=8 if wide or exact else 4,
        **options,
    )
    grad_hidden = activated  # which has been read
    launch(
        hidden_gradient_kernel,
        triton.cdiv(doubled, 16) * splits,
        x.device,
        p_x=x,
        **pointers(norm, "mean", "rstd"),
        **pointers(w, "norm_weight", "norm_bias"),
        p_weight=w.project_in,
        p_taps=w.dwconv,
        p_grad_d=grad_d,
        p_grad_hidden=grad_hidden,
        p_partial=partial[:, sizes[0] :],
        OUT=doubled,
        **image_strides(x),
        **sizes_of_both,
        BLOCK_K=16,
        num_warps=8 if wide or exact or (x.dtype == torch.float32 and block_c * tile.pixels >= 2048) else 4,
        **options,
    )
    grad_out, grad_in, grad_taps = partial.sum(0).split(sizes)
    grad_x, grad_weight, grad_bias = _norm_gradient(grad_y, x, w, grad_hidden, norm, block_c)
    return grad_x, FeedForwardWeights(grad_weight, grad_bias, grad_in, grad_taps, grad_out)


def _norm_gradient(
    grad_y: Tensor, x: Tensor, w: FeedForwardWeights, grad_hidden: Tensor, norm: Norm, block_c: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    pixels = height * width
    exact = is_exact(x.dtype)
    block_n = filling_run(x, most_pixels(block_c, exact))
    blocks = triton.cdiv(pixels, block_n)
    per_program = max(1, batch * blocks // (8 * triton_tiles.FILL))
    programs = batch * triton.cdiv(blocks, per_program)
    partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = needs_int64(x, grad_y, grad_hidden)
    launch(
        norm_gradient_kernel,
        programs,
        x.device,
        p_grad_hidden=grad_hidden,
        p_weight=w.project_in,
        p_x=x,
        p_grad_y=grad_y,
        **pointers(norm, "mean", "rstd"),
        p_norm_weight=w.norm_weight,
        p_grad_x=grad_x,
        p_partial=partial,
        OUT=grad_hidden.shape[1],
        N=pixels,
        W=width,
        blocks_per_program=per_program,
        **plane_strides(x),
        **plane_strides(grad_y, "sg"),
        C=channels,
        BLOCK_C=block_c,
        BLOCK_K=32,
        BLOCK_N=block_n,
        LINE=is_flat_plane(x),
        LINE_G=is_flat_plane(grad_y),
        INT64=wide,
        PRECISION=precision(x.dtype),
        num_warps=8 if wide or exact or block_c > (64 if x.dtype == torch.float32 else 128) else 4,
        num_stages=2,
    )
    return grad_x, *partial.sum(0).unbind(0)
