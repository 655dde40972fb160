"""Blocks and their accelerated copies, a training step of both, and what the copies run: for tests of `mirage.fast`."""

import copy

import torch

import mirage
import mirage.fast
from mirage import blocks
from mirage.fast.block import BLOCKS
from mirage.fast.recognise.mirage_block import STAGES


def pair(dim=12, heads=2, drop_path=0.0, dtype=torch.float64, training=True):
    """A reference block with every parameter and statistic off its initial value, and its accelerated copy."""
    torch.manual_seed(0)
    block = blocks.TransformerBlock(dim, heads, drop_path=drop_path)
    with torch.no_grad():
        for tensor in [*block.parameters(), *(b for b in block.buffers() if b.is_floating_point())]:
            tensor.add_(0.2 * torch.rand_like(tensor))
    block = block.to(dtype).train(training)
    return block, mirage.fast.accelerate(copy.deepcopy(block))


def image(batch=2, dim=12, height=6, width=7, dtype=torch.float64):
    return torch.randn(batch, dim, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(block, x, seed=3):
    """Output, gradient of the input and gradients of the parameters; the random state is what the step leaves."""
    block.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = block(x)
    generator = torch.Generator().manual_seed(9)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]


def assert_alike(block, fast, x, rtol=1e-9):
    for value, expected in zip(step(fast, x), step(block, x), strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            assert value.dtype == expected.dtype
            assert (value - expected).norm() <= rtol * max(expected.norm().item(), 1e-3)
    for (name, value), expected in zip(fast.named_buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol, msg=name)


def runs_stages(block):
    """Which halves run as operators, asked in Python; the C++ library has to give the same answers."""
    asked = tuple(not stage.problem(block) for stage in STAGES)
    assert tuple(stage.match(block) is not None for stage in STAGES) == asked
    steady = not any(m.training for m in (block.attn.gatedcnn.norm, block.attn.gatedcnn.drop_path))
    assert (BLOCKS.match(block) is not None) == (all(asked) and steady)
    return asked


def assert_infers_alike(block, fast, x, rtol=1e-9):
    """In eval mode, where a block may run as one operator."""
    with torch.no_grad():
        value, expected = fast.eval()(x), block.eval()(x)
    assert (value - expected).norm() <= rtol * expected.norm()
