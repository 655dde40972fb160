"""mirage.fast.TransformerBlock: two stages with an autograd policy, in training and around it."""

import copy

import pytest
import torch
from fast_blocks import assert_alike, image, pair, runs_stages, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import mirage_kernels
from mirage import blocks
from mirage.fast.mixer import branch_scale

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
