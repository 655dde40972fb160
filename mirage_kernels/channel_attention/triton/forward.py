"""``channel_attention`` and ``channel_attention_fusion`` forward in Triton: the products of q and k, their softmax, and
the product with v, with the fusion of the branches or without."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.launch import index_dtype, launch, plane_strides, pointers
from mirage_kernels.channel_attention.matrices import small_matrices
from mirage_kernels.channel_attention.triton.device import load_matrix, softmax_of_head, store_matrix, tile_offsets
from mirage_kernels.channel_attention.triton.plan import head_tile, small_options
from mirage_kernels.tri_branch_fusion.triton import fuse


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
def apply_kernel(
    p_v,  # [B, C, H, W], any strides
    p_matrices,  # [B * heads, 2 d + 2, d], of which attn comes first
    p_conv,  # [B, C, H, W], any strides, like the next; these and the weights only with FUSE
    p_mlp,
    p_l_att,  # [1], like the next two
    p_l_conv,
    p_l_mlp,
    p_out,  # [B, C, N]; with FUSE [B, 3 C, N]
    N,
    W,
    HEADS,
    splits,
    blocks,
    s_b,
    s_c,
    s_row,
    s_pixel,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    sm_b,
    sm_c,
    sm_row,
    sm_pixel,
    FUSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """attn v; with FUSE, its fusion with the other two branches."""
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_head = i_program // splits
    i_b, i_c = i_head // HEADS, i_head % HEADS * D
    C = index_dtype(HEADS * D, INT64)
    o_d = tl.arange(0, BLOCK_D)
    o_n = i_program % splits * BLOCK_N + tl.arange(0, BLOCK_N)  # blocks is 1
    m = (o_d < D)[:, None] & (o_n < N)[None, :]
    b_attn = load_matrix(p_matrices + i_head * (2 * D + 2) * D, o_d, D)
    o_v = tile_offsets(i_b, i_c, o_d, o_n, W, s_b, s_c, s_row, s_pixel, LINE)
    b_v = tl.load(p_v + o_v, mask=m, other=0.0).to(tl.float32)
    b_a = tl.dot(b_attn, b_v, input_precision=PRECISION)
    if FUSE:
        o_g = tile_offsets(i_b, i_c, o_d, o_n, W, sg_b, sg_c, sg_row, sg_pixel, LINE)
        o_m = tile_offsets(i_b, i_c, o_d, o_n, W, sm_b, sm_c, sm_row, sm_pixel, LINE)
        b_g = tl.load(p_conv + o_g, mask=m, other=0.0).to(tl.float32)
        b_m = tl.load(p_mlp + o_m, mask=m, other=0.0).to(tl.float32)
        l_a, l_g = tl.load(p_l_att).to(tl.float32), tl.load(p_l_conv).to(tl.float32)
        b_a, b_g, b_m = fuse(b_a, b_g, b_m, l_a, l_g, tl.load(p_l_mlp).to(tl.float32))
        o_out = ((i_b * 3 * C + i_c) + o_d)[:, None] * N + o_n[None, :]
        tl.store(p_out + o_out + C * N, b_g.to(p_out.dtype.element_ty), mask=m)
        tl.store(p_out + o_out + 2 * C * N, b_m.to(p_out.dtype.element_ty), mask=m)
    else:
        o_out = ((i_b * C + i_c) + o_d)[:, None] * N + o_n[None, :]
    tl.store(p_out + o_out, b_a.to(p_out.dtype.element_ty), mask=m)


def attention_matrices(q: Tensor, k: Tensor, temperature: Tensor, num_heads: int) -> Tensor:
    """What :func:`~mirage_kernels.channel_attention.matrices.small_matrices` describes, filled in."""
    tile = head_tile(q, num_heads)
    matrices = small_matrices(q, num_heads, torch.float32)
    partial = torch.empty(tile.programs, tile.d + 2, tile.d, dtype=torch.float32, device=q.device)
    launch(
        _gram_kernel,
        tile.programs,
        q.device,
        p_q=q,
        p_k=k,
        p_partial=partial,
        **plane_strides(q, "sq"),
        **plane_strides(k, "sk"),
        **tile.sizes(),
        **tile.options(q, k),
    )
    arguments = (partial, temperature.reshape(num_heads), matrices, num_heads, tile.splits)
    launch(_softmax_kernel, tile.batch * num_heads, q.device, *arguments, **small_options(tile.block_d, tile.d))
    return matrices


class Branches(NamedTuple):
    """What the attention is fused with: two branches [B, C, H, W], and the weights of the modulations."""

    conv: Tensor
    mlp: Tensor
    l_att: Tensor
    l_conv: Tensor
    l_mlp: Tensor

    @property
    def scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.l_att, self.l_conv, self.l_mlp


def branch_arguments(v: Tensor, branches: Branches | None) -> dict[str, Any]:
    """Arguments of the kernels that can fuse; those that do not are given `v` in the place of what they do not read."""
    b = Branches(v, v, v, v, v) if branches is None else branches
    strides = plane_strides(b.conv, "sg") | plane_strides(b.mlp, "sm")
    return {"FUSE": branches is not None, **pointers(b, *Branches._fields), **strides}


def apply(v: Tensor, matrices: Tensor, out: Tensor, branches: Branches | None = None) -> None:
    """attn v, and its fusion with the branches where there are any, into `out`."""
    maps = (v,) if branches is None else (v, branches.conv, branches.mlp)
    tile = head_tile(v, matrices.shape[1], elements=2048 if branches is None else 1024, most_splits=2**31)
    launch(
        apply_kernel,
        tile.programs,
        v.device,
        p_v=v,
        p_matrices=matrices,
        p_out=out,
        **plane_strides(v),
        **branch_arguments(v, branches),
        **tile.sizes(),
        **tile.options(*maps, out),
    )


def forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    matrices = attention_matrices(q, k, temperature, num_heads)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    apply(v, matrices, out)
    return out, matrices
