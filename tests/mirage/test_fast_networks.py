"""Whole networks of `mirage.fast`: what they compute is the reference's, and a pass without gradients keeps no feature
map for longer than it is needed."""

import copy

import pytest
import torch
from harness import operators, require
from same_networks import check_same
from torch import nn

import mirage
import mirage.fast
from mirage.complexity import MemoryTracker
from mirage.fast import block as fast_block
from mirage.fast import strips
from mirage.networks import nafnet, promptir, restormer

LEVELS = {"num_blocks": [2, 1, 1, 1], "num_refinement_blocks": 2, "heads": [1, 2, 3, 4]}
NETWORKS = {
    "mirage": lambda: mirage.MIRAGE(dim=12, num_blocks=(2, 1, 1, 1), num_refinement_blocks=2, heads=(1, 1, 2, 4)),
    "restormer": lambda: restormer.Restormer(dim=12, **LEVELS),
    "restormer, dual pixels": lambda: restormer.Restormer(in_channels=6, dim=12, dual_pixel_task=True, **LEVELS),
    "promptir": lambda: promptir.PromptIR(dim=16, **{**LEVELS, "heads": [1, 2, 4, 8]}),
    "nafnet": lambda: nafnet.NAFNet(width=6, encoder_blocks=(2, 1), middle_blocks=1, decoder_blocks=(1, 2)),
    "nafnet, empty levels": lambda: nafnet.NAFNet(
        width=6, encoder_blocks=(0, 1), middle_blocks=0, decoder_blocks=(0, 0)
    ),
}
MAPS = {"mirage": (24, 2), "restormer": (24, 2), "promptir, dim 48": (96, 2), "nafnet": (6, 3)}
"""Channels of the finest and widest level, and how many of its feature maps a pass takes: a block's input and result,
which what joins two levels takes too; NAFNet's upsampling has its result, the skip and their sum. PromptIR's prompts
have their published numbers of channels whatever `dim` is, and weigh more than the finest level where it is small."""


def build(name, dtype=torch.float64):
    """With every weight off its start, where branches and their scales may be 0 or 1."""
    torch.manual_seed(0)
    make = NETWORKS.get(name, lambda: promptir.PromptIR(**{**LEVELS, "heads": [1, 2, 4, 8]}))
    network = make().to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network


def image(network, height=16, width=24):
    channels = network.config["in_channels"]
    dtype = next(network.parameters()).dtype
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients(name):
    network = build(name)
    fast = mirage.fast.accelerate(copy.deepcopy(network))
    x = image(network)
    assert type(fast) is getattr(mirage.fast, type(network).__name__) and type(fast) is not type(network)
    check_same(network, fast, x)
    with torch.no_grad():
        before = x.clone()
        torch.testing.assert_close(fast(x), network(x), rtol=1e-8, atol=1e-9)
        assert torch.equal(x, before)
    assert type(mirage.fast.revert(fast)) is type(network)


@pytest.mark.parametrize("grad", [False, True])
def test_the_head_sees_the_features(grad):
    network = build("mirage")
    fast = mirage.fast.accelerate(copy.deepcopy(network))
    x = image(network)
    with torch.set_grad_enabled(grad):
        (restored, embeddings), (expected, of_reference) = (m(x, return_spd=True) for m in (fast, network))
    torch.testing.assert_close(restored, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(embeddings, of_reference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", MAPS)
def test_what_a_pass_keeps(name):
    require("cpp")
    network = mirage.fast.accelerate(build(name, torch.float32))
    channels, maps = MAPS[name]
    x = image(network, 128, 192)
    tracker = MemoryTracker()
    tracker.add([x, *network.parameters(), *network.buffers()])
    before = tracker.current
    with torch.inference_mode(), tracker:
        network(x)
    one, other = channels * 128 * 192 * 4, 3 * x.nbytes + (64 << 10)  # the image padded, restored, cropped; scratch
    assert maps * one <= tracker.peak - before <= maps * one + other


def seen_by_hooks(network, x):
    """What every module outside blocks returns in a pass without gradients, before and after the pass."""
    found, handles = [], []
    for path, module in network.named_modules():
        if path.count(".") <= 1 and not hasattr(module, "norm1"):

            def keep(module, args, y, path=path):
                if isinstance(y, torch.Tensor):
                    found.append((path, y, y.clone(), args[0].clone()))

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_see_what_they_would(name):
    """All that the reference's would, in its order, and nothing is written over that a hook has kept."""
    network = build(name)
    fast = mirage.fast.accelerate(copy.deepcopy(network))
    x = image(network)
    expected, seen = seen_by_hooks(network, x), seen_by_hooks(fast, x)
    assert [path for path, *_ in seen] == [path for path, *_ in expected] and len(seen) > 5
    for (path, kept, at_once, given), (_, value, _, taken) in zip(seen, expected, strict=True):
        assert torch.equal(kept, at_once), path
        torch.testing.assert_close(kept, value, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(given, taken, rtol=1e-7, atol=1e-8)


def test_networks_that_do_something_else_stay():
    class Doubled(nafnet.NAFNet):
        def restore(self, x):
            return 2 * super().restore(x)

    network = Doubled(width=6, encoder_blocks=(1,), middle_blocks=1, decoder_blocks=(1,)).double().eval()
    x = image(network)
    with torch.no_grad():
        expected = network(x)
        assert type(mirage.fast.accelerate(network)) is Doubled
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


def test_large_images_have_one_block_at_a_time(monkeypatch):
    """Several as one operator take a third feature map."""
    require("cpp")
    network = mirage.fast.accelerate(build("mirage"))
    x = image(network)
    with torch.no_grad():
        together = operators(lambda: network(x)).count("transformer_blocks")
        expected = network(x)
        monkeypatch.setattr(strips, "LARGE_FROM", 1)
        assert operators(lambda: network(x)).count("transformer_blocks") == 11 > together == 8
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


def test_a_sequence_keeps_what_others_hold():
    """What is taken out of a list is freed only where nobody else has it."""
    network = mirage.fast.accelerate(build("restormer"))
    level, x = network.encoder_level1, torch.rand(1, 12, 8, 8, dtype=torch.float64)
    assert type(level) is mirage.fast.BlockSequence
    with torch.no_grad():
        expected, before, held = level(x), x.clone(), [x]
        assert torch.equal(fast_block.run_sequence(level, held), expected) and not held
        assert torch.equal(x, before)
    assert isinstance(level, nn.Sequential)
