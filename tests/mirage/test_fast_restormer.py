"""Restormer's blocks on `mirage.fast`: each half as one operator, whatever the norm and the biases."""

import copy

import pytest
import torch
import torch.nn.functional as F
from harness import operators
from lookalike_restormer import Block
from same_networks import check_same
from torch import nn

import mirage
from mirage.networks.restormer import Restormer, RestormerBlock

SMALL = {"dim": 12, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 2, 3, 4]}
BLOCKS = 8
FORMS = {
    "as published": {},
    "bias-free norms": {"norm": "BiasFree"},
    "biases": {"bias": True},
    "biases, bias-free norms": {"norm": "BiasFree", "bias": True},
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def network(request):
    torch.manual_seed(0)
    found = Restormer(**SMALL, **request.param).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # norms and temperatures that are not all ones
    return found


def image(height=16, width=24):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


def test_values_and_gradients(network):
    x, fast = image(), mirage.fast.accelerate(copy.deepcopy(network))
    check_same(network, fast, x)
    names = operators(lambda: fast(x))
    assert names.count("feed_forward_stage") == names.count("channel_attention_stage") == BLOCKS


def test_what_the_summary_says(network):
    bias_free = network.config["norm"] == "BiasFree"
    before = copy.deepcopy(network)
    summary = mirage.fast.summary(mirage.fast.accelerate(network))
    kinds = list(summary.replaced.values())
    assert kinds.count("RestormerBlock") == kinds.count("GatedFeedForward") == kinds.count("ChannelAttention") == BLOCKS
    assert kinds.count("BiasFreeLayerNorm" if bias_free else "LayerNorm") == 2 * BLOCKS
    assert not summary.kept and not summary.called
    reverted = mirage.fast.revert(network)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in before.modules()]


def test_memory(network):
    """What a block keeps for backward, of its second half: its input, or also the hidden tensor where it is wide."""
    torch.manual_seed(0)
    block = RestormerBlock(96, 2, 2.66, False, "BiasFree")
    x = torch.randn(1, 96, 8, 8)
    kept = []
    for memory in ("low", "fast"):
        sizes = []
        fast = mirage.fast.accelerate(copy.deepcopy(block), memory=memory)
        half = type(fast).halves[1]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.shape) or t, lambda t: t):
            half(fast, x.requires_grad_())
        kept.append([shape for shape in sizes if len(shape) == 4 and shape[-1] == 8])
    assert kept == [[(1, 96, 8, 8)], [(1, 96, 8, 8), (1, 510, 8, 8)]]


def test_memory_of_attention():
    """Its input, the weights, and a few matrices of 48 x 48 for each of two heads."""
    block = mirage.fast.accelerate(RestormerBlock(96, 2, 2.66, False, "WithBias"))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        type(block).halves[0](block, torch.randn(1, 96, 8, 8).requires_grad_())
    weights = [*block.norm1.parameters(), *block.attn.parameters()]
    assert sum(t.numel() for t in kept.values()) == 96 * 64 + sum(w.numel() for w in weights) + 2 * 98 * 48


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.ffn.dwconv.register_forward_hook(lambda *_: None), "ffn.dwconv has hooks"),
        (lambda b: setattr(b.ffn.project_in, "stride", (2, 2)), "ffn.project_in has stride (2, 2), not (1, 1)"),
        (lambda b: setattr(b.ffn, "dwconv", nn.Identity()), "ffn.dwconv is Identity, not Conv2d"),
    ],
    ids=["hook", "setting", "class"],
)
def test_what_is_changed_afterwards_is_called(change, reason):
    torch.manual_seed(0)
    block = mirage.fast.accelerate(RestormerBlock(12, 2, 2.66, True, "WithBias"))
    assert not mirage.fast.summary(block).called
    change(block)
    assert mirage.fast.summary(block).called == {"": f"feed_forward_stage: {reason}"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.attn.qkv.register_forward_hook(lambda *_: None), "attn.qkv has hooks"),
        (lambda b: setattr(b.attn.qkv_dwconv, "dilation", (2, 2)), "attn.qkv_dwconv has dilation (2, 2), not (1, 1)"),
        (lambda b: setattr(b.attn, "project_out", nn.Identity()), "attn.project_out is Identity, not Conv2d"),
    ],
    ids=["hook", "setting", "class"],
)
def test_attention_that_is_changed_afterwards_is_called(change, reason):
    torch.manual_seed(0)
    block = mirage.fast.accelerate(RestormerBlock(12, 2, 2.66, True, "WithBias"))
    assert not mirage.fast.summary(block).called
    change(block)
    assert mirage.fast.summary(block).called == {"": f"channel_attention_stage: {reason}"}


# ---- classes that are written otherwise ----------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "centred"), [(True, True), (False, False)])
def test_blocks_of_other_classes(bias, centred):
    torch.manual_seed(0)
    block = Block(10, bias=bias, centred=centred).double()
    x = torch.randn(2, 10, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        mirage.fast.accelerate(block)
        assert operators(lambda: block(x)) == ["channel_attention_stage", "feed_forward_stage"]
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("options", "path", "reason"),
    [
        ({"activation": F.relu}, "ffn", "it computes something else than GatedFeedForward"),
        ({"bias": False, "centred": True}, "norm2", "it computes something else than BiasFreeLayerNorm"),
    ],
    ids=["gate", "norm"],
)
def test_blocks_that_compute_something_else(options, path, reason):
    torch.manual_seed(0)
    block = Block(10, **options).double()
    x = torch.randn(2, 10, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        mirage.fast.accelerate(block)
        assert "feed_forward_stage" not in operators(lambda: block(x))
        torch.testing.assert_close(block(x), expected)
    assert mirage.fast.summary(block).kept[path].startswith(reason)
