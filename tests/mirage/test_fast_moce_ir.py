"""The blocks of MoCE-IR's encoder on `mirage.fast`: Restormer's, by other names."""

import copy

import pytest
import torch
from harness import operators
from lookalike_restormer import ListedBlock
from torch import nn

import mirage.fast


@pytest.mark.parametrize("norm", [{}, {"bias": False, "centred": False}], ids=["norm", "bias-free norm"])
def test_values_and_gradients(norm):
    torch.manual_seed(0)
    level = nn.ModuleList(ListedBlock(12, **norm) for _ in range(2)).double()
    fast = mirage.fast.accelerate(copy.deepcopy(level))
    summary = mirage.fast.summary(fast)
    assert [type(block) for block in fast] == [mirage.fast.EncoderBlock] * 2
    assert not summary.kept and not summary.called
    x = torch.randn(2, 12, 6, 7, dtype=torch.float64)
    results = []
    for blocks in (level, fast):
        y = blocks[1](blocks[0](x))
        results.append([y, *torch.autograd.grad(y.square().sum(), list(blocks.parameters()))])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)
    assert operators(lambda: fast[0](x)) == ["channel_attention_stage", "feed_forward_stage"]


def test_what_is_not_such_a_block():
    """A third norm, or an activation in the feed-forward network, is something else."""
    block = ListedBlock(12)
    block.norms.append(nn.Identity())
    kept = mirage.fast.summary(mirage.fast.accelerate(nn.Sequential(block))).kept
    assert "norms has 3 modules, not 2" in kept["0"]
    block = ListedBlock(12)
    block.ffn.act = nn.GELU()
    assert not isinstance(mirage.fast.accelerate(nn.Sequential(block))[0], mirage.fast.EncoderBlock)
