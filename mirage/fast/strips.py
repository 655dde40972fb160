"""Feature maps that exist a strip of lines at a time, where no gradient is wanted and images are large.

What lies between two feature maps of an attention or of an expert of MoCE-IR is local: products over the channels of a
pixel, depthwise convolutions, transforms of squares of pixels. Only the scores of an attention are sums over the whole
image, and these are small. So queries, keys, values and spectra need not exist as maps: they are computed a strip at a
time, from lines of what they depend on and a halo of a few more, which are computed again for the next strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import mirage_kernels
from mirage.fast.recognise.pattern import is_plain_inference
from mirage_kernels import workspace
from mirage_kernels._runtime.checks import under_autocast
from mirage_kernels._runtime.library import accumulator

LARGE_FROM = 16 << 20
"""Bytes of a feature map from which on less memory is worth another call, whose time is nothing beside theirs."""

STRIP_BYTES = 8 << 20
"""Of a strip of one feature map. Smaller ones would compute more halos: six lines of a depthwise convolution of 7x7."""


def is_large(x: Tensor) -> bool:
    """Whether x is a large feature map. Symbolic sizes, which may be any, are not; what is being compiled has such."""
    if torch.compiler.is_compiling() or not all(type(size) is int for size in x.shape):
        return False
    return x.nbytes >= LARGE_FROM


def are_wanted(x: Tensor) -> bool:
    """Whether modules of large maps like x run in strips: on CPUs, where nobody records the steps, whose number depends
    on the size of the image. On GPUs each strip would be a dozen launches."""
    return (
        is_plain_inference()
        and x.is_cpu
        and x.dim() == 4
        and is_large(x)
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.maybe_current_level() is None
        and not under_autocast(x)
    )


@dataclass(frozen=True)
class Strips:
    """A feature map [B, C, H, W] of which strips are computed where they are read.

    Attributes:
        height: H.
        lines: lines(first, stop) -> [B, C, stop - first, W], to be read only: they may be part of a map.
    """

    height: int
    lines: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, x: Tensor) -> Strips:
        """Of a map that is there."""
        return cls(x.shape[2], lambda first, stop: x[:, :, first:stop])

    def around(self, first: int, stop: int, halo: int) -> Strips:
        """Computed once for those lines and so many above and below, as far as there are any."""
        above = max(first - halo, 0)
        lines = self.lines(above, min(stop + halo, self.height))
        return Strips(self.height, lambda first, stop: lines[:, :, first - above : stop - above])

    def then(self, pointwise: Callable[[Tensor], Tensor]) -> Strips:
        """What a function of each pixel makes of it."""
        return Strips(self.height, lambda first, stop: pointwise(self.lines(first, stop)))


def cut(x: Tensor, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """The first line of each strip of a map like x and the one behind its last; all but the last strip have a multiple
    of so many lines."""
    together = max(STRIP_BYTES // x[:, :, :1].nbytes // multiple, 1) * multiple
    for first in range(0, x.shape[2], together):
        yield first, min(first + together, x.shape[2])


def whole(strips: Strips, like: Tensor) -> Tensor:
    """All lines as a map of the shape of `like`."""
    y = workspace.empty_like(like)
    for first, stop in cut(like):
        y[:, :, first:stop] = strips.lines(first, stop)
    return y


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution: [M, C, 1, 1], and [M] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return with_bias(mirage_kernels.dense_conv2d(x, self.weight), self.bias)

    def behind(self, first: Pointwise) -> Pointwise:
        """Both as one: products of the weights, and of a bias, in float64."""
        matrix = self.weight.double().flatten(1)
        weight = matrix @ first.weight.double().flatten(1)
        bias = self.bias
        if first.bias is not None:
            added = matrix @ first.bias.double()
            bias = (added if bias is None else added + bias).to(self.weight.dtype)
        return Pointwise(weight[:, :, None, None].to(self.weight.dtype), bias)


class Convolved(NamedTuple):
    """A 1x1 convolution and a depthwise one behind it, of taps [M, 1, K, K] and a bias [M] or None."""

    mix: Pointwise
    taps: Tensor
    bias: Tensor | None

    @property
    def halo(self) -> int:
        return self.taps.shape[2] // 2

    def __call__(self, x: Tensor) -> Tensor:
        return convolve_planes(self.mix(x), self.taps, self.bias)


def convolve_planes(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """The depthwise convolution of x by taps [C, 1, K, K]."""
    taps = taps.transpose(0, 1).expand(x.shape[0], -1, -1, -1)
    return with_bias(mirage_kernels.dynamic_depthwise_conv2d(x, taps), bias)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """An operator's result and a bias [M], in place."""
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def convolve(x: Strips, convolutions: Sequence[Convolved], first: int, stop: int) -> list[Tensor]:
    """Those lines of several convolutions of one map, of which each line is read once."""
    here = x.around(first, stop, halo_of(convolutions))
    results = []
    for convolution in convolutions:
        begin = max(first - convolution.halo, 0)
        lines = here.lines(begin, min(stop + convolution.halo, x.height))
        results.append(convolution(lines)[:, :, first - begin : stop - begin])
    return results


def halo_of(convolutions: Sequence[Convolved]) -> int:
    return max(convolution.halo for convolution in convolutions)


class AttentionWeights(NamedTuple):
    """Weights of a channel attention: how queries, keys and values are made, a temperature of [heads, 1, 1], and the
    convolution of its result."""

    q: Convolved
    k: Convolved
    v: Convolved
    temperature: Tensor
    project_out: Pointwise

    def behind(self, first: Pointwise) -> AttentionWeights:
        """Of what a convolution makes of queries, keys and values' source."""
        q, k, v = (part._replace(mix=part.mix.behind(first)) for part in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v)


def attend(attention: AttentionWeights, of_queries: Strips, of_others: Strips, out: Tensor) -> Tensor:
    """The attention of the channels of one map to those of another, in two passes: one over queries and keys, which
    sums their products, and one over the values.

    Args:
        of_queries: What the queries are made of; read in the first pass.
        of_others: What keys and values are made of.
        out: [B, C, H, W], written in the second pass: it may be what the queries were made of.
    """
    matrices = _fold(attention, *_sums(attention, of_queries, of_others, out))
    for first, stop in cut(out):
        (values,) = convolve(of_others, [attention.v], first, stop)
        for sample, matrix in enumerate(matrices):
            project = Pointwise(matrix[:, :, None, None].to(values.dtype), attention.project_out.bias)
            out[sample : sample + 1, :, first:stop] = project(values[sample : sample + 1])
    return out


def _sums(
    attention: AttentionWeights, of_queries: Strips, of_others: Strips, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q k^T of every head [B, heads, d, d], |q|^2 and |k|^2 [B, heads, d], float64: sums over strips, each of which is
    summed in the dtype of accumulators."""
    heads, wide = attention.temperature.shape[0], accumulator(like.dtype)
    gram = q_squares = k_squares = torch.zeros((), dtype=torch.float64, device=like.device)
    for first, stop in cut(like):
        if of_queries is of_others:
            pair = convolve(of_queries, [attention.q, attention.k], first, stop)
        else:
            pair = [*convolve(of_queries, [attention.q], first, stop), *convolve(of_others, [attention.k], first, stop)]
        q, k = (t.to(wide).unflatten(1, (heads, -1)).flatten(3) for t in pair)
        gram = gram + (q @ k.mT).double()
        q_squares = q_squares + torch.linalg.vector_norm(q, dim=-1).double().square()
        k_squares = k_squares + torch.linalg.vector_norm(k, dim=-1).double().square()
    return gram, q_squares, k_squares


def _fold(attention: AttentionWeights, gram: Tensor, q_squares: Tensor, k_squares: Tensor) -> Tensor:
    """project_out times the softmax of each head, [B, M, C], float64. A norm of zero is 1e-12, as that of
    `torch.nn.functional.normalize`."""
    q, k = (squares.sqrt().clamp_min(1e-12) for squares in (q_squares, k_squares))
    softmax = (gram / (q[..., :, None] * k[..., None, :]) * attention.temperature.double()).softmax(-1)
    project_out = attention.project_out.weight.double().flatten(1).unflatten(1, (softmax.shape[1], -1))
    return torch.einsum("mhd,bhde->bmhe", project_out, softmax).flatten(2)
