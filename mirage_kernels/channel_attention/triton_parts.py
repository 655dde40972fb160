"""What the Triton kernels of both attention operators share: tiles of a head, the small d x d matrices, and the passes
over q and k.

Sums over the pixels are cut into `splits` per (sample, head), added up in a second kernel: no atomics, the same bits
every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import (
    is_line,
    launch,
    needs_int64,
    pixel_offsets,
    plane_strides,
    precision_of_widened,
)
from mirage_kernels.channel_attention.arguments import small_matrices

NORM_EPS = 1e-12  # of torch.nn.functional.normalize


@dataclass(frozen=True)
class HeadTile:
    """A program that holds the channels of one head for `block_n` neighbouring pixels, `blocks` times over."""

    batch: int
    heads: int
    d: int
    pixels: int
    width: int
    block_d: int  # d, padded to a power of two that tl.dot takes
    block_n: int
    splits: int  # programs per (sample, head)
    blocks: int  # runs of block_n pixels per program
    precision: str  # of tl.dot

    @property
    def programs(self) -> int:
        return self.batch * self.heads * self.splits

    def sizes(self) -> tuple[int, ...]:
        return self.pixels, self.width, self.heads, self.splits, self.blocks

    def options(self, *tensors: Tensor) -> dict[str, Any]:
        """The constexpr arguments; `tensors` are all that the kernel addresses."""
        return {
            "D": self.d,
            "BLOCK_D": self.block_d,
            "BLOCK_N": self.block_n,
            "LINE": all(is_line(t) for t in tensors),
            "INT64": needs_int64(*tensors),
            "PRECISION": self.precision,
            "num_warps": 4 if self.block_d <= 32 else 8,
            "num_stages": 1,
        }


def head_tile(x: Tensor, heads: int, elements: int = 2048, most_splits: int = 128) -> HeadTile:
    """Tiles of about `elements` values, at most `most_splits` programs per head."""
    batch, channels, height, width = x.shape
    d, pixels = channels // heads, height * width
    block_d = max(16, next_power_of_2(d))
    block_n = max(16, min(128, elements // block_d))
    blocks = triton.cdiv(triton.cdiv(pixels, block_n), most_splits) if pixels else 1
    splits = triton.cdiv(pixels, block_n * blocks)
    precision = precision_of_widened(x.dtype)
    return HeadTile(batch, heads, d, pixels, width, block_d, block_n, splits, blocks, precision)


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
def _gram_kernel(
    p_q,  # [B, C, H, W], any strides
    p_k,  # [B, C, H, W], any strides
    p_partial,  # [programs, d + 2, d]: q k^T, |q|^2, |k|^2
    N,
    W,
    HEADS,
    splits,
    blocks,
    sq_b,
    sq_c,
    sq_row,
    sq_pixel,
    sk_b,
    sk_c,
    sk_row,
    sk_pixel,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // splits
    i_b, i_c = i_head // HEADS, i_head % HEADS * D
    i_first = i_program % splits * blocks
    o_d = tl.arange(0, BLOCK_D)
    b_gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    b_qq = tl.zeros([BLOCK_D], tl.float32)
    b_kk = tl.zeros([BLOCK_D], tl.float32)
    for i in range(blocks):
        o_n = (i_first + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = (o_d < D)[:, None] & (o_n < N)[None, :]
        o_q = tile_offsets(i_b, i_c, o_d, o_n, W, sq_b, sq_c, sq_row, sq_pixel, LINE)
        o_k = tile_offsets(i_b, i_c, o_d, o_n, W, sk_b, sk_c, sk_row, sk_pixel, LINE)
        b_q = tl.load(p_q + o_q, mask=m, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_k, mask=m, other=0.0).to(tl.float32)
        b_gram += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_qq += tl.sum(b_q * b_q, 1)
        b_kk += tl.sum(b_k * b_k, 1)
    p_out = p_partial + i_program * (D + 2) * D
    store_matrix(p_out, b_gram, o_d, D)
    tl.store(p_out + D * D + o_d, b_qq, mask=o_d < D)
    tl.store(p_out + D * D + D + o_d, b_kk, mask=o_d < D)


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


@triton.jit
def _softmax_kernel(
    p_partial,
    p_temperature,
    p_matrices,
    HEADS,
    splits,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    softmax_of_head(i_head, p_partial, p_temperature, p_matrices, HEADS, splits, EPS, D, BLOCK_D, BLOCK_S)


@triton.jit
def _softmax_backward_kernel(
    p_partial,  # [B * heads, splits, d, d]: parts of the gradient of attn
    p_temperature,  # [heads]
    p_matrices,  # [B * heads, 2 d + 2, d]
    p_small,  # [B * heads, d + 2, d]: the gradient of q k^T, then what q and k are scaled by in their own gradients
    p_grad_t,  # [B * heads]
    HEADS,
    splits,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_grad = sum_matrices(p_partial + i_head * splits * D * D, splits, D * D, D, BLOCK_D, BLOCK_S)
    p_in = p_matrices + i_head * (2 * D + 2) * D
    b_attn = load_matrix(p_in, o_d, D)
    b_gram = load_matrix(p_in + D * D, o_d, D)
    b_q = tl.load(p_in + 2 * D * D + o_d, mask=m_d, other=1.0)
    b_k = tl.load(p_in + 2 * D * D + D + o_d, mask=m_d, other=1.0)
    b_iq = 1.0 / tl.maximum(b_q, EPS)
    b_ik = 1.0 / tl.maximum(b_k, EPS)
    t = tl.load(p_temperature + i_head % HEADS).to(tl.float32)
    b_grad_s = b_attn * (b_grad - tl.sum(b_grad * b_attn, 1)[:, None])
    b_cosine = b_gram * b_iq[:, None] * b_ik[None, :]
    b_product = b_grad_s * b_cosine
    b_grad_gram = b_grad_s * b_iq[:, None] * b_ik[None, :] * t
    # Below eps F.normalize divides by a constant, and the norm has no gradient.
    b_scale_q = tl.where(b_q < EPS, 0.0, -t * tl.sum(b_product, 1) * b_iq * b_iq)
    b_scale_k = tl.where(b_k < EPS, 0.0, -t * tl.sum(b_product, 0) * b_ik * b_ik)
    p_out = p_small + i_head * (D + 2) * D
    store_matrix(p_out, b_grad_gram, o_d, D)
    tl.store(p_out + D * D + o_d, b_scale_q, mask=m_d)
    tl.store(p_out + D * D + D + o_d, b_scale_k, mask=m_d)
    tl.store(p_grad_t + i_head, tl.sum(tl.sum(b_product, 1), 0))


@triton.jit
def _grad_qk_kernel(
    p_q,  # [B, C, H, W], any strides
    p_k,  # [B, C, H, W], any strides
    p_small,  # [B * heads, d + 2, d]
    p_grad_q,  # [B, C, N]
    p_grad_k,  # [B, C, N]
    N,
    W,
    HEADS,
    splits,
    blocks,
    sq_b,
    sq_c,
    sq_row,
    sq_pixel,
    sk_b,
    sk_c,
    sk_row,
    sk_pixel,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // splits
    i_b, i_c = i_head // HEADS, i_head % HEADS * D
    o_d = tl.arange(0, BLOCK_D)
    o_n = i_program % splits * BLOCK_N + tl.arange(0, BLOCK_N)  # blocks is 1
    m = (o_d < D)[:, None] & (o_n < N)[None, :]
    p_in = p_small + i_head * (D + 2) * D
    b_m = load_matrix(p_in, o_d, D)
    b_scale_q = tl.load(p_in + D * D + o_d, mask=o_d < D, other=0.0)
    b_scale_k = tl.load(p_in + D * D + D + o_d, mask=o_d < D, other=0.0)
    o_q = tile_offsets(i_b, i_c, o_d, o_n, W, sq_b, sq_c, sq_row, sq_pixel, LINE)
    o_k = tile_offsets(i_b, i_c, o_d, o_n, W, sk_b, sk_c, sk_row, sk_pixel, LINE)
    b_q = tl.load(p_q + o_q, mask=m, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + o_k, mask=m, other=0.0).to(tl.float32)
    b_grad_q = tl.dot(b_m, b_k, input_precision=PRECISION) + b_q * b_scale_q[:, None]
    b_grad_k = tl.dot(tl.trans(b_m), b_q, input_precision=PRECISION) + b_k * b_scale_k[:, None]
    o_out = ((i_b * HEADS * D + i_c) + o_d)[:, None] * N + o_n[None, :]
    tl.store(p_grad_q + o_out, b_grad_q.to(p_grad_q.dtype.element_ty), mask=m)
    tl.store(p_grad_k + o_out, b_grad_k.to(p_grad_k.dtype.element_ty), mask=m)


def small_options(block_d: int, d: int) -> dict[str, Any]:
    """Of a program that works on the d x d matrices of a head."""
    block_s = max(1, min(16, 4096 // block_d**2))
    return {"EPS": NORM_EPS, "D": d, "BLOCK_D": block_d, "BLOCK_S": block_s, "num_warps": 4}


def attention_matrices(q: Tensor, k: Tensor, temperature: Tensor, num_heads: int) -> Tensor:
    """What :func:`~mirage_kernels.channel_attention.arguments.small_matrices` describes, filled in."""
    tile = head_tile(q, num_heads)
    matrices = small_matrices(q, num_heads, torch.float32)
    partial = torch.empty(tile.programs, tile.d + 2, tile.d, dtype=torch.float32, device=q.device)
    strides = (*plane_strides(q), *plane_strides(k))
    launch(_gram_kernel, tile.programs, q.device, q, k, partial, *tile.sizes(), *strides, **tile.options(q, k))
    arguments = (partial, temperature.reshape(num_heads), matrices, num_heads, tile.splits)
    launch(_softmax_kernel, tile.batch * num_heads, q.device, *arguments, **small_options(tile.block_d, tile.d))
    return matrices


def softmax_backward(partial: Tensor, splits: int, temperature: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """From `splits` parts of the gradient of attn [B, heads, splits, d, d] what the gradients of q and k are made of,
    [B * heads, d + 2, d], and the gradient of temperature. `matrices`: see `attention_matrices`."""
    batch, heads, _, d = matrices.shape
    small = torch.empty(batch * heads, d + 2, d, dtype=torch.float32, device=partial.device)
    grad_t = torch.empty(batch, heads, dtype=torch.float32, device=partial.device)
    arguments = (partial, temperature.reshape(heads), matrices, small, grad_t, heads, splits)
    options = small_options(max(16, next_power_of_2(d)), d)
    launch(_softmax_backward_kernel, batch * heads, partial.device, *arguments, **options)
    return small, grad_t.sum(0).reshape(temperature.shape).to(temperature.dtype)


def attention_matrices_backward(
    partial: Tensor, tile: HeadTile, q: Tensor, k: Tensor, temperature: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and temperature, given parts of the gradient of attn [programs of `tile`, d, d]."""
    heads, device = tile.heads, q.device
    small, grad_temperature = softmax_backward(partial, tile.splits, temperature, matrices)
    grad_q, grad_k = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (q, k))
    last = head_tile(q, heads, elements=1024, most_splits=2**31)
    strides = (*plane_strides(q), *plane_strides(k))
    arguments = (q, k, small, grad_q, grad_k, *last.sizes(), *strides)
    launch(_grad_qk_kernel, last.programs, device, *arguments, **last.options(q, k, grad_q))
    return grad_q, grad_k, grad_temperature


def attention_cases() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(label, x, matrices, temperature) on the meta device, for tools/compile_triton.py: the heads of the networks'
    stages (d = 8 or 10, but 16 or 20 in one head on the last decoder level), and a head of 64 channels."""
    from mirage_kernels._triton.cases import HEADS, MIRAGE_S, MIRAGE_T, meta, variants

    cases = list(variants())
    cases += [(f"float32 C={s[4][0]} {s[4][1]}x{s[4][1]}", s[4], torch.float32, False) for s in (MIRAGE_T, MIRAGE_S)]
    cases.append(("float32 d=64", (192, 224), torch.float32, False))
    for label, (channels, side), dtype, wide in cases:
        x = meta(1, channels // 3, side, side, dtype=dtype, wide=wide)
        heads = HEADS.get((channels, side), 1)
        yield label, x, small_matrices(x, heads, torch.float32), meta(heads, 1, 1)
