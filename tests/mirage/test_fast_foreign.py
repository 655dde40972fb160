"""mirage.fast on modules of other classes: whatever else their instances carry, they run fast and compute the same."""

import copy

import lookalike
import lookalike_nafnet
import lookalike_restormer
import pytest
import torch
from harness import operators, require
from torch import nn

import mirage
import mirage.fast
from mirage import blocks
from mirage.fast.recognise.kinds import KINDS

DIM, HEADS = 12, 2
FOREIGN = {
    mirage.fast.TransformerBlock: lambda: lookalike.Block(DIM, HEADS),
    mirage.fast.LayerNorm: lambda: lookalike.Norm(DIM),
    mirage.fast.GatedCNNBlock: lambda: lookalike.Gated(DIM),
    mirage.fast.Attention: lambda: lookalike.Mixer(DIM, HEADS),
    mirage.fast.FeedForward: lambda: lookalike.FFN(DIM),
    mirage.fast.RestormerBlock: lambda: lookalike_restormer.Block(DIM),
    mirage.fast.EncoderBlock: lambda: lookalike_restormer.ListedBlock(DIM),
    mirage.fast.DecoderBlock: lambda: lookalike_restormer.ListedDecoderBlock(DIM),
    mirage.fast.CrossChannelAttention: lambda: lookalike_restormer.CrossAttention(DIM),
    mirage.fast.ExpertAdapter: lambda: lookalike_restormer.Adapter(DIM),
    mirage.fast.Expert: lambda: lookalike_restormer.Expert(DIM, 6, 4),
    mirage.fast.ExpertSequence: lambda: lookalike_restormer.Sequence(lookalike_restormer.Expert(DIM, 6, 4)),
    mirage.fast.FourierAttention: lambda: lookalike_restormer.FourierAttention(DIM, 4),
    mirage.fast.FrequencyModule: lambda: lookalike_restormer.FrequencyModule(DIM, DIM),
    mirage.fast.NAFBlock: lambda: lookalike_nafnet.Block(DIM, 2 * DIM),
    mirage.fast.BiasFreeLayerNorm: lambda: lookalike_restormer.Norm(DIM, bias=False, centred=False),
    mirage.fast.ChannelAttention: lambda: lookalike_restormer.Attention(DIM),
    mirage.fast.GatedFeedForward: lambda: lookalike_restormer.FeedForward(DIM),
}
BESIDES = {
    mirage.fast.DecoderBlock: lambda x: (x[:, :6].mean((2, 3)),),
    mirage.fast.CrossChannelAttention: lambda x: (x.flip(0),),
    mirage.fast.FrequencyModule: lambda x: (x.flip(0),),
    mirage.fast.Expert: lambda x: (x.flip(0),),
    mirage.fast.ExpertSequence: lambda x: (x.flip(0),),
    mirage.fast.ExpertAdapter: lambda x: (x[:, :6].mean((2, 3)), x.flip(0)),
}
"""What a class takes besides a map, from that map."""
IN_FLOAT32 = {
    mirage.fast.DecoderBlock,
    mirage.fast.Expert,
    mirage.fast.ExpertAdapter,
    mirage.fast.ExpertSequence,
    mirage.fast.FourierAttention,
}
"""These have Fourier transforms, which they compute in float32."""


def own_names(cls):
    """Methods, properties and other attributes that a class of modules has and the class of torch.nn that it is of does
    not."""
    base = next(kind for kind in cls.__mro__ if kind.__module__.startswith("torch.nn."))
    return [name for name in dir(cls) if not name.startswith("__") and not hasattr(base, name)]


def test_every_class_that_foreign_modules_become_is_tried():
    assert set(FOREIGN) == {kind.replacement for kind in KINDS if kind.pattern is not None}
    assert "dynamic_conv" in own_names(mirage.fast.GatedCNNBlock), "the names below must be those of methods"


HIDING = {
    "flag": lambda module, name: setattr(module, name, True),
    "function": lambda module, name: setattr(module, name, lambda *_: 1 / 0),
    "parameter": lambda module, name: module._parameters.update({name: nn.Parameter(torch.ones(1))}),
    "buffer": lambda module, name: module._buffers.update({name: torch.ones(1)}),
    "child": lambda module, name: module._modules.update({name: nn.Identity()}),
}


def called(module, x, *besides):
    """The map that it returns, with the same draws in every call."""
    torch.manual_seed(3)
    return mapped(module(x, *besides))


def mapped(y):
    return y[0] if isinstance(y, tuple) else y


class Mapped(nn.Module):
    """A module that returns its map alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return mapped(self.module(*inputs))


def step(module, x, *besides):
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = called(module, x, *besides)
    generator = torch.Generator().manual_seed(9)
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("hidden", HIDING)
@pytest.mark.parametrize("replacement", FOREIGN, ids=lambda cls: cls.__name__)
def test_attributes_with_the_names_of_methods_do_not_matter(replacement, hidden):
    """In every module of the instance at once, for each name that its fast class has."""
    torch.manual_seed(0)
    plain = FOREIGN[replacement]().double()
    crowded = copy.deepcopy(plain)
    classes = {path: type(m) for path, m in mirage.fast.accelerate(copy.deepcopy(plain)).named_modules()}
    for path, module in list(crowded.named_modules()):
        if classes[path] in FOREIGN:
            for name in own_names(classes[path]):
                HIDING[hidden](module, name)
    mirage.fast.accelerate(crowded)
    assert type(crowded) is replacement and not mirage.fast.summary(crowded).kept
    assert {path: type(m) for path, m in crowded.named_modules() if path in classes} == classes
    x = torch.randn(3, DIM, 6, 7, dtype=torch.float64)
    besides = BESIDES.get(replacement, lambda x: ())(x)
    tolerances = {"rtol": 1e-4, "atol": 1e-5} if replacement in IN_FLOAT32 else {"rtol": 1e-8, "atol": 1e-10}
    for training in (True, False):
        results = step(crowded.train(training), x, *besides), step(plain.train(training), x, *besides)
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, **tolerances)
    with torch.no_grad():
        value, expected = (called(module, x, *besides) for module in (crowded, plain))
        torch.testing.assert_close(value, expected, **tolerances)
    assert not mirage.fast.summary(crowded).called, "and as whole operators"


@pytest.mark.parametrize("replacement", FOREIGN, ids=lambda cls: cls.__name__)
def test_traces(replacement):
    """Recorded at one size and run at another; experts are chosen by draws."""
    torch.manual_seed(0)
    fast = mirage.fast.accelerate(FOREIGN[replacement]().eval())
    assert type(fast) is replacement
    (x, *besides), (other, *others) = (
        (x, *BESIDES.get(replacement, lambda x: ())(x))
        for x in (torch.randn(1, DIM, *size) for size in ((12, 12), (12, 20)))
    )
    with torch.no_grad():
        torch.manual_seed(3)  # as `called` does: what is drawn while it is recorded decides
        traced = torch.jit.trace(Mapped(fast), (x, *besides), check_trace=False)
        torch.testing.assert_close(called(traced, x, *besides), called(fast, x, *besides), rtol=1e-5, atol=1e-6)
        if replacement in IN_FLOAT32:  # squares are counted, and experts chosen, when it is recorded
            return
        torch.testing.assert_close(called(traced, other, *others), called(fast, other, *others), rtol=1e-5, atol=1e-6)


def test_classes_of_common_modules_add_no_method():
    """Instances of PyTorch's own classes keep their attributes as well: a new method could be hidden by one."""
    for kind in KINDS:
        if kind.pattern is None:
            assert set(own_names(kind.replacement)) <= set(own_names(kind.reference)), kind.replacement


def test_a_method_replaced_on_the_instance_is_compared():
    """An instance of the reference's own class counts as one of an unknown class then."""
    block = blocks.TransformerBlock(DIM, HEADS).eval()
    gated = block.attn.gatedcnn
    gated.dynamic_conv = lambda x: 2 * blocks.GatedCNNBlock.dynamic_conv(gated, x)
    x = torch.randn(1, DIM, 8, 8)
    with torch.no_grad():
        expected = block(x)
        mirage.fast.accelerate(block)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    kept = mirage.fast.summary(block).kept
    assert list(kept) == ["attn.gatedcnn"] and "computes something else than GatedCNNBlock" in kept["attn.gatedcnn"]
    gated.dynamic_conv = lambda x: blocks.GatedCNNBlock.dynamic_conv(gated, x)
    assert not mirage.fast.summary(mirage.fast.accelerate(block)).kept


def test_one_learned_depthwise_kernel_is_named_and_the_rest_runs_fast():
    require("cpp")
    torch.manual_seed(0)
    level = nn.Sequential(lookalike.Block(DIM, HEADS, dynamic_conv=False)).double()
    fast = mirage.fast.accelerate(copy.deepcopy(level))
    summary = mirage.fast.summary(fast)
    assert summary.kept == {
        "0.attn.gatedcnn": "it has one learned depthwise kernel for all samples (dynamic_conv=False)"
    }
    assert sorted(summary.replaced.values()) == [
        *("Attention", "BlockSequence", "FeedForward", "LayerNorm", "LayerNorm", "TransformerBlock")
    ]
    x = torch.randn(2, DIM, 6, 7, dtype=torch.float64)
    for value, expected in zip(step(fast, x), step(level, x), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
    assert operators(lambda: fast(x))[-1] == "feed_forward_stage"
    called = {"0": "mixer_stage: attn.gatedcnn is Gated, not mirage.fast.GatedCNNBlock"}
    assert mirage.fast.summary(fast).called == called


def test_every_block_of_the_lookalike_runs_whole():
    require("cpp")
    torch.manual_seed(0)
    model = mirage.fast.accelerate(lookalike.ReleasedStyleMIRAGE().eval())
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        seen = [name for name in operators(lambda: model(image)) if name != "dense_conv2d"]
    assert seen == ["transformer_blocks"] * 2
    seen = [name for name in operators(lambda: model.train()(image)) if name != "dense_conv2d"]
    assert seen == ["mixer_stage", "feed_forward_stage"] * 3
