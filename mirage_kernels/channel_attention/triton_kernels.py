"""``channel_attention`` in Triton: the passes over v; those over q and k are in triton_parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.launch import launch, plane_strides
from mirage_kernels.channel_attention.triton_parts import (
    attention_cases,
    attention_matrices,
    attention_matrices_backward,
    head_tile,
    load_matrix,
    store_matrix,
    tile_offsets,
)


@triton.jit
def _apply_kernel(
    p_v,  # [B, C, H, W], any strides
    p_matrices,  # [B * heads, 2 d + 2, d], of which attn comes first
    p_out,  # [B, C, N]
    N,
    W,
    HEADS,
    splits,
    blocks,
    s_b,
    s_c,
    s_row,
    s_pixel,
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
    b_attn = load_matrix(p_matrices + i_head * (2 * D + 2) * D, o_d, D)
    o_v = tile_offsets(i_b, i_c, o_d, o_n, W, s_b, s_c, s_row, s_pixel, LINE)
    b_v = tl.load(p_v + o_v, mask=m, other=0.0).to(tl.float32)
    b_out = tl.dot(b_attn, b_v, input_precision=PRECISION)
    o_out = ((i_b * HEADS * D + i_c) + o_d)[:, None] * N + o_n[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _apply_backward_kernel(
    p_grad,  # [B, C, H, W], any strides
    p_v,  # [B, C, H, W], any strides
    p_matrices,  # [B * heads, 2 d + 2, d], of which attn comes first
    p_grad_v,  # [B, C, N]
    p_partial,  # [programs, d, d]: parts of the gradient of attn
    N,
    W,
    HEADS,
    splits,
    blocks,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    s_b,
    s_c,
    s_row,
    s_pixel,
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
    b_attn = load_matrix(p_matrices + i_head * (2 * D + 2) * D, o_d, D)
    b_sum = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for i in range(blocks):
        o_n = (i_first + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = (o_d < D)[:, None] & (o_n < N)[None, :]
        o_g = tile_offsets(i_b, i_c, o_d, o_n, W, sg_b, sg_c, sg_row, sg_pixel, LINE)
        o_v = tile_offsets(i_b, i_c, o_d, o_n, W, s_b, s_c, s_row, s_pixel, LINE)
        b_g = tl.load(p_grad + o_g, mask=m, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_v, mask=m, other=0.0).to(tl.float32)
        b_sum += tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        b_grad_v = tl.dot(tl.trans(b_attn), b_g, input_precision=PRECISION)
        o_out = ((i_b * HEADS * D + i_c) + o_d)[:, None] * N + o_n[None, :]
        tl.store(p_grad_v + o_out, b_grad_v.to(p_grad_v.dtype.element_ty), mask=m)
    store_matrix(p_partial + i_program * D * D, b_sum, o_d, D)


def forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    matrices = attention_matrices(q, k, temperature, num_heads)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = head_tile(v, num_heads, most_splits=2**31)
    arguments = (v, matrices, out, *tile.sizes(), *plane_strides(v))
    launch(_apply_kernel, tile.programs, v.device, *arguments, **tile.options(v, out))
    return out, matrices


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = head_tile(v, matrices.shape[1], elements=1024)
    sums = torch.empty(tile.programs, tile.d, tile.d, dtype=torch.float32, device=v.device)
    strides = (*plane_strides(grad_out), *plane_strides(v))
    arguments = (grad_out, v, matrices, grad_v, sums, *tile.sizes(), *strides)
    launch(_apply_backward_kernel, tile.programs, v.device, *arguments, **tile.options(grad_out, v, grad_v))
    grad_q, grad_k, grad_temperature = attention_matrices_backward(sums, tile, q, k, temperature, matrices)
    return grad_q, grad_k, grad_v, grad_temperature


def triton_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_triton.py compiles for GPUs that are not there."""
    for label, x, matrices, temperature in attention_cases():
        yield label, partial(forward, x, x, x, temperature, matrices.shape[1])
        yield label, partial(backward, x, x, x, x, temperature, matrices)
