"""NAFNet's blocks on `mirage.fast`: each half as one operator, with the scale of its branch folded into the last
convolution."""

import copy

import pytest
import torch
from harness import ROUNDING_NOISE, operators
from lookalike_nafnet import Block
from same_networks import check_same
from torch import nn

import mirage.fast
from mirage.networks import nafnet

SMALL = {"width": 6, "encoder_blocks": (1, 2), "middle_blocks": 1, "decoder_blocks": (1, 1)}
BLOCKS = 6


def trained(module):
    """With every weight off its initial value: branches of new blocks are multiplied by 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture
def network():
    torch.manual_seed(0)
    return trained(nafnet.NAFNet(**SMALL).double())


def image(height=12, width=20):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


def test_values_and_gradients(network):
    x, fast = image(), mirage.fast.accelerate(copy.deepcopy(network))
    check_same(network, fast, x)
    assert operators(lambda: fast(x)).count("feed_forward_stage") == 2 * BLOCKS


def test_what_the_summary_says(network):
    before = copy.deepcopy(network)
    summary = mirage.fast.summary(mirage.fast.accelerate(network))
    assert list(summary.replaced.values()).count("NAFBlock") == BLOCKS
    assert not summary.kept and not summary.called
    reverted = mirage.fast.revert(network)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in before.modules()]


def test_memory():
    """What a half keeps for backward of the size of an image: its input, or also the hidden tensor where it is wide."""
    block = nafnet.NAFBlock(96)
    kept = []
    for memory in ("low", "fast"):
        fast = mirage.fast.accelerate(copy.deepcopy(block), memory=memory)
        for half in type(fast).halves:
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.shape) or t, lambda t: t):
                half(fast, torch.randn(1, 96, 8, 8).requires_grad_())
            kept.append([shape for shape in sizes if len(shape) == 4 and shape[-1] == 8])
    x, hidden = (1, 96, 8, 8), (1, 192, 8, 8)
    assert kept == [[x], [x], [x, hidden], [x, hidden]]


def test_wide_blocks_call_their_modules_where_a_gradient_is_wanted():
    block = trained(mirage.fast.accelerate(nafnet.NAFBlock(130).double()))
    x = torch.randn(1, 130, 4, 5, dtype=torch.float64)
    assert not operators(lambda: block(x))
    with torch.no_grad():
        assert operators(lambda: block(x)) == ["feed_forward_stages"]
        value = block(x)
    torch.testing.assert_close(block(x).detach(), value)


def test_low_precision():
    """The scale is folded into weights of 16 bits without rounding them a second time."""
    torch.manual_seed(0)
    block = trained(nafnet.NAFBlock(16)).bfloat16()
    fast, x = mirage.fast.accelerate(copy.deepcopy(block)), torch.randn(1, 16, 24, 20).bfloat16()
    with torch.no_grad():
        truth = copy.deepcopy(block).double()(x.double())
        found, eager = ((model(x).double() - truth).norm() for model in (fast, block))
    assert fast(x).dtype == torch.bfloat16 and found <= ROUNDING_NOISE * eager
    parameters = list(fast.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(fast(x).sum(), parameters), strict=True):
        assert grad.dtype == parameter.dtype and grad.shape == parameter.shape


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.conv2.register_forward_hook(lambda *_: None), "conv2 has hooks"),
        (lambda b: setattr(b.conv2, "padding", (0, 0)), "conv2 has padding (0, 0), not (1, 1)"),
        (lambda b: setattr(b, "sg", nn.GLU(1)), "sg is GLU, not SimpleGate"),
        (lambda b: b.sca.append(nn.Sigmoid()), "sca has 3 modules, not 2"),
        (lambda b: b.sca.__setitem__(0, nn.AvgPool2d(8, 1)), "sca.0 is AvgPool2d, not AdaptiveAvgPool2d"),
        (lambda b: setattr(b, "dropout1", nn.Dropout(0.5)), "dropout1 has training True, not False"),
    ],
    ids=["hook", "setting", "gate", "sigmoid", "windows", "dropout"],
)
def test_what_is_changed_afterwards_is_called(change, reason):
    torch.manual_seed(0)
    block = mirage.fast.accelerate(trained(nafnet.NAFBlock(6)))
    assert not mirage.fast.summary(block).called
    change(block)
    called = mirage.fast.summary(block).called[""]
    assert called.startswith(f"feed_forward_stage: {reason}")
    original = copy.deepcopy(block)
    original.__class__ = nafnet.NAFBlock
    if "padding" not in reason:
        values = []
        for model in (block, original):
            torch.manual_seed(1)  # of the dropout too
            values.append(model(torch.randn(1, 6, 8, 8)))
        torch.testing.assert_close(*values)


def test_dropout_that_is_asleep():
    """In eval mode it does nothing, and the operator runs."""
    block = mirage.fast.accelerate(nafnet.NAFBlock(6))
    block.dropout2 = nn.Dropout(0.5)
    assert mirage.fast.summary(block).called
    assert not mirage.fast.summary(block.eval()).called


# ---- classes that are written otherwise ----------------------------------------------------------------------------


class Halved(Block):
    def forward(self, inp):
        return inp + (super().forward(inp) - inp) / 2


@pytest.mark.parametrize("wide", [10, 20, 28])
def test_blocks_of_other_classes(wide):
    torch.manual_seed(0)
    block = mirage.fast.accelerate(Block(10, wide).double().eval())
    assert type(block) is mirage.fast.NAFBlock
    x = torch.randn(2, 10, 9, 7, dtype=torch.float64)
    fast, original = trained(block), copy.deepcopy(block)
    original.__class__ = Block
    with torch.no_grad():
        assert operators(lambda: fast(x)) == ["feed_forward_stages"]
        torch.testing.assert_close(fast(x), original(x))


def test_blocks_that_compute_something_else():
    """New branches are multiplied by 0, which would make any two blocks equal."""
    block = Halved(10, 20)
    nn.init.zeros_(block.beta)
    nn.init.zeros_(block.gamma)
    mirage.fast.accelerate(nn.Sequential(block))
    assert type(block) is Halved
    assert mirage.fast.summary(block).kept[""].startswith("it computes something else than NAFBlock")
