"""mirage.fast.TransformerBlock: when it goes back to calling its modules."""

import copy
from unittest import mock

import pytest
import torch
from fast_blocks import assert_alike, assert_infers_alike, image, pair, runs_stages
from harness import operators, require
from torch import nn

import mirage
import mirage.fast
from mirage import blocks
from mirage.fast.block import BLOCKS
from mirage.fast.recognise.mirage_block import STAGES
from mirage.fast.recognise.pattern import Pattern
from mirage_kernels._runtime import dispatch


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=lambda o: next(iter(o)),
)
def test_unusual_batch_norms(options):
    block, fast = pair()
    for b in (block, fast):
        b.attn.gatedcnn.norm = nn.BatchNorm2d(4, **options).double()
    assert runs_stages(fast) == (False, True)
    for training in (True, False):
        assert_alike(block.train(training), fast.train(training), image())


@pytest.mark.parametrize(
    ("path", "module", "stages"),
    [
        ("ffn.act", nn.ReLU(), (True, False)),
        ("ffn.dwconv", nn.Conv2d(48, 48, 5, padding=2, groups=48, bias=False), (True, False)),
        ("ffn.project_out", nn.Conv2d(24, 12, 1), (True, False)),
        ("attn.mlp.1", nn.GELU("tanh"), (False, True)),
        ("attn.qkv", nn.Sequential(nn.Conv2d(4, 12, 1)), (False, True)),
        ("attn.qkv_dwconv", nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect", bias=False), (False, True)),
        ("attn.gatedcnn.kernel_generator.2", nn.Tanh(), (False, True)),
        ("attn.gatedcnn.drop_path", nn.Dropout(0.3), (False, True)),
        ("attn.gatedcnn.act", nn.SiLU(), (False, True)),
        ("norm1", blocks.LayerNorm(12), (False, True)),
        ("norm2", nn.Identity(), (True, False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_replaced_children_are_called(path, module, stages):
    block, fast = pair()
    parent, name = path.rsplit(".", 1) if "." in path else ("", path)
    for b in (block, fast):
        b.get_submodule(parent)._modules[name] = copy.deepcopy(module).double()
    assert runs_stages(fast) == stages
    assert_alike(block, fast, image())
    if not isinstance(module, nn.Dropout):
        assert_infers_alike(block, fast, image())


def test_hooks_on_any_bypassed_module_fire(impl):
    block, fast = pair()
    x = image()
    plain = fast.eval()(x)
    for name, module in fast.named_modules():
        if not name:
            continue
        called = []
        handle = module.register_forward_hook(lambda *_, called=called: called.append(1))
        value = fast(x)
        with torch.no_grad():
            inferred = fast(x)
        handle.remove()
        assert called == [1, 1], name
        torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inferred, plain, rtol=1e-9, atol=1e-9)
    assert runs_stages(fast) == (True, True)


REGISTER = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", REGISTER)
def test_a_module_with_any_hook_is_no_plain_one(kind):
    _, fast = pair()
    for name, module in fast.named_modules():
        if not name:
            continue
        handle = getattr(module, f"register_{kind}")(lambda *_: None)
        first, second = (name.startswith(half) for half in (("norm1", "attn"), ("norm2", "ffn")))
        assert runs_stages(fast) == (not first, not second), name
        handle.remove()
    assert runs_stages(fast) == (True, True)


CHANGES = {
    "attn.qkv": {"stride": (2, 2), "padding": (1, 1), "dilation": (2, 2), "groups": 2, "padding_mode": "circular"},
    "attn.qkv_dwconv": {"groups": 4, "kernel_size": (3, 1), "padding": (0, 0), "dilation": (2, 2)},
    "attn.gatedcnn.norm": {"affine": False, "track_running_stats": False, "momentum": None},
    "attn.gatedcnn.act": {"approximate": "tanh"},
    "attn.gatedcnn.kernel_generator.0": {"output_size": 2},
    "attn.mlp.2": {"stride": (2,), "padding": (1,), "dilation": (2,), "groups": 3},
    "ffn.project_in": {"kernel_size": (3, 3), "stride": (2, 2), "groups": 3},
    "ffn.dwconv": {"groups": 24, "padding_mode": "reflect", "stride": (2, 1)},
    "ffn.act": {"approximate": "tanh"},
}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in CHANGES.items() for name in names])
def test_a_module_set_up_otherwise_is_no_plain_one(path, name):
    """What a user may set on a child after the block was accelerated."""
    _, fast = pair()
    module, value = fast.get_submodule(path), CHANGES[path][name]
    before = getattr(module, name)
    setattr(module, name, value)
    assert runs_stages(fast) == (not path.startswith("attn"), not path.startswith("ffn"))
    setattr(module, name, before)
    assert runs_stages(fast) == (True, True)


def test_a_bias_and_a_forward_of_its_own_are_seen():
    _, fast = pair()
    for path in ("attn.gatedcnn.gic2", "ffn.project_out"):
        module = fast.get_submodule(path)
        module.bias = nn.Parameter(torch.zeros(1))
        assert runs_stages(fast) == (not path.startswith("attn"), not path.startswith("ffn"))
        module.bias = None
        module.forward = lambda x: x
        assert runs_stages(fast) == (not path.startswith("attn"), not path.startswith("ffn"))
        del module.forward
    assert runs_stages(fast) == (True, True)


def test_one_call_tells_what_a_block_is(monkeypatch):
    """Not only by the questions asked in Python, which take several times as long; with the same weights in order."""
    require("cpp")
    level = nn.Sequential(*(pair(drop_path=0.2, training=False)[1] for _ in range(3)))
    with mock.patch.object(Pattern, "call_problem", side_effect=AssertionError("asked in Python")):
        quick = [stage.match(level[0]) for stage in STAGES], *BLOCKS.match_run(list(level), 1)
    monkeypatch.setattr(dispatch, "native", None)
    asked = [stage.match(level[0]) for stage in STAGES], *BLOCKS.match_run(list(level), 1)
    for a, b in zip(quick[0], asked[0], strict=True):
        assert all(x is y for x, y in zip(a, b, strict=True))
    assert quick[1] == asked[1] == 2 and quick[3] == asked[3] == [1e-5] * 6
    last = level[1], level[2]
    expected = [t for block in last for stage in STAGES for t in stage.match(block)[: len(stage.weights)]]
    for found in (quick[2], asked[2]):
        assert len(found) == len(expected) and all(x is y for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_inference_is_one_operator(drop_path):
    """And only where no gradient is wanted and nothing depends on the batch."""
    require("cpp")
    _, fast = pair(drop_path=drop_path, training=False)
    stages, x = ["mixer_stage", "feed_forward_stage"], image()
    for grad, training, expected in (
        (False, False, ["transformer_blocks"]),
        (True, False, stages),
        (False, True, stages),
        (True, True, stages),
    ):
        fast.train(training)
        with torch.set_grad_enabled(grad):
            assert operators(lambda: fast(x)) == expected


def test_parametrized_weights_are_used():
    block, fast = pair()
    for b in (block, fast):
        torch.manual_seed(2)
        nn.utils.parametrizations.weight_norm(b.attn.gatedcnn.gic2)
        nn.utils.parametrizations.orthogonal(b.ffn.project_in)
    assert runs_stages(fast) == (False, False)
    assert_alike(block, fast, image(), rtol=1e-8)
    assert_infers_alike(block, fast, image(), rtol=1e-8)


def test_subclasses_are_called():
    class Doubled(mirage.fast.Attention):
        def forward(self, x):
            return 2 * super().forward(x)

    _, fast = pair(training=False)
    expected = fast(image())
    fast.attn.__class__ = Doubled
    assert runs_stages(fast) == (False, True)
    assert not torch.allclose(fast(image()), expected)
