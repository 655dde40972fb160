"""Tiles are chosen by the number of threads where a pixel has the same bits in any tile: it has."""

from functools import partial

import pytest
import torch
from harness import require

import mirage_kernels
from mirage_kernels.channel_attention_stage.weights import ChannelAttentionWeights

THREADS = (1, 2, 3, 8)
SIZE = (24, 33)
"""Of maps of 200 channels, which one or two threads take in two tiles, three in three (float32)."""


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def dtype(request):
    require("cpp")
    yield request.param
    torch.set_num_threads(threads)


threads = torch.get_num_threads()


def by_threads(function):
    for count in THREADS:
        torch.set_num_threads(count)
        yield function()


def assert_same_bits(function):
    first, *others = by_threads(function)
    assert all(torch.equal(other, first) for other in others)


def in_parts(stage, x, *weights):
    """The stage of x, 8 lines at a time: each with what lies around it, and its own lines of that."""
    parts = []
    for first in range(0, x.shape[2], 8):
        above = min(first, 1)
        part = stage(x[:, :, first - above : first + 9].contiguous(), *weights)
        parts.append(part[:, :, above : above + 8])
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("width", [16, 33, 48, 400])
def test_lines_that_tiles_share(dtype, width):
    """A tile takes two lines of hidden channels from the one above it, down a strip: 400 columns are several strips,
    16 and 48 are whole vectors without a halo. They are what each computes for itself."""
    generator = torch.Generator().manual_seed(0)
    shapes = (96,), (96,), (104, 96, 1, 1), (104, 1, 3, 3), (96, 52, 1, 1)
    weights = [0.2 * torch.randn(shape, generator=generator) for shape in shapes]
    bias = torch.randn(104, generator=generator)
    x = torch.randn(1, 96, 83, width, generator=generator).to(dtype)
    for options in ({}, {"project_in_bias": bias}):
        stage = partial(mirage_kernels.feed_forward_stage, **options)
        torch.testing.assert_close(stage(x, *weights), in_parts(stage, x, *weights), rtol=0, atol=0)


def test_channel_attention_stage(dtype):
    """Sums over tiles: their tiles do not follow the threads, but who computes the lines between them does."""
    generator = torch.Generator().manual_seed(0)
    shapes = (96,), (96,), (288, 96, 1, 1), (288,), (288, 1, 3, 3), (288,), (2, 1, 1), (96, 96, 1, 1), (96,)
    weights = ChannelAttentionWeights(*(0.2 * torch.randn(shape, generator=generator) for shape in shapes))
    x = torch.randn(1, 96, 41, 33, generator=generator).to(dtype)
    assert_same_bits(lambda: mirage_kernels.channel_attention_stage(x, weights))


@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_feed_forward_stage(dtype, activation):
    generator = torch.Generator().manual_seed(0)
    shapes = (200,), (200,), (104, 200, 1, 1), (104, 1, 3, 3), (200, 52, 1, 1)
    weights = [0.2 * torch.randn(shape, generator=generator) for shape in shapes]
    x = torch.randn(1, 200, *SIZE, generator=generator).to(dtype)
    assert_same_bits(lambda: mirage_kernels.feed_forward_stage(x, *weights, activation=activation))


@pytest.mark.parametrize("size", [1, 3])
def test_dense_conv2d(dtype, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, *SIZE, generator=generator).to(dtype)
    weight = torch.randn(272, 200, size, size, generator=generator).to(dtype)
    assert_same_bits(lambda: mirage_kernels.dense_conv2d(x, weight))


def test_gradients_of_dense_conv2d(dtype):
    """Sums over tiles: their tiles do not follow the threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, *SIZE, generator=generator).to(dtype)
    weight = torch.randn(272, 200, 3, 3, generator=generator).to(dtype).requires_grad_()
    assert_same_bits(lambda: torch.autograd.grad(mirage_kernels.dense_conv2d(x, weight).sum(), weight)[0])
