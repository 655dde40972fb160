"""What the Triton kernels of whole stages share: tiles of an image, normalised pixels, and depthwise convolutions read
from memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._runtime.library import is_exact
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import INTERPRETED

FILL = 1 if INTERPRETED else 256
"""Programs from which on a GPU is kept busy: about two for each multiprocessor of the largest. The interpreter runs one
after the other."""


@dataclass(frozen=True)
class ImageTile:
    """A program that holds `block_h` rows and `block_w` columns of an image, some channels at a time."""

    block_h: int
    block_w: int

    @property
    def pixels(self) -> int:
        return self.block_h * self.block_w

    def warps(self, wide: bool) -> int:
        """Warps of a program that holds about two dozen values of each pixel; `wide`: with 64-bit offsets."""
        return 4 if self.pixels <= 16 and not wide else 8

    def programs(self, x: Tensor) -> int:
        return x.shape[0] * triton.cdiv(x.shape[2], self.block_h) * triton.cdiv(x.shape[3], self.block_w)


def image_tile(x: Tensor, pixels: int) -> ImageTile:
    """A tile of `pixels`, a power of two, also where the image has fewer, since `tl.dot` needs 16. Rows have at most 32
    columns, so that neighbouring rows, which a convolution reads again, stay in the first-level cache."""
    block_w = min(32, next_power_of_2(x.shape[3]), pixels)
    return ImageTile(pixels // block_w, block_w)


def filling_tile(x: Tensor, pixels: int) -> ImageTile:
    """Like `image_tile`, with fewer pixels (at least the 16 that `tl.dot` needs) where there would be less than FILL
    programs."""
    while pixels > 16 and image_tile(x, pixels).programs(x) < FILL:
        pixels //= 2
    return image_tile(x, pixels)


def filling_run(x: Tensor, pixels: int) -> int:
    """How many pixels a program takes along the rows, chosen like `filling_tile`."""
    while pixels > 16 and x.shape[0] * triton.cdiv(x.shape[2] * x.shape[3], pixels) < FILL:
        pixels //= 2
    return pixels


def precision(dtype: torch.dtype) -> str:
    """The precision of `tl.dot` on operands of `dtype`."""
    return "ieee" if is_exact(dtype) or dtype != torch.float32 else "tf32"


@triton.jit
def image_tile_of(i_tile, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Sample, rows and columns of tile i_tile; rows and columns past the end of the image are to be masked."""
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles = tl.cdiv(H, BLOCK_H) * tiles_w
    i_b = i_tile // tiles
    i_tile = i_tile % tiles
    o_t = tl.arange(0, BLOCK_H * BLOCK_W)
    return i_b, i_tile // tiles_w * BLOCK_H + o_t // BLOCK_W, i_tile % tiles_w * BLOCK_W + o_t % BLOCK_W


@triton.jit
def moments(p_x, o_c, o_n, s_c, m_n, eps, C: tl.constexpr):
    """Mean and reciprocal deviation over the C channels at each pixel; o_n are the pixels' offsets."""
    m = (o_c < C)[:, None] & m_n[None, :]
    b_x = tl.load(p_x + o_c[:, None] * s_c + o_n[None, :], mask=m, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 0) / C
    b_centred = tl.where((o_c < C)[:, None], b_x - b_mean[None, :], 0.0)
    b_rest = tl.sum(b_centred, 0) / C  # last bits of the mean: much of the deviation where that is small beside it
    b_mean += b_rest
    b_centred = tl.where((o_c < C)[:, None], b_centred - b_rest[None, :], 0.0)
    return b_mean, 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 0) / C + eps)


@triton.jit
def normalised(p_x, p_weight, p_bias, o_c, m_c, o_n, s_c, m_n, b_mean, b_rstd):
    """The layer norm's output in float32 at channels o_c; zero where m_c is false, which products over them need."""
    m = m_c[:, None] & m_n[None, :]
    b_x = tl.load(p_x + o_c[:, None] * s_c + o_n[None, :], mask=m, other=0.0).to(tl.float32)
    return scaled((b_x - b_mean[None, :]) * b_rstd[None, :], p_weight, p_bias, o_c, m_c)


@triton.jit
def scaled(b_x, p_weight, p_bias, o_c, m_c):
    """b_x [channels, pixels] times a weight plus a bias, each of a channel; zero where m_c is false."""
    b_w = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return tl.where(m_c[:, None], b_x * b_w[:, None] + b_b[:, None], 0.0)


@triton.jit
def matrix(p, o_r, m_r, o_c, m_c, stride):
    """Rows o_r and columns o_c of a matrix whose rows lie `stride` apart; zero outside."""
    m = m_r[:, None] & m_c[None, :]
    return tl.load(p + o_r[:, None] * stride + o_c[None, :], mask=m, other=0.0)


@triton.jit
def depthwise(p_x, p_taps, o_c, m_c, o_y, o_x, H, W, s_c, s_row, s_pixel, K: tl.constexpr):
    """A depthwise K x K convolution with zero padding, in float32: channels o_c at rows o_y and columns o_x of the
    planes that start at p_x, `s_c` apart. p_taps: K * K weights of each channel."""
    b_sum = tl.zeros([o_c.shape[0], o_y.shape[0]], tl.float32)
    p_c = p_x + o_c[:, None] * s_c
    for i in range(K):  # spelled out, all K * K loads would be in flight and take twice the registers
        for j in tl.static_range(K):
            o_r = o_y + (i - K // 2)
            o_k = o_x + (j - K // 2)
            m_n = (o_r >= 0) & (o_r < H) & (o_k >= 0) & (o_k < W)
            b_w = tl.load(p_taps + o_c * (K * K) + (i * K + j), mask=m_c, other=0.0).to(tl.float32)
            m = m_c[:, None] & m_n[None, :]
            b_x = tl.load(p_c + (o_r * s_row + o_k * s_pixel)[None, :], mask=m, other=0.0).to(tl.float32)
            b_sum += b_w[:, None] * b_x
    return b_sum
