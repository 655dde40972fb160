"""``channel_layer_norm`` in Triton: a program holds all channels of a block of pixels in registers."""


import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._triton.config import channel_tile
from mirage_kernels._triton.launch import index_dtype, is_flat_plane, launch, needs_int64, pixel_offsets, plane_strides


@triton.jit
def _forward_kernel(
    p_x,  # [B, C, H, W], any strides
    p_weight,  # [C]
    p_bias,  # [C]
    p_y,  # [B, C, N]
    p_mean,  # [B, N]
    p_rstd,  # [B, N]
    eps,
    N,
    W,
    s_b,
    s_c,
    s_row,
    s_pixel,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
):
    i_block = tl.program_id(0)
    if INT64:
        i_block = i_block.to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    i_b = i_block // blocks
    o_n = (i_block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    m_n = o_n < N
    m_c = o_c < C
    m = m_c[:, None] & m_n[None, :]

    pixels = pixel_offsets(o_n, W, s_row, s_pixel, LINE)
    b_x = tl.load(p_x + i_b * s_b + o_c[:, None] * s_c + pixels[None, :], mask=m, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 0) / C
    b_centred = tl.where(m_c[:, None], b_x - b_mean[None, :], 0.0)
    b_rest = tl.sum(b_centred, 0) / C  # last bits of the mean: much of the deviation where that is small beside it
    b_mean += b_rest
    b_centred = tl.where(m_c[:, None], b_centred - b_rest[None, :], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 0) / C + eps)
    b_w = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_centred * b_rstd[None, :] * b_w[:, None] + b_b[:, None]
    o_y = i_b * C * N + o_c[:, None] * N + o_n[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_mean + i_b * N + o_n, b_mean, mask=m_n)
    tl.store(p_rstd + i_b * N + o_n, b_rstd, mask=m_n)


@triton.jit
def _backward_kernel(
    p_grad_y,  # [B, C, H, W], any strides
    p_x,  # [B, C, H, W], any strides
    p_weight,  # [C]
    p_mean,  # [B, N]
    p_rstd,  # [B, N]
    p_grad_x,  # [B, C, N]
    p_partial,  # [programs, 2, C]: sums for the weight and for the bias
    N,
    W,
    sg_b,
    sg_c,
    sg_row,
    sg_pixel,
    s_b,
    s_c,
    s_row,
    s_pixel,
    programs_per_sample,
    blocks_per_program,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE_G: tl.constexpr,
    LINE: tl.constexpr,
    INT64: tl.constexpr,
):
    i_program = tl.program_id(0)
    if INT64:
        i_program = i_program.to(tl.int64)
    i_b = i_program // programs_per_sample
    i_first = (i_program % programs_per_sample) * blocks_per_program
    o_c = index_dtype(tl.arange(0, BLOCK_C), INT64)
    m_c = o_c < C
    b_w = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_grad_w = tl.zeros([BLOCK_C], tl.float32)
    b_grad_b = tl.zeros([BLOCK_C], tl.float32)

    for i in range(blocks_per_program):
        o_n = (i_first + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m = m_c[:, None] & m_n[None, :]
        o_x = i_b * s_b + o_c[:, None] * s_c + pixel_offsets(o_n, W, s_row, s_pixel, LINE)[None, :]
        o_g = i_b * sg_b + o_c[:, None] * sg_c + pixel_offsets(o_n, W, sg_row, sg_pixel, LINE_G)[None, :]
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(p_grad_y + o_g, mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + i_b * N + o_n, mask=m_n, other=0.0)
        b_rstd = tl.load(p_rstd + i_b * N + o_n, mask=m_n, other=0.0)
        b_hat = tl.where(m, (b_x - b_mean[None, :]) * b_rstd[None, :], 0.0)
        b_grad_w += tl.sum(b_g * b_hat, 1)
        b_grad_b += tl.sum(b_g, 1)
        b_gw = b_g * b_w[:, None]
        b_m1 = tl.sum(b_gw, 0) / C
        b_m2 = tl.sum(b_gw * b_hat, 0) / C
        b_grad_x = (b_gw - b_m1[None, :] - b_hat * b_m2[None, :]) * b_rstd[None, :]
        o_gx = i_b * C * N + o_c[:, None] * N + o_n[None, :]
        tl.store(p_grad_x + o_gx, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m)

    tl.store(p_partial + i_program * 2 * C + o_c, b_grad_w, mask=m_c)
    tl.store(p_partial + i_program * 2 * C + C + o_c, b_grad_b, mask=m_c)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y of `dtype`, by default that of a product of x and weight, and mean and reciprocal deviation of each pixel."""
    batch, channels, height, width = x.shape
    pixels = height * width
    y = torch.empty(x.shape, dtype=dtype or torch.promote_types(x.dtype, weight.dtype), device=x.device)
    mean, rstd = (torch.empty(batch, height, width, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = channel_tile(channels)
    launch(
        _forward_kernel,
        batch * triton.cdiv(pixels, tile.block_n),
        x.device,
        p_x=x,
        p_weight=weight.contiguous(),
        p_bias=bias.contiguous(),
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        eps=eps,
        N=pixels,
        W=width,
        **plane_strides(x),
        C=channels,
        BLOCK_C=tile.block_c,
        BLOCK_N=tile.block_n,
        LINE=is_flat_plane(x),
        INT64=needs_int64(x, y),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y, mean, rstd


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    pixels = height * width
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = channel_tile(channels, elements=4096)
    blocks = triton.cdiv(pixels, tile.block_n)
    blocks_per_program = max(1, min(8, batch * blocks // 512))  # every multiprocessor gets programs first
    programs_per_sample = triton.cdiv(blocks, blocks_per_program)
    sums = torch.empty(batch * programs_per_sample, 2, channels, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel,
        batch * programs_per_sample,
        x.device,
        p_grad_y=grad_y,
        p_x=x,
        p_weight=weight.contiguous(),
        p_mean=mean,
        p_rstd=rstd,
        p_grad_x=grad_x,
        p_partial=sums,
        N=pixels,
        W=width,
        **plane_strides(grad_y, "sg"),
        **plane_strides(x),
        programs_per_sample=programs_per_sample,
        blocks_per_program=blocks_per_program,
        C=channels,
        BLOCK_C=tile.block_c,
        BLOCK_N=tile.block_n,
        LINE_G=is_flat_plane(grad_y),
        LINE=is_flat_plane(x),
        INT64=needs_int64(x, grad_y, grad_x),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    grad_weight, grad_bias = (sums[:, i].sum(0).to(weight.dtype) for i in range(2))
    return grad_x, grad_weight, grad_bias
