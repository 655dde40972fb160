"""mirage.fast.BlockSequence: blocks that run as one operator."""

import copy

import pytest
import torch
from fast_blocks import image, pair
from harness import operators, require
from torch import nn

import mirage
import mirage.fast


def sequence(count=4):
    """A sequence of different blocks in eval mode, and its accelerated copy."""
    level = nn.Sequential(*(pair(drop_path=0.2)[0] for _ in range(count))).eval()
    for i, block in enumerate(level):
        block.ffn.project_out.weight.data.mul_(1 + 0.1 * i)
    return level, mirage.fast.accelerate(copy.deepcopy(level))


def test_a_sequence_of_blocks_is_one_operator():
    require("cpp")
    level, fast = sequence()
    assert type(fast) is mirage.fast.BlockSequence and list(fast.state_dict()) == list(level.state_dict())
    x = image()
    with torch.no_grad():
        assert operators(lambda: fast(x)) == ["transformer_blocks"]
        torch.testing.assert_close(fast(x), level(x), rtol=1e-9, atol=1e-9)
        fast[2].attn.gatedcnn.norm.train()  # depends on the batch: its neighbours still run together
        expected = ["transformer_blocks", "mixer_stage", "feed_forward_stage", "transformer_blocks"]
        assert operators(lambda: fast(x)) == expected
    assert operators(lambda: fast(x)) == ["mixer_stage", "feed_forward_stage"] * 4
    assert type(mirage.fast.revert(fast)) is nn.Sequential


@pytest.mark.parametrize("position", [0, 1, 3])
def test_hooks_of_blocks_in_a_sequence_fire(impl, position):
    """In order, with the tensors that they would see, and what they return is used."""
    level, fast = sequence()
    seen, x = [], image()
    for module in (level, fast):
        module[position].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        module[position].register_forward_hook(lambda m, args, y: 2 * y)
    with torch.no_grad():
        expected, value = level(x), fast(x)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-9)


def test_changed_blocks_of_a_sequence_are_called(impl):
    class Negated(mirage.fast.TransformerBlock):
        def forward(self, x):
            return -super().forward(x)

    level, fast = sequence()
    x = image()
    with torch.no_grad():
        expected = level[3](level[2](-level[1](level[0](x))))
        fast[1].__class__ = Negated
        torch.testing.assert_close(fast(x), expected, rtol=1e-9, atol=1e-9)
        level, fast = sequence()
        for module in (level, fast):
            module.insert(2, nn.Tanh())
            module[1].ffn.act = nn.ReLU()
        torch.testing.assert_close(fast(x), level(x), rtol=1e-9, atol=1e-9)
        for module in (level, fast):
            del module[0:5]
        assert fast(x) is x


def test_only_sequences_of_blocks_are_replaced():
    model = nn.Sequential(nn.Sequential(), nn.Sequential(*(pair()[0] for _ in range(2))), nn.Sequential(nn.Tanh()))
    mirage.fast.accelerate(model)
    assert [type(m) for m in model] == [nn.Sequential, mirage.fast.BlockSequence, nn.Sequential]
    assert type(model) is nn.Sequential


def test_a_sequence_compiles_in_one_graph():
    _, fast = sequence(2)
    fast.float()
    torch._dynamo.reset()
    x = image(dtype=torch.float32)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), fast(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_channels_last_stays(impl, grad):
    """Also where a result has one pixel or one channel, of which both layouts are names."""
    level, fast = sequence()
    seen = []
    fast[1].register_forward_hook(lambda module, args, y: seen.append((args[0].stride(), y.stride())))
    with torch.set_grad_enabled(grad):
        for shape in ((2, 6, 7), (1, 1, 1)):
            x = image(*shape[:1], 12, *shape[1:]).contiguous(memory_format=torch.channels_last)
            for module, expected in ((fast, level(x)), (fast[0], level[0](x))):
                value = module(x)
                assert value.stride() == x.stride()
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert not grad or seen[0] == (image().stride(),) * 2  # copied once for the whole sequence
    assert fast(image()).is_contiguous()
