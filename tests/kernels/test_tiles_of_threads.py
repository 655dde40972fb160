"""Tiles are chosen by the number of threads where a pixel has the same bits in any tile: it has."""

import pytest
import torch
from harness import require

import mirage_kernels

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
