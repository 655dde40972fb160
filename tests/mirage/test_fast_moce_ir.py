"""The blocks of MoCE-IR on `mirage.fast`: of its encoder, which are Restormer's by other names, and of its decoder."""

import copy

import pytest
import torch
from harness import operators
from lookalike_restormer import (
    Adapter,
    Attention,
    CrossAttention,
    Expert,
    FourierAttention,
    ListedBlock,
    ListedDecoderBlock,
    Sequence,
)
from torch import nn

import mirage.fast
from mirage.fast import experts, strips


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
                patch.setattr(strips, "LARGE_FROM", 1)
                patch.setattr(strips, "are_wanted", lambda x: False)  # as on GPUs
                many = operators(lambda fast=fast, inputs=inputs: fast(*inputs)).count("dynamic_depthwise_conv2d")
                assert many == few + parts - 1
                torch.testing.assert_close(fast(*inputs), expected, rtol=1e-10, atol=1e-11)
                conv = fast.qkv_dwconv if parts == 3 else fast.kv_dwconv
                calls = []
                conv.register_forward_hook(lambda module, args, output, calls=calls: calls.append(output.shape[1]))
                torch.testing.assert_close(fast(*inputs), expected, rtol=1e-10, atol=1e-11)
                assert calls == [12 * parts]


def in_strips(patch, rows, x):
    """Maps like x are large, and strips have so many lines."""
    patch.setattr(strips, "LARGE_FROM", 1)
    patch.setattr(strips, "STRIP_BYTES", rows * x[:, :, :1].nbytes)


def heard(module):
    """Counts the module's calls."""
    calls = []
    module.register_forward_hook(lambda module, args, output: calls.append(1))
    return calls


@pytest.mark.parametrize("rows", [1, 3, 9, 20])
@pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "biases"])
def test_attentions_in_strips(bias, rows, monkeypatch):
    torch.manual_seed(0)
    attention, cross = Attention(12), CrossAttention(12, 7, bias)
    if not bias:
        attention.qkv = nn.Conv2d(12, 36, 1, bias=False)
        attention.qkv_dwconv.bias = attention.project_out.bias = None
    attention, cross = attention.double(), cross.double()
    maps = [torch.randn(2, 12, 9, 7, dtype=torch.float64) for _ in range(2)]
    for module, inputs in ((attention, maps[:1]), (cross, maps)):
        fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(module)))[0]
        with torch.no_grad(), monkeypatch.context() as patch:
            expected = module(*inputs)
            in_strips(patch, rows, maps[0])
            assert "channel_attention" not in operators(lambda fast=fast, inputs=inputs: fast(*inputs))
            torch.testing.assert_close(fast(*inputs), expected, rtol=1e-10, atol=1e-11)
            turned = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
            torch.testing.assert_close(fast(*turned), expected, rtol=1e-10, atol=1e-11)
            empty = [x * 0 for x in inputs]  # norms of zero, where there is no bias
            torch.testing.assert_close(fast(*empty), module(*empty), rtol=1e-10, atol=1e-11)
            for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
                value = copy.deepcopy(fast).to(dtype)(*[x.to(dtype) for x in inputs])
                assert value.dtype == dtype and (value - expected).norm() < bound * expected.norm()
            heard(fast.project_out)
            assert "channel_attention" in operators(lambda fast=fast, inputs=inputs: fast(*inputs))


def decoder(rows, top_k, monkeypatch):
    """A block whose draws decide on its experts, its fast counterpart, which runs in strips, and what they are called
    with."""
    torch.manual_seed(0)
    block = ListedDecoderBlock(12).double().eval()
    block.adapter.routing.k = block.adapter.top_k = top_k
    nn.init.zeros_(block.adapter.routing.freq_gate.weight)
    fast = mirage.fast.accelerate(copy.deepcopy(block))
    x, freq_emb = torch.randn(1, 12, 37, 19, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    in_strips(monkeypatch, rows, x)
    return block, fast, x, freq_emb


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_decoder_in_strips(rows, top_k, monkeypatch):
    """With the same draws and the loss that is left behind; squares of the experts are not cut."""
    block, fast, x, freq_emb = decoder(rows, top_k, monkeypatch)
    chosen = set()
    for seed in range(8):
        with torch.no_grad():
            torch.manual_seed(seed)
            expected, loss = block(x, freq_emb)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            given = x.clone()
            value, of_fast = fast(given, freq_emb)
            assert torch.equal(given, x) and torch.equal(state, torch.get_rng_state())
            torch.manual_seed(seed)
            chosen.add(tuple(fast.adapter.routing(x, freq_emb)[1][0].tolist()))
        assert loss == of_fast == fast.adapter.loss == 0
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)  # Fourier transforms in float32
    assert len(chosen) > 1, "several experts"
    with torch.no_grad():
        assert operators(lambda: fast(x, freq_emb))[-1] == "feed_forward_stage"
        assert "channel_attention" not in operators(lambda: fast(x, freq_emb))


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("top_k", [1, 2])
def test_modules_of_the_decoder_that_are_heard_are_called_once(rows, top_k, monkeypatch):
    """As a whole, with the same result; experts where they are chosen."""
    block, fast, x, freq_emb = decoder(rows, top_k, monkeypatch)
    with torch.no_grad():
        torch.manual_seed(7)
        value, calls = block(x, freq_emb)[0], {}
        for path, module in fast.named_modules():
            if path.startswith(("norms.0", "proj.", "shared", "mixer", "adapter.")) and not isinstance(
                module, nn.ModuleList
            ):
                seen = copy.deepcopy(fast)
                calls[path] = heard(seen.get_submodule(path))
                torch.manual_seed(7)
                torch.testing.assert_close(seen(x, freq_emb)[0], value, rtol=1e-4, atol=1e-5)
        run = {f"adapter.experts.{i}" for i in seen.adapter.routing.chosen}
        for path, count in calls.items():
            expert = ".".join(path.split(".")[:3]) if path.startswith("adapter.experts.") else None
            assert len(count) == (expert is None or expert in run), path


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_adapter_in_strips(rows, top_k, monkeypatch):
    """By itself: of what it returns a block's cross-attention takes the queries alone, whatever their size."""
    torch.manual_seed(0)
    adapter = Adapter(12, top_k=top_k).double().eval()
    fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(adapter)))[0]
    x, shared = (torch.randn(1, 12, 37, 19, dtype=torch.float64) for _ in range(2))
    freq_emb = torch.randn(1, 6, dtype=torch.float64)
    in_strips(monkeypatch, rows, x)
    with torch.no_grad():
        for seed in range(6):
            torch.manual_seed(seed)
            expected = adapter(x, freq_emb, shared)
            torch.manual_seed(seed)
            value = experts._adapt(fast, strips.Strips.of(x), freq_emb, shared)
            assert (value - expected).norm() < 1e-6 * expected.norm()  # Fourier transforms in float32


def test_a_sequence_with_a_forward_of_its_own_is_called(monkeypatch):
    """Also if another expert was drawn when the adapter was compared with its class."""

    class Doubled(Sequence):
        def forward(self, x, shared):
            return 2 * super().forward(x, shared)

    torch.manual_seed(0)
    adapter = Adapter(12).double().eval()
    nn.init.zeros_(adapter.routing.freq_gate.weight)  # the draws decide
    for i in (1, 2):
        adapter.experts[i] = Doubled(*adapter.experts[i])
    fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(adapter)))[0]
    block = mirage.fast.accelerate(ListedDecoderBlock(12).double().eval())
    block.adapter = fast
    x, shared = (torch.randn(1, 12, 9, 9, dtype=torch.float64) for _ in range(2))
    freq_emb = torch.randn(1, 6, dtype=torch.float64)
    in_strips(monkeypatch, 4, x)
    with torch.no_grad():
        for seed in range(8):
            torch.manual_seed(seed)
            expected = adapter(x, freq_emb, shared)
            torch.manual_seed(seed)
            torch.testing.assert_close(fast(x, freq_emb, shared), expected, rtol=1e-4, atol=1e-5)
        assert experts.decode_in_strips(block, x, freq_emb) is None


def test_what_does_not_fit_is_told_as_of_small_maps(monkeypatch):
    """A convolution to other channels, other dtypes, a temperature of other heads: children may be replaced."""
    torch.manual_seed(0)
    changes = {
        "fewer channels": lambda m: setattr(m, "project_out", nn.Conv2d(12, 1, 1)),
        "more channels": lambda m: setattr(m, "project_out", nn.Conv2d(12, 15, 1)),
        "dtype": lambda m: m.project_out.double(),
        "heads": lambda m: setattr(m, "temperature", nn.Parameter(torch.ones(5, 1, 1))),
        "shape": lambda m: setattr(m, "temperature", nn.Parameter(torch.ones(2, 1))),
        "vector": lambda m: setattr(m, "temperature", nn.Parameter(torch.ones(2))),
    }
    x = torch.randn(2, 12, 9, 7)

    def outcome(module, *inputs):
        try:
            return module(*inputs)
        except Exception as raised:
            return repr(raised)

    for build, inputs in ((Attention, (x,)), (lambda dim: CrossAttention(dim, 7), (x, x.flip(0)))):
        for name, change in changes.items():
            fast = mirage.fast.accelerate(nn.Sequential(build(12)))[0]
            change(fast)
            with torch.no_grad():
                expected = outcome(fast, *inputs)
                with monkeypatch.context() as patch:
                    in_strips(patch, 4, x)
                    value = outcome(fast, *inputs)
            if isinstance(expected, str):
                assert value == expected, name
            else:
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "gradients"])
def test_compiled_for_any_size(grad, monkeypatch):
    """Whether a map is large cannot be asked of sizes that may be any."""
    torch.manual_seed(0)
    for module in (Attention(12), FourierAttention(12, 4), nn.Conv2d(12, 24, 2, 2, bias=False)):
        network = nn.Sequential(ListedBlock(12), module).eval()
        fast = mirage.fast.accelerate(copy.deepcopy(network))
        compiled = torch.compile(fast, backend="aot_eager", dynamic=True)
        monkeypatch.setattr(strips, "LARGE_FROM", 1)
        with torch.set_grad_enabled(grad):
            for size in ((8, 12), (12, 16)):
                x = torch.randn(1, 12, *size)
                torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_what_does_not_run_in_strips(monkeypatch):
    """More than one image, a gradient, training, autocast, a trace: the steps are those of any size."""
    torch.manual_seed(0)
    fast = mirage.fast.accelerate(ListedDecoderBlock(12).eval())
    x, freq_emb = torch.randn(1, 12, 20, 9), torch.randn(1, 6)
    in_strips(monkeypatch, 4, x)

    def attends(*inputs):
        return "channel_attention" in operators(lambda: fast(*inputs))

    with torch.no_grad():
        assert not attends(x, freq_emb)
        assert not attends(x.repeat(2, 1, 1, 1), freq_emb.repeat(2, 1)), "its attentions do"
        with torch.autocast("cpu", torch.bfloat16):
            assert attends(x, freq_emb)
        traced = torch.jit.trace(fast.shared, x)
        other = torch.randn(1, 12, 11, 13)
        torch.testing.assert_close(traced(other), fast.shared(other), rtol=1e-5, atol=1e-6)
        fast.train()
        assert not attends(x, freq_emb), "its attentions do"
        fast.eval()
    assert attends(x, freq_emb)


def test_an_expert():
    """Of no image at all, as a batch leaves it that chose others, it returns that."""
    torch.manual_seed(0)
    expert = Expert(12, 6, 4).double()
    fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(expert)))[0]
    assert type(fast) is mirage.fast.Expert
    x, shared = (torch.randn(2, 12, 9, 7, dtype=torch.float64) for _ in range(2))
    results = [
        [y := module(x, shared), *torch.autograd.grad(y.square().sum(), list(module.parameters()))]
        for module in (expert, fast)
    ]
    for value, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert fast(x[:0], shared[:0]).shape == (0, 12, 9, 7)
