"""The blocks of MoCE-IR on `mirage.fast`: of its encoder, which are Restormer's by other names, and of its decoder."""

import copy

import pytest
import torch
from harness import operators
from lookalike_restormer import Adapter, Attention, CrossAttention, FourierAttention, ListedBlock, ListedDecoderBlock
from torch import nn

import mirage.fast
from mirage.fast import experts
from mirage.fast import modules as fast_modules


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
    for value, expected in zip(*reversed(results), strict=True):  # the experts' Fourier transforms are in float32
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    seen = operators(lambda: fast(x, freq_emb))
    assert seen[-1] == "feed_forward_stage" and seen.count("channel_attention") == 2
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(mirage.fast.ExpertAdapter) == 1 and kinds.count(mirage.fast.FourierAttention) == 3
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


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_adapter_adds_up_what_was_chosen(top_k):
    """The same draws, and the loss that it leaves behind; more than one image, and gradients, by its own forward."""
    torch.manual_seed(0)
    adapter = Adapter(12, top_k=top_k).eval()
    fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(adapter)))[0]
    assert type(fast) is mirage.fast.ExpertAdapter
    for batch in (1, 3):
        inputs = torch.randn(batch, 12, 11, 9), torch.randn(batch, 6), torch.randn(batch, 12, 11, 9)
        results = []
        for module in (adapter, fast):
            with torch.no_grad():
                torch.manual_seed(3)
                results.append([module(*inputs), torch.get_rng_state()])
            assert module.loss == 0
            torch.manual_seed(3)
            results[-1].append(module(*inputs))
        for value, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [4, 8])
def test_spectra_of_some_channels_at_a_time(size, monkeypatch):
    torch.manual_seed(0)
    body = FourierAttention(7, size).eval()
    fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(body)))[0]
    assert type(fast) is mirage.fast.FourierAttention
    x = torch.randn(2, 7, 9, 14)
    with torch.no_grad():
        expected = body(x)
        for channels in (7, 3, 1):
            monkeypatch.setattr(experts, "SPECTRA_BYTES", channels * x[:, :1].nbytes)
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)
        mirage.fast.accelerate(body.bfloat16())
        assert body(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "biases"])
def test_large_maps_of_an_attention_come_one_after_the_other(bias, monkeypatch):
    """What lies between two convolutions is there for a part of the channels; modules that are seen are called."""
    torch.manual_seed(0)
    attention, cross = Attention(12).double(), CrossAttention(12, 7).double()
    attention.qkv = nn.Conv2d(12, 36, 1, bias=False).double()
    for conv in (attention.qkv_dwconv, cross.kv_dwconv):
        conv.bias = nn.Parameter(torch.randn(conv.out_channels, dtype=torch.float64)) if bias else None
    maps = [torch.randn(2, 12, 9, 7, dtype=torch.float64) for _ in range(2)]
    for module, inputs, parts in ((attention, maps[:1], 3), (cross, maps, 2)):
        fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(module)))[0]
        with torch.no_grad():
            expected = module(*inputs)
            few = operators(lambda fast=fast, inputs=inputs: fast(*inputs)).count("dynamic_depthwise_conv2d")
            with monkeypatch.context() as patch:
                patch.setattr(fast_modules, "LARGE_FROM", 1)
                many = operators(lambda fast=fast, inputs=inputs: fast(*inputs)).count("dynamic_depthwise_conv2d")
                assert many == few + parts - 1
                torch.testing.assert_close(fast(*inputs), expected, rtol=1e-10, atol=1e-11)
                conv = fast.qkv_dwconv if parts == 3 else fast.kv_dwconv
                calls = []
                conv.register_forward_hook(lambda module, args, output, calls=calls: calls.append(output.shape[1]))
                torch.testing.assert_close(fast(*inputs), expected, rtol=1e-10, atol=1e-11)
                assert calls == [12 * parts]
