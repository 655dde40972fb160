"""mirage.fast on the code that the authors released, where a checkout of it is named.

    MIRAGE_RELEASED_CODE=path/to/MIRAGE pytest tests/mirage/test_fast_released.py

It needs einops. For timm, of which that code uses the stochastic depth, and fvcore, which counts FLOPs when a file is
run as a program, there are substitutes where they are not installed.
"""

import copy
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import lookalike
import pytest
import torch
from harness import operators, require
from torch import nn

import mirage
import mirage.fast

FOLDER = os.environ.get("MIRAGE_RELEASED_CODE")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="MIRAGE_RELEASED_CODE names no checkout of the released code")

SIZES = ("tiny", "small")
RECOGNISED = {  # name in the released code: (name in the look-alike, fast class)
    "LayerNorm": ("Norm", "LayerNorm"),
    "GatedCNNBlock": ("Gated", "GatedCNNBlock"),
    "FeedForward": ("FFN", "FeedForward"),
    "Attention": ("Mixer", "Attention"),
    "TransformerBlock": ("Block", "TransformerBlock"),
}
LEVELS = 8


def is_importable(name):
    try:
        importlib.import_module(name)
    except Exception:  # whatever a package raises that does not fit the others
        return False
    return True


@pytest.fixture(scope="module")
def released():
    """The two files as modules, by size."""
    pytest.importorskip("einops", reason="the released code needs einops")
    substitutes = {
        "fvcore.nn": {"FlopCountAnalysis": None, "flop_count_table": None},
        "timm.models.layers": {"DropPath": lookalike.DropPath, "trunc_normal_": nn.init.trunc_normal_},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in substitutes.items():
            if is_importable(name):
                continue
            parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
            for module in (*parents, name):
                patch.setitem(sys.modules, module, ModuleType(module))
            vars(sys.modules[name]).update(content)
        return SimpleNamespace(**{size: load(Path(FOLDER) / "net" / f"mirage_{size}.py") for size in SIZES})


def load(path):
    spec = importlib.util.spec_from_file_location(f"released_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=SIZES)
def model(request, released):
    """The whole network of a size, every parameter and statistic off its initial value. Tests take copies."""
    torch.manual_seed(0)
    model = getattr(released, request.param).MIRAGE()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(0.02 * torch.rand_like(tensor))
    return model


def image(size=32, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_nothing_is_kept_and_every_block_runs_whole(model):
    require("cpp")
    fast = mirage.fast.accelerate(copy.deepcopy(model))
    summary = mirage.fast.summary(fast)
    assert not summary.kept and not summary.called
    counts = {name: list(summary.replaced.values()).count(name) for name in set(summary.replaced.values())}
    blocks = sum(type(module).__name__ == "TransformerBlock" for module in model.modules())
    assert counts == {
        **{name: blocks for _, name in RECOGNISED.values()},
        "LayerNorm": 2 * blocks,
        "BlockSequence": LEVELS,
        "Conv2d": 11,
        "PixelShuffle": 3,
        "PixelUnshuffle": 3,
    }
    with torch.no_grad():
        seen = operators(lambda: fast.eval()(image()))
    assert [name for name in seen if name != "dense_conv2d"] == ["transformer_blocks"] * LEVELS
    seen = operators(lambda: fast.train()(image()))
    assert [name for name in seen if name != "dense_conv2d"] == ["mixer_stage", "feed_forward_stage"] * blocks


def test_inference_is_that_of_the_original(model):
    """The image and the loss, of which float64 shows mistakes and float32 the rounding."""
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        original = copy.deepcopy(model).to(dtype).eval()
        fast = mirage.fast.accelerate(copy.deepcopy(original))
        x = image(size=48).to(dtype)
        with torch.no_grad():
            (restored, loss), (expected, expected_loss) = fast(x), original(x)
            assert (restored - expected).norm() <= limit * expected.norm()
            assert abs(loss - expected_loss) <= limit * expected_loss.abs()
            again = mirage.fast.revert(fast)(x)
        assert torch.equal(again[0], expected) and torch.equal(again[1], expected_loss)


def test_a_step_of_training_is_that_of_the_original(model):
    """Results, loss, gradients, running statistics and what the step leaves of the random numbers, in float64."""
    original = copy.deepcopy(model).double().train()
    fast = mirage.fast.accelerate(copy.deepcopy(original))
    x, results = image().double(), []
    for network in (original, fast):
        torch.manual_seed(7)
        restored, loss = network(x)
        (restored.abs().mean() + loss).backward()
        results.append((restored.detach(), loss.detach(), torch.get_rng_state()))
    (expected, expected_loss, state), (restored, loss, fast_state) = results
    assert (restored - expected).norm() <= 1e-12 * expected.norm()
    assert abs(loss - expected_loss) <= 1e-10 * expected_loss.abs()
    assert torch.equal(fast_state, state)
    for (name, parameter), peer in zip(original.named_parameters(), fast.parameters(), strict=True):
        assert (peer.grad - parameter.grad).norm() <= 1e-7 * max(parameter.grad.norm().item(), 1e-6), name
    for (name, buffer), peer in zip(original.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(peer, buffer, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_one_learned_kernel_in_place_of_generated_ones(released, size):
    """`dynamic_conv=False`: named, and the rest of the block is fast."""
    torch.manual_seed(0)
    code = getattr(released, size)
    original = nn.Sequential(code.TransformerBlock(24, 2, 2, False, "WithBias")).double()
    original[0].attn.gatedcnn = code.GatedCNNBlock(8, drop_path=0.1, dynamic_conv=False).double()
    fast = mirage.fast.accelerate(copy.deepcopy(original))
    summary = mirage.fast.summary(fast)
    assert list(summary.kept) == ["0.attn.gatedcnn"] and "dynamic_conv=False" in summary.kept["0.attn.gatedcnn"]
    assert len(summary.replaced) == 6
    x = torch.rand(2, 24, 9, 10, dtype=torch.float64)
    results = []
    for network in (fast, original):
        torch.manual_seed(7)
        y = network(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in network.parameters())])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_the_lookalike_has_every_attribute_of_the_released_classes(released, size):
    """So that what those attributes hide is hidden in the tests that need no checkout, too."""
    code = getattr(released, size)
    block, alike = code.TransformerBlock(12, 2, 2, False, "WithBias"), lookalike.Block(12, 2)
    for path, module in block.named_modules():
        peer = alike.get_submodule(path)
        assert names(module) <= names(peer), path
    static = code.GatedCNNBlock(4, dynamic_conv=False)
    assert names(static) <= names(lookalike.Gated(4, dynamic_conv=False))
    for name, (peer, _) in RECOGNISED.items():
        assert any(type(m).__name__ == name for m in block.modules()) and hasattr(lookalike, peer)


def names(module):
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}
