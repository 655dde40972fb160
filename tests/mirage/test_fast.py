"""mirage.fast: golden parity of accelerated models, swapping in place, and models of other classes."""

import copy
import io
import re

import pytest
import torch
from harness import operators
from lookalike import ReleasedStyleMIRAGE
from torch import nn

import mirage
import mirage.fast
import mirage_kernels
from mirage import blocks

SMALL = {"dim": 24, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1}


@pytest.fixture
def model() -> mirage.MIRAGE:
    torch.manual_seed(0)
    model = mirage.mirage_tiny(**SMALL)
    with torch.no_grad():  # every parameter and statistic off its initial value
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(0.05 * torch.rand_like(tensor))
    return model.eval()


def image(size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def forward_and_gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # the same stochastic depth
    restored, embeddings = model(x, return_spd=True)
    (restored.square().mean() + (embeddings[0] * embeddings[1]).sum()).backward()
    return restored.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_everything_is_replaced(model):
    summary = mirage.fast.summary(mirage.fast.accelerate(model))
    counts = {name: list(summary.replaced.values()).count(name) for name in set(summary.replaced.values())}
    blocks_of_model = 8
    assert counts == {
        "LayerNorm": 2 * blocks_of_model,
        "Attention": blocks_of_model,
        "GatedCNNBlock": blocks_of_model,
        "FeedForward": blocks_of_model,
        "SPDCovariance": 1,
        "TransformerBlock": blocks_of_model,
        "BlockSequence": 8,
        "Conv2d": 13,
        "PixelShuffle": 3,
        "PixelUnshuffle": 3,
        "MIRAGE": 1,
    }
    assert not summary.kept
    assert "77 modules run on mirage_kernels" in str(summary)


def test_convolutions_outside_blocks_only(model):
    """Those of a block are part of its stages, also where one of its halves was left alone."""
    model.encoder_level1[0].ffn.act = nn.ReLU()
    mirage.fast.accelerate(model)
    fast = {path for path, module in model.named_modules() if isinstance(module, mirage.fast.Conv2d)}
    some = {"patch_embed.proj", "down1_2.body.0", "up2_1.body.0", "reduce_chan_level2", "output", "reduce_shallow"}
    assert some <= fast
    assert not any("level1.0" in path for path in fast)
    mirage.fast.revert(model)
    assert not any(isinstance(module, mirage.fast.Conv2d) for module in model.modules())


def test_a_network_of_convolutions_is_left_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 3, 1, bias=False))
    with pytest.warns(UserWarning, match="nothing in Sequential was recognised"):
        mirage.fast.accelerate(network)
    assert all(type(conv) is nn.Conv2d for conv in network)


def test_a_convolution_follows_its_settings(model):
    """What is changed after `accelerate` is what runs; hooks run, and unbatched images are taken as before."""
    conv = mirage.fast.accelerate(model).patch_embed.proj
    x = image()
    torch.testing.assert_close(conv(x[0]), nn.functional.conv2d(x[0], conv.weight, padding=1))
    conv.padding_mode = "circular"
    reference = copy.deepcopy(conv)
    reference.__class__ = nn.Conv2d
    torch.testing.assert_close(conv(x), reference(x))
    handle = conv.register_forward_hook(lambda module, args, output: output * 0)
    assert not conv(x).any()
    handle.remove()


def test_summary_before_accelerating_says_so(model):
    summary = mirage.fast.summary(model)
    assert not summary.replaced
    assert set(summary.kept.values()) == {"accelerate was not called"}


def test_the_same_objects_and_state_dict(model):
    parameters = {name: id(p) for name, p in model.named_parameters()}
    modules = {name: id(m) for name, m in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert mirage.fast.accelerate(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(m) for name, m in model.named_modules()} == modules
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.load_state_dict(before, strict=True)


def test_nothing_class_wide_changes(model):
    other = mirage.mirage_tiny(**SMALL)
    forward = blocks.FeedForward.forward
    mirage.fast.accelerate(model)
    assert blocks.FeedForward.forward is forward
    assert mirage.fast.summary(other).replaced == {}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_matches_the_reference(model, mode):
    """Float64, so that what differs is a mistake and not rounding; stochastic depth from the same seed."""
    model.double().train(mode == "train")
    x = image().double()
    reference = copy.deepcopy(model)
    expected, expected_grads = forward_and_gradients(reference, x)
    mirage.fast.accelerate(model)
    value, grads = forward_and_gradients(model, x)
    assert mirage_kernels.last_used("mixer_stage") in ("cpp", "composite")
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for name, grad in expected_grads.items():
        # reduce_*.bias has a gradient of exactly 0, of which rounding leaves something
        scale = max(grad.norm().item(), 1e-9)
        assert (grads[name] - grad).norm().item() / scale < 1e-6, name
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)


def test_revert_is_exact(model):
    x = image()
    classes = {name: type(m) for name, m in model.named_modules()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        before = model(x)
        mirage.fast.accelerate(mirage.fast.accelerate(model))  # twice does no more than once
        model(x)
        assert mirage.fast.revert(model) is model
        assert torch.equal(model(x), before)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_hooks_fire_also_on_bypassed_modules(model):
    mirage.fast.accelerate(model)
    block = model.encoder_level1[0]
    called = []
    bypassed = [block.ffn.dwconv, block.ffn.act, block.attn.qkv_dwconv, block.norm1.body, block.ffn]
    x = image()
    with torch.no_grad():
        plain = model(x)
        for index, module in enumerate(bypassed):
            module.register_forward_hook(lambda *_, index=index: called.append(index))
        hooked = model(x)
    assert sorted(called) == list(range(len(bypassed)))
    torch.testing.assert_close(hooked, plain, rtol=1e-4, atol=1e-5)


def test_hooks_registered_before_survive(model):
    called = []
    model.latent[0].ffn.register_forward_hook(lambda *_: called.append(1))
    mirage.fast.accelerate(model)
    assert not called, "recognising a module must not run its hooks"
    with torch.no_grad():
        model(image())
    assert called == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_moves(model, dtype):
    mirage.fast.accelerate(model).to(dtype)
    with torch.no_grad():
        assert model(image().to(dtype)).dtype == dtype


def test_autocast_gives_the_reference_dtype_and_accuracy(model):
    x = image()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            peer = model(x)
            value = mirage.fast.accelerate(model)(x)
    assert value.dtype == peer.dtype
    assert (value.double() - exact).norm() <= 1.1 * (peer.double() - exact).norm()


def test_copies_and_pickles(model):
    mirage.fast.accelerate(model)
    x = image()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), loaded):
            assert torch.equal(other(x), expected)
            assert type(mirage.fast.revert(other).latent[0].ffn) is blocks.FeedForward
    assert type(model.latent[0].ffn) is mirage.fast.FeedForward


@pytest.mark.parametrize("name", ["Attention", "FeedForward", "GatedCNNBlock", "LayerNorm", "TransformerBlock"])
def test_modules_stand_alone(name):
    arguments = {"Attention": (24, 2), "FeedForward": (24,), "GatedCNNBlock": (8,), "LayerNorm": (24,)}
    arguments["TransformerBlock"] = (24, 2)
    torch.manual_seed(0)
    reference = getattr(blocks, name)(*arguments[name]).eval()
    fast = getattr(mirage.fast, name)(*arguments[name]).eval()
    assert list(fast.state_dict()) == list(reference.state_dict())
    fast.load_state_dict(reference.state_dict())
    x = torch.randn(2, arguments[name][0], 9, 11)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), reference(x), rtol=1e-4, atol=1e-5)


def test_what_is_built_fast_stays_fast():
    block = mirage.fast.TransformerBlock(24, 2)
    mirage.fast.revert(block)
    assert not mirage.fast.summary(block).kept
    assert type(block.ffn) is mirage.fast.FeedForward and type(block.attn.gatedcnn) is mirage.fast.GatedCNNBlock


def test_blocks_run_stages(model):
    """With autograd each half of a block is one operator, without both are."""
    mirage.fast.accelerate(model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            seen = operators(lambda: model(image()))
        expected = ["mixer_stage", "feed_forward_stage"] * 8 if grad else ["transformer_blocks"] * 8
        assert [name for name in seen if name != "dense_conv2d"] == expected
        assert seen.count("dense_conv2d") == 11


def test_builders():
    tiny = mirage.fast.mirage_tiny(**SMALL)
    assert isinstance(tiny, mirage.MIRAGE)
    assert mirage.fast.summary(tiny).replaced
    assert list(tiny.state_dict()) == list(mirage.mirage_tiny(**SMALL).state_dict())


def test_compiles_in_one_graph(model):
    mirage.fast.accelerate(model)
    x = image(size=16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, expected_grads = forward_and_gradients(model, x)
    value, grads = forward_and_gradients(compiled, x)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[f"_orig_mod.{name}"], grad, rtol=1e-3, atol=1e-6)


# ---- models of other classes ---------------------------------------------------------------------------------------


@pytest.fixture
def lookalike() -> ReleasedStyleMIRAGE:
    torch.manual_seed(0)
    return ReleasedStyleMIRAGE().eval()


def test_a_lookalike_is_accelerated(lookalike):
    """Same attribute names, other class objects, and a forward that returns (restored, loss)."""
    x = image(size=16)
    with torch.no_grad():
        expected, expected_loss = lookalike(x)
        mirage.fast.accelerate(lookalike)
        value, loss = lookalike(x)
    summary = mirage.fast.summary(lookalike)
    assert sorted(set(summary.replaced.values())) == [
        "Attention",
        "BlockSequence",
        "Conv2d",
        "FeedForward",
        "GatedCNNBlock",
        "LayerNorm",
        "PixelShuffle",
        "PixelUnshuffle",
        "TransformerBlock",
    ]
    assert not summary.kept
    assert type(lookalike) is ReleasedStyleMIRAGE
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(mirage.fast.revert(lookalike)(x)[0], expected)


def test_a_lookalike_trains_alike(lookalike):
    reference = copy.deepcopy(lookalike).double().train()
    fast = mirage.fast.accelerate(lookalike).double().train()
    x = image(size=16).double()
    results = []
    for model in (reference, fast):
        torch.manual_seed(7)
        restored, loss = model(x)
        (restored.abs().mean() + loss).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        assert (results[1][name] - grad).norm() <= 1e-7 * max(grad.norm().item(), 1e-3), name


def test_what_computes_something_else_is_left_alone(lookalike):
    class Doubled(type(lookalike.encoder[0].ffn)):
        def forward(self, x):
            return 2 * super().forward(x)

    lookalike.encoder[0].ffn.__class__ = Doubled
    summary = mirage.fast.summary(mirage.fast.accelerate(lookalike))
    assert list(summary.kept) == ["encoder.0.ffn"]
    assert "computes something else than FeedForward" in summary.kept["encoder.0.ffn"]


def test_a_subclass_of_the_reference_has_to_compute_the_same():
    class Doubled(blocks.FeedForward):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(blocks.FeedForward):
        pass

    with pytest.warns(UserWarning, match="nothing in Doubled was recognised"):
        assert type(mirage.fast.accelerate(Doubled(24))) is Doubled
    assert type(mirage.fast.accelerate(Renamed(24))) is mirage.fast.FeedForward


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        (lambda b: setattr(b.ffn, "act", nn.ReLU()), "ffn", "act is ReLU, not GELU"),
        (lambda b: setattr(b.ffn, "act", nn.GELU("tanh")), "ffn", "approximate GELU"),
        (lambda b: setattr(b.ffn, "dwconv", nn.Conv2d(96, 96, 3, padding=1, groups=96)), "ffn", "dwconv has a bias"),
        (
            lambda b: setattr(b.ffn, "dwconv", nn.Conv2d(96, 96, 5, padding=2, groups=96, bias=False)),
            "ffn",
            r"dwconv has kernel_size \(5, 5\), not \(3, 3\)",
        ),
        (lambda b: setattr(b.norm1.body, "bias", None), "norm1", "bias-free layer norm"),
        (lambda b: setattr(b.attn.gatedcnn, "norm", nn.Identity()), "attn.gatedcnn", "norm is Identity"),
        (lambda b: setattr(b.attn, "alpha_att", nn.Parameter(torch.ones(8))), "attn", "alpha_att is"),
        (lambda b: setattr(b.ffn, "forward", lambda x: x), "ffn", "replaced on the instance"),
    ],
)
def test_reasons(change, path, reason):
    block = blocks.TransformerBlock(24, 1)
    change(block)
    summary = mirage.fast.summary(mirage.fast.accelerate(block))
    assert list(summary.kept) == [path]
    assert re.search(reason, summary.kept[path]), summary.kept[path]


CALLED = {
    "hook": (lambda b: b.attn.qkv.register_forward_hook(lambda *_: None), "mixer_stage: attn.qkv has hooks"),
    "forward": (lambda b: setattr(b.norm2.body, "forward", lambda x: x), "norm2.body has a forward of its own"),
    "class": (lambda b: setattr(b.ffn, "act", nn.ReLU()), "feed_forward_stage: ffn.act is ReLU, not GELU"),
    "subclass": (lambda b: setattr(b, "norm1", blocks.LayerNorm(24)), "norm1 is LayerNorm, not mirage.fast.LayerNorm"),
    "setting": (
        lambda b: setattr(b.ffn, "dwconv", nn.Conv2d(96, 96, 3, padding=1, groups=48, bias=False)),
        "feed_forward_stage: ffn.dwconv has groups 48 and out_channels 96, which should be equal",
    ),
    "bias": (lambda b: setattr(b.ffn.project_in, "bias", nn.Parameter(torch.zeros(96))), "ffn.project_in has a bias"),
    "statistics": (lambda b: setattr(b.attn.gatedcnn.norm, "momentum", None), "attn.gatedcnn.norm has no momentum"),
    "drop path": (lambda b: setattr(b.attn.gatedcnn, "drop_path", nn.Dropout()), "Dropout, not Identity or DropPath"),
    "sequence": (lambda b: b.attn.mlp.append(nn.Identity()), "attn.mlp has 4 modules, not 3"),
    "parametrization": (lambda b: nn.utils.parametrizations.weight_norm(b.attn.qkv), "attn.qkv is ParametrizedConv2d"),
}


@pytest.mark.parametrize("change", CALLED)
def test_the_summary_says_which_modules_are_called(change):
    """As the next forward finds it; both ask the same."""
    block = mirage.fast.accelerate(blocks.TransformerBlock(24, 1)).eval()
    assert not mirage.fast.summary(block).called
    alter, reason = CALLED[change]
    alter(block)
    summary = mirage.fast.summary(block)
    assert list(summary.called) == [""] and reason in summary.called[""]
    assert "1 blocks call some of their modules one by one" in str(summary)
    if mirage_kernels.available()["cpp"] == "yes":
        with torch.no_grad():
            seen = operators(lambda: block(torch.rand(1, 24, 8, 8)))
        assert "transformer_blocks" not in seen and ("mixer_stage" in seen) == ("mixer_stage" not in summary.called[""])


def test_nothing_to_accelerate():
    with pytest.warns(UserWarning, match="nothing in Sequential was recognised"):
        mirage.fast.accelerate(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        mirage.fast.accelerate("model")
