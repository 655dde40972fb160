"""The blocks of MoCE-IR on `mirage.fast`: of its encoder, which are Restormer's by other names, and of its decoder."""

import copy

import pytest
import torch
from harness import operators
from lookalike_restormer import CrossAttention, ListedBlock, ListedDecoderBlock
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


def test_values_and_gradients_of_the_decoder():
    torch.manual_seed(0)
    block = ListedDecoderBlock(12).double()
    names = block.state_dict().keys()
    fast = mirage.fast.accelerate(copy.deepcopy(block))
    summary = mirage.fast.summary(fast)
    assert type(fast) is mirage.fast.DecoderBlock and fast.state_dict().keys() == names
    assert not summary.kept and not summary.called
    x, freq_emb = torch.randn(1, 12, 9, 7, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    results, states = [], []
    for module in (block, fast):
        torch.manual_seed(3)
        y, loss = module(x, freq_emb)
        used = [p for name, p in module.named_parameters() if "experts" not in name]
        results.append([y, loss, *torch.autograd.grad(y.square().sum() + loss, used)])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for value, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)
    seen = operators(lambda: fast(x, freq_emb))
    assert seen[-1] == "feed_forward_stage" and seen.count("channel_attention") == 2
    assert type(mirage.fast.revert(fast)) is ListedDecoderBlock


def test_a_decoder_block_says_what_it_calls():
    """Its second half follows its modules, as that of any block."""
    fast = mirage.fast.accelerate(ListedDecoderBlock(12).eval())
    fast.ffn.dwconv.register_forward_hook(lambda module, args, output: output)
    assert mirage.fast.summary(fast).called == {"": "feed_forward_stage: ffn.dwconv has hooks"}
    x, freq_emb = torch.randn(1, 12, 9, 7), torch.randn(1, 6)
    assert "feed_forward_stage" not in operators(lambda: fast(x, freq_emb))


def test_what_is_not_a_block_of_the_decoder():
    block = ListedDecoderBlock(12)
    block.mixer.forward = lambda x, y: x + y
    summary = mirage.fast.summary(mirage.fast.accelerate(nn.Sequential(block)))
    assert summary.kept == {"0.mixer": "its forward was replaced on the instance"}
    assert summary.replaced["0"] == "DecoderBlock", "it calls what was replaced"

    class Scaled(ListedDecoderBlock):
        def forward(self, x, freq_emb=None):
            x, loss = super().forward(x, freq_emb)
            return 2 * x, loss

    kept = mirage.fast.summary(mirage.fast.accelerate(nn.Sequential(Scaled(12)))).kept
    assert "it computes something else than DecoderBlock" in kept["0"]


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "biases"])
def test_cross_attention(size, bias):
    torch.manual_seed(0)
    attention = CrossAttention(12, size, bias).double()
    fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(attention)))[0]
    assert type(fast) is mirage.fast.CrossChannelAttention
    maps = [torch.randn(2, 12, 9, 7, dtype=torch.float64) for _ in range(2)]
    results = [
        [y := module(*maps), *torch.autograd.grad(y.square().sum(), list(module.parameters()))]
        for module in (attention, fast)
    ]
    for value, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        assert operators(lambda: fast(*maps)).count("dynamic_depthwise_conv2d") == 2
        expected = attention(*maps)
        exported = torch.export.export(fast, tuple(maps)).module()(*maps)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")(*maps)
        for value in (exported, compiled, fast(*maps)):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
