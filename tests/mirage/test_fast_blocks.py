"""mirage.fast.TransformerBlock: two stages with an autograd policy, and when it goes back to calling its modules."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from harness import forced, operators, require
from torch import nn
from torch.utils.checkpoint import checkpoint

import mirage
import mirage.fast
import mirage_kernels
from mirage import blocks
from mirage.complexity import MemoryTracker
from mirage.fast.block import BLOCKS
from mirage.fast.mixer import branch_scale
from mirage.fast.recognise.mirage_block import STAGES
from mirage.fast.recognise.pattern import Pattern
from mirage_kernels._runtime import dispatch

IMPLEMENTATIONS = ("cpp", "composite")


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    require(request.param)
    with forced(request.param):
        yield request.param


def pair(dim=12, heads=2, drop_path=0.0, dtype=torch.float64, training=True):
    """A reference block with every parameter and statistic off its initial value, and its accelerated copy."""
    torch.manual_seed(0)
    block = blocks.TransformerBlock(dim, heads, drop_path=drop_path)
    with torch.no_grad():
        for tensor in [*block.parameters(), *(b for b in block.buffers() if b.is_floating_point())]:
            tensor.add_(0.2 * torch.rand_like(tensor))
    block = block.to(dtype).train(training)
    return block, mirage.fast.accelerate(copy.deepcopy(block))


def image(batch=2, dim=12, height=6, width=7, dtype=torch.float64):
    return torch.randn(batch, dim, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(block, x, seed=3):
    """Output, gradient of the input and gradients of the parameters; the random state is what the step leaves."""
    block.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = block(x)
    generator = torch.Generator().manual_seed(9)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]


def assert_alike(block, fast, x, rtol=1e-9):
    for value, expected in zip(step(fast, x), step(block, x), strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            assert value.dtype == expected.dtype
            assert (value - expected).norm() <= rtol * max(expected.norm().item(), 1e-3)
    for (name, value), expected in zip(fast.named_buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol, msg=name)


def runs_stages(block):
    """Which halves run as operators, asked in Python; the C++ library has to give the same answers."""
    asked = tuple(not stage.problem(block) for stage in STAGES)
    assert tuple(stage.match(block) is not None for stage in STAGES) == asked
    steady = not any(m.training for m in (block.attn.gatedcnn.norm, block.attn.gatedcnn.drop_path))
    assert (BLOCKS.match(block) is not None) == (all(asked) and steady)
    return asked


def assert_infers_alike(block, fast, x, rtol=1e-9):
    """In eval mode, where a block may run as one operator."""
    with torch.no_grad():
        value, expected = fast.eval()(x), block.eval()(x)
    assert (value - expected).norm() <= rtol * expected.norm()


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_a_block(impl, training):
    """Batch statistics and a fixed draw of stochastic depth in training; running statistics in eval mode."""
    _, block = pair(dim=6, drop_path=0.5, training=training)
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in block.named_parameters()), strict=True)
    buffers = dict(block.named_buffers())
    torch.manual_seed(5)
    seed = next(s for s in range(99) if len(set(drawn(s, 2))) == 2)  # keeps one sample, drops the other

    def function(x, *parameters):
        torch.manual_seed(seed)
        tensors = {**dict(zip(names, parameters, strict=True)), **{n: b.clone() for n, b in buffers.items()}}
        return torch.func.functional_call(block, tensors, (x,))

    x = image(dim=6, height=3, width=4).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)
    assert mirage_kernels.last_used("mixer_stage") == impl and mirage_kernels.last_used("feed_forward_stage") == impl


def drawn(seed, batch):
    torch.manual_seed(seed)
    return torch.empty(batch, 1, 1, 1, dtype=torch.float64).bernoulli_(0.5).view(-1).tolist()


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("training", [False, True])
def test_a_step_is_that_of_the_reference(impl, training, drop_path):
    """Results, gradients, running statistics and the state of the random generator."""
    block, fast = pair(drop_path=drop_path, training=training)
    x = image(batch=5)
    for _ in range(3):
        assert_alike(block, fast, x)
    step(block, x)
    state = torch.get_rng_state()
    assert (drop_path > 0 and training) == (not torch.equal(state, torch.manual_seed(3).get_state()))
    step(fast, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert runs_stages(fast) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_depth_draws_the_same_samples(dtype):
    """Also in single and half precision, and under autocast, where the branch has another dtype than the block."""
    for autocast in (False, True):
        states = []
        for block in pair(drop_path=0.4, dtype=dtype):
            torch.manual_seed(11)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                block(image(batch=7, dtype=dtype))
            states.append(torch.get_rng_state())
        assert torch.equal(*states)


def test_stochastic_depth_on_devices_without_autocast():
    """Whose names PyTorch's questions about autocast do not know; the meta device is one."""
    draw, x = blocks.DropPath(0.4), image(batch=7, dtype=torch.float16).to("meta")
    scale = branch_scale(draw, x)
    assert scale.shape == (7,) and scale.device.type == "meta" and scale.dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert branch_scale(draw, x).dtype == torch.float16, "autocast of another device"
        assert branch_scale(draw, image(dtype=torch.float32)).dtype == torch.bfloat16
        assert branch_scale(draw, image()).dtype == torch.float64


def test_the_drop_path_of_timm(impl):
    class DropPath(nn.Module):
        def __init__(self, drop_prob):
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x):
            if self.drop_prob == 0.0 or not self.training:
                return x
            mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
            return x * mask.div_(1 - self.drop_prob)

    block, fast = pair()
    for b in (block, fast):
        b.attn.gatedcnn.drop_path = DropPath(0.4)
    assert runs_stages(fast) == (True, True)
    assert_alike(block, fast, image(batch=5))


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_low_precision_statistics(momentum):
    """Running statistics of a bfloat16 model are rounded once, as PyTorch's batch norm does."""
    block, fast = pair(dtype=torch.bfloat16)
    for b in (block, fast):
        b.attn.gatedcnn.norm.momentum = momentum
        b(image(dtype=torch.bfloat16))
    for value, expected in zip(fast.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=2**-7, atol=1e-3)


# ---- what is kept --------------------------------------------------------------------------------------------------


def remember(storages, tensor):
    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


@pytest.mark.parametrize(("memory", "dim", "maps"), [("low", 24, 2), ("fast", 24, 2), ("low", 96, 2), ("fast", 96, 6)])
def test_a_block_keeps_two_maps(impl, memory, dim, maps):
    """Its input and the tensor between its halves; with "fast" also the four times as wide hidden tensor, where there
    are many channels. What else is kept does not grow with the image."""
    _, block = pair(dim=dim, dtype=torch.float32)
    mirage.fast.accelerate(block, memory=memory)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    small = []
    for side in (16, 32):
        storages = {}
        x = image(dim=dim, height=side, width=side, dtype=torch.float32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, storages), lambda t: t):
            y = block(x)
        assert y.untyped_storage().data_ptr() not in storages
        kept = sum(size for storage, size in storages.items() if storage not in parameters)
        small.append(kept - maps * x.untyped_storage().nbytes())
    assert small[0] == small[1] < 1000 * dim


def test_the_tracker_sees_two_maps(impl):
    """mirage.complexity counts what is alive after a forward of two blocks: four maps and the result."""
    model = nn.Sequential(pair(dim=24, dtype=torch.float32)[1], pair(dim=24, dtype=torch.float32)[1])
    x = image(dim=24, height=48, width=48, dtype=torch.float32).requires_grad_()
    tracker = MemoryTracker()
    tracker.add([x, *model.parameters(), *model.buffers()])
    before, size = tracker.current, x.numel() * 4
    with tracker:
        y = model(x)
    assert 4 * size <= tracker.current - before < 4.2 * size  # x is in `before`
    assert y.shape == x.shape


# ---- around a block ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(impl, reentrant):
    """The same gradients, with the draw of stochastic depth repeated; statistics move twice, as those of eager do."""
    block, fast = pair(drop_path=0.4)
    x = image(batch=4)

    def checkpointed(module):
        def run(x):
            return checkpoint(module, x, use_reentrant=reentrant)

        run.zero_grad, run.parameters = module.zero_grad, module.parameters
        return run

    expected = step(checkpointed(block), x)
    for value, peer in zip(step(checkpointed(fast), x), expected, strict=True):
        torch.testing.assert_close(value, peer, rtol=1e-9, atol=1e-9)
    for value, peer in zip(fast.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(value, peer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_in_one_graph(impl, training):
    _, fast = pair(training=training, dtype=torch.float32)
    eager = copy.deepcopy(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = image(dtype=torch.float32)
    for value, expected in zip(step(compiled, x), step(eager, x), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for value, expected in zip(fast.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b.ffn, "act", nn.ReLU()),
        lambda b: setattr(b.attn.gatedcnn, "norm", nn.BatchNorm2d(4, affine=False)),
        lambda b: setattr(b.attn.gatedcnn, "drop_path", nn.Dropout(0.3)),
        lambda b: nn.utils.parametrizations.weight_norm(b.ffn.project_in),
    ],
    ids=["class", "setting", "drop path", "parametrization"],
)
def test_called_modules_compile_in_one_graph(change):
    """The questions that a compiler traces, with their reasons."""
    _, fast = pair(training=False, dtype=torch.float32)
    change(fast)
    assert runs_stages(fast.eval()) != (True, True)
    x = image(dtype=torch.float32)
    for grad in (False, True):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), fast(x), rtol=1e-5, atol=1e-6)


def test_compiled_stochastic_depth():
    _, fast = pair(drop_path=0.4, dtype=torch.float32)
    torch._dynamo.reset()
    y = torch.compile(fast, fullgraph=True, backend="aot_eager")(image(dtype=torch.float32))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())


def test_distributed_data_parallel(tmp_path):
    """One process: gradients pass through its reducer, buffers through its broadcast."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch.distributed is not available")
    block, fast = pair()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fast)
        x = image()
        for value, expected in zip(step(wrapped, x), step(block, x), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    finally:
        distributed.destroy_process_group()


def test_autocast_trains_in_its_dtype(impl):
    """The residual stream in bfloat16, float32 weights with float32 gradients as near to the truth as eager's."""
    block, fast = pair(dtype=torch.float32)
    x = image(dtype=torch.bfloat16)
    truth = step(copy.deepcopy(block).double(), x.double())
    errors = []
    for module in (block, fast):
        with torch.autocast("cpu", torch.bfloat16):
            results = step(module, x)
        assert results[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in results[2:])
        errors.append([((v.double() - t).norm() / t.norm()).item() for v, t in zip(results, truth, strict=True)])
    assert sum(errors[1]) <= sum(errors[0])
    for value, expected in zip(fast.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)


def test_frozen_parameters(impl):
    """Some weights, all weights but not the input, and everything."""
    block, fast = pair()
    x = image()
    for frozen in (lambda n: "attn" in n, lambda n: n.endswith("weight"), lambda n: True):
        for b in (block, fast):
            for name, parameter in b.named_parameters():
                parameter.requires_grad_(not frozen(name))
        assert_alike(block, fast, x)
    assert not fast(x).requires_grad


def test_frozen_batch_norm(impl):
    """A batch norm in eval mode inside a model in training: its own flag rules, and its statistics stay."""
    block, fast = pair(drop_path=0.4)
    for b in (block, fast):
        b.attn.gatedcnn.norm.eval()
    before = [b.clone() for b in fast.buffers()]
    assert_alike(block, fast, image(batch=5))
    assert all(torch.equal(a, b) for a, b in zip(fast.buffers(), before, strict=True))
    for b in (block, fast):  # and the reverse
        b.eval()
        b.attn.gatedcnn.norm.train()
    assert_alike(block, fast, image(batch=5))


def test_one_value_per_channel_raises_as_eager_does():
    for block in pair():
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            block(image(batch=1, height=1, width=1))


def test_an_empty_batch():
    for training in (False, True):
        block, fast = pair(training=training)
        values = [b(image(batch=0)) for b in (block, fast)]
        assert values[0].shape == values[1].shape


# ---- where the modules are called again ----------------------------------------------------------------------------


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


# ---- blocks in a sequence ------------------------------------------------------------------------------------------


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


# ---- the memory argument -------------------------------------------------------------------------------------------


def test_memory_is_set_switched_and_removed():
    block, _ = pair()
    attributes = set(vars(block))
    assert mirage.fast.accelerate(block, memory="fast")._mirage_memory == "fast"
    assert mirage.fast.accelerate(block)._mirage_memory == "low"
    mirage.fast.revert(block)
    assert set(vars(block)) == attributes
    for build in (mirage.fast.mirage_tiny, mirage.fast.mirage_small):
        model = build(memory="fast", num_blocks=(1, 1, 1, 1), num_refinement_blocks=1)
        assert model.latent[0]._mirage_memory == "fast"
    with pytest.raises(ValueError, match="memory: expected one of low, fast, got 'high'"):
        mirage.fast.accelerate(block, memory="high")


def test_memory_changes_no_result(impl):
    _, fast = pair(dim=96)
    x = image(dim=96)
    low = step(copy.deepcopy(fast), x)
    for value, expected in zip(step(mirage.fast.accelerate(fast, memory="fast"), x), low, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
