"""``tri_branch_fusion`` in Triton: a program takes a run of pixels of one channel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.launch import index_dtype, is_flat_plane, launch, needs_int64, pixel_offsets, plane_strides
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes

BLOCK_N = 1024
BACKWARD_BLOCK_N = 512


@triton.jit
def fuse(b_a, b_g, b_m, l_a, l_g, l_m):
    """The three modulated branches."""
    return (
        b_a + l_a * tl.sigmoid(b_g + b_m),
        b_g + l_g * tl.sigmoid(b_a + b_m),
        b_m + l_m * tl.sigmoid(b_a + b_g),
    )


@triton.jit
def fuse_backward(b_a, b_g, b_m, b_da, b_dg, b_dm, l_a, l_g, l_m):
    """Gradients of the branches, and the terms of those of the three weights."""
    b_sa = tl.sigmoid(b_g + b_m)
    b_sg = tl.sigmoid(b_a + b_m)
    b_sm = tl.sigmoid(b_a + b_g)
    b_ta = b_da * l_a * (b_sa - b_sa * b_sa)
    b_tg = b_dg * l_g * (b_sg - b_sg * b_sg)
    b_tm = b_dm * l_m * (b_sm - b_sm * b_sm)
    return b_da + b_tg + b_tm, b_dg + b_ta + b_tm, b_dm + b_ta + b_tg, b_da * b_sa, b_dg * b_sg, b_dm * b_sm


@triton.jit
def _forward_kernel(
    p_att,  # [B, C, H, W], any strides, like the next two
    p_conv,
    p_mlp,
    p_l_att,  # [1], like the next two
    p_l_conv,
    p_l_mlp,
    p_out,  # [B, 3 C, N]
    C,
    N,
    W,
    sa_b,
    sa_c,
    sa_row,
    sa_pixel,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    sm_b,
    sm_c,
    sm_row,
    sm_pixel,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    C = index_dtype(C, INT64)
    blocks = tl.cdiv(N, BLOCK)
    i_b, i_c = i_program // blocks // C, i_program // blocks % C
    o_n = i_program % blocks * BLOCK + tl.arange(0, BLOCK)
    m = o_n < N
    o_a = i_b * sa_b + i_c * sa_c + pixel_offsets(o_n, W, sa_row, sa_pixel, LINE)
    o_g = i_b * sg_b + i_c * sg_c + pixel_offsets(o_n, W, sg_row, sg_pixel, LINE)
    o_m = i_b * sm_b + i_c * sm_c + pixel_offsets(o_n, W, sm_row, sm_pixel, LINE)
    b_a = tl.load(p_att + o_a, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_conv + o_g, mask=m, other=0.0).to(tl.float32)
    b_m = tl.load(p_mlp + o_m, mask=m, other=0.0).to(tl.float32)
    l_a, l_g, l_m = tl.load(p_l_att).to(tl.float32), tl.load(p_l_conv).to(tl.float32), tl.load(p_l_mlp).to(tl.float32)
    b_a, b_g, b_m = fuse(b_a, b_g, b_m, l_a, l_g, l_m)
    o_out = (i_b * 3 * C + i_c) * N + o_n
    tl.store(p_out + o_out, b_a.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + o_out + C * N, b_g.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + o_out + 2 * C * N, b_m.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _backward_kernel(
    p_grad,  # [B, 3 C, H, W], any strides
    p_att,  # [B, C, H, W], any strides, like the next two
    p_conv,
    p_mlp,
    p_l_att,  # [1], like the next two
    p_l_conv,
    p_l_mlp,
    p_grad_att,  # [B, C, N], like the next two
    p_grad_conv,
    p_grad_mlp,
    p_partial,  # [programs, 3]: sums for the three weights
    C,
    N,
    W,
    sd_b,
    sd_c,
    sd_row,
    sd_pixel,
    sa_b,
    sa_c,
    sa_row,
    sa_pixel,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    sm_b,
    sm_c,
    sm_row,
    sm_pixel,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    C = index_dtype(C, INT64)
    blocks = tl.cdiv(N, BLOCK)
    i_b, i_c = i_program // blocks // C, i_program // blocks % C
    o_n = i_program % blocks * BLOCK + tl.arange(0, BLOCK)
    m = o_n < N
    o_a = i_b * sa_b + i_c * sa_c + pixel_offsets(o_n, W, sa_row, sa_pixel, LINE)
    o_g = i_b * sg_b + i_c * sg_c + pixel_offsets(o_n, W, sg_row, sg_pixel, LINE)
    o_m = i_b * sm_b + i_c * sm_c + pixel_offsets(o_n, W, sm_row, sm_pixel, LINE)
    o_d = i_b * sd_b + i_c * sd_c + pixel_offsets(o_n, W, sd_row, sd_pixel, LINE)
    b_a = tl.load(p_att + o_a, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_conv + o_g, mask=m, other=0.0).to(tl.float32)
    b_m = tl.load(p_mlp + o_m, mask=m, other=0.0).to(tl.float32)
    b_da = tl.load(p_grad + o_d, mask=m, other=0.0).to(tl.float32)
    b_dg = tl.load(p_grad + o_d + C * sd_c, mask=m, other=0.0).to(tl.float32)
    b_dm = tl.load(p_grad + o_d + 2 * C * sd_c, mask=m, other=0.0).to(tl.float32)
    l_a, l_g, l_m = tl.load(p_l_att).to(tl.float32), tl.load(p_l_conv).to(tl.float32), tl.load(p_l_mlp).to(tl.float32)
    b_a, b_g, b_m, b_ta, b_tg, b_tm = fuse_backward(b_a, b_g, b_m, b_da, b_dg, b_dm, l_a, l_g, l_m)
    o_out = (i_b * C + i_c) * N + o_n
    tl.store(p_grad_att + o_out, b_a.to(p_grad_att.dtype.element_ty), mask=m)
    tl.store(p_grad_conv + o_out, b_g.to(p_grad_conv.dtype.element_ty), mask=m)
    tl.store(p_grad_mlp + o_out, b_m.to(p_grad_mlp.dtype.element_ty), mask=m)
    tl.store(p_partial + i_program * 3, tl.sum(b_ta, 0))
    tl.store(p_partial + i_program * 3 + 1, tl.sum(b_tg, 0))
    tl.store(p_partial + i_program * 3 + 2, tl.sum(b_tm, 0))


def scalar_gradients(partial_sums: Tensor, scalars: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the three weights from their partial sums [programs, 3]."""
    total = partial_sums.sum(0, dtype=torch.float64)
    return [total[i].to(t.dtype, copy=True).reshape(t.shape) for i, t in enumerate(scalars)]


def forward(att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor) -> Tensor:
    branches = (att, conv, mlp)
    batch, channels, height, width = att.shape
    pixels = height * width
    result = fusion_dtypes(*branches, l_att, l_conv, l_mlp)[1]
    out = torch.empty(concatenated(att), dtype=result, device=att.device)
    launch(
        _forward_kernel,
        batch * channels * triton.cdiv(pixels, BLOCK_N),
        att.device,
        p_att=att,
        p_conv=conv,
        p_mlp=mlp,
        p_l_att=l_att,
        p_l_conv=l_conv,
        p_l_mlp=l_mlp,
        p_out=out,
        C=channels,
        N=pixels,
        W=width,
        **plane_strides(att, "sa"),
        **plane_strides(conv, "sg"),
        **plane_strides(mlp, "sm"),
        BLOCK=BLOCK_N,
        LINE=all(is_flat_plane(t) for t in branches),
        INT64=needs_int64(*branches, out),
        num_warps=4,
    )
    return out


def backward(
    grad_out: Tensor, att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor
) -> tuple[Tensor, ...]:
    branches, scalars = (att, conv, mlp), (l_att, l_conv, l_mlp)
    batch, channels, height, width = att.shape
    pixels = height * width
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in branches]
    programs = batch * channels * triton.cdiv(pixels, BACKWARD_BLOCK_N)
    sums = torch.empty(programs, 3, dtype=torch.float32, device=att.device)
    launch(
        _backward_kernel,
        programs,
        att.device,
        p_grad=grad_out,
        p_att=att,
        p_conv=conv,
        p_mlp=mlp,
        p_l_att=l_att,
        p_l_conv=l_conv,
        p_l_mlp=l_mlp,
        p_grad_att=grads[0],
        p_grad_conv=grads[1],
        p_grad_mlp=grads[2],
        p_partial=sums,
        C=channels,
        N=pixels,
        W=width,
        **plane_strides(grad_out, "sd"),
        **plane_strides(att, "sa"),
        **plane_strides(conv, "sg"),
        **plane_strides(mlp, "sm"),
        BLOCK=BACKWARD_BLOCK_N,
        LINE=all(is_flat_plane(t) for t in (grad_out, *branches)),
        INT64=needs_int64(grad_out, *branches, grads[0]),
        num_warps=4,
    )
    return *grads, *scalar_gradients(sums, scalars)
