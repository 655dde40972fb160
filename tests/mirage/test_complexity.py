"""Parameters, multiply-adds and memory: against hand counts, against each other, and against the figures of Table 6."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mirage
from mirage.complexity import MIB, MemoryTracker, measure, measure_step


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1, bias=False)
    )


def small_mirage(**options) -> nn.Module:
    torch.manual_seed(0)
    return mirage.MIRAGE(dim=12, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2), **options)


class Released(nn.Module):
    """What the released code looks like from outside: no return_spd, and a loss beside the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor):
        restored, (z_s, z_l) = self.model(x, return_spd=True)
        return restored, (z_s * z_l).sum()


@pytest.mark.parametrize("memory", ["tracker", "fake"])
def test_forward_of_a_small_net_by_hand(memory):
    cost = measure(small_net(), (1, 3, 16, 16), memory=memory)
    # convolution 864 -> 1024; batch norm: weight, bias, running mean and variance, count; last convolution 96 -> 512
    parameters_and_buffers = 1024 + 5 * 512 + 512
    image, features = 3 * 16 * 16 * 4, 8 * 16 * 16 * 4
    # the peak is inside ReLU: convolution output (kept for batch norm), batch norm output, ReLU output, mean and rstd
    assert cost.peak_memory_bytes == parameters_and_buffers + image + 3 * features + 2 * 512
    assert cost.parameters == 8 * 3 * 9 + 8 + 8 + 3 * 8
    assert cost.macs == 16 * 16 * (8 * 27 + 3 * 8)
    assert (cost.device, cost.memory_method, cost.scope, cost.input_size) == ("cpu", memory, "forward", (1, 3, 16, 16))


@pytest.mark.parametrize("memory", ["tracker", "fake"])
def test_step_of_one_convolution_by_hand(memory):
    net = nn.Conv2d(3, 3, 1, bias=False)
    cost = measure_step(net, (1, 3, 16, 16), memory=memory, loss=lambda restored, target: (restored * target).sum())
    weight, image, scalar = 512, 3 * 16 * 16 * 4, 512
    # the product dies with the sum; then come the gradients of the sum, of the output (times the target), of the weight
    after_forward = weight + 3 * image + scalar
    assert cost.peak_memory_bytes == after_forward + scalar + image + weight
    assert cost.scope == "step"


@pytest.mark.parametrize("build", [small_net, small_mirage])
@pytest.mark.parametrize("what", [measure, measure_step])
def test_the_estimate_equals_the_tracker(build, what):
    model = build()
    tracked, fake = what(model, (2, 3, 24, 16), memory="tracker"), what(model, (2, 3, 24, 16), memory="fake")
    assert tracked.peak_memory_bytes == fake.peak_memory_bytes
    assert tracked.macs == fake.macs > 0


@pytest.mark.parametrize(
    ("build", "parameters", "gmacs", "forward", "step"),
    [(mirage.mirage_tiny, 6_207_412, 16.25, 3594, 1199), (mirage.mirage_small, 9_678_983, 26.68, 4915, 1642)],
    ids=["T", "S"],
)
def test_table_6_is_reproduced(build, parameters, gmacs, forward, step):
    model = build()
    cost = measure(model, memory="fake")
    assert cost.parameters == parameters
    assert cost.gmacs == pytest.approx(gmacs, abs=0.005)
    assert cost.peak_memory_mib == pytest.approx(forward, rel=0.001)
    assert measure_step(model, memory="fake").peak_memory_mib == pytest.approx(step, rel=0.002)


def test_released_style_models_are_measured_alike():
    model = small_mirage()
    ours, theirs = measure(model, (1, 3, 16, 16)), measure(Released(model), (1, 3, 16, 16))
    assert theirs.macs == ours.macs
    assert theirs.peak_memory_bytes == pytest.approx(ours.peak_memory_bytes, rel=0.01)
    assert measure_step(Released(model), (1, 3, 16, 16)).peak_memory_bytes > 0


def test_the_spd_head_runs():
    with_head = measure(small_mirage(), (1, 3, 32, 32)).macs
    model = small_mirage()
    inner = model.forward
    model.forward = lambda x: inner(x)
    assert measure(model, (1, 3, 32, 32)).macs < with_head


@pytest.mark.parametrize("memory", ["tracker", "fake"])
def test_a_network_built_without_the_head(memory):
    model = small_mirage(spd=False)
    assert measure(model, (1, 3, 32, 32), memory=memory).macs < measure(small_mirage(), (1, 3, 32, 32)).macs
    assert measure_step(model, (1, 3, 32, 32), memory=memory).peak_memory_bytes > 0


@pytest.mark.parametrize("memory", ["tracker", "fake"])
@pytest.mark.parametrize("what", [measure, measure_step])
def test_nothing_is_changed(what, memory):
    model = small_mirage().eval()
    model.refinement.train()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weight = next(model.parameters())
    grad = weight.grad = torch.ones_like(weight)
    x = torch.rand(1, 3, 16, 16)
    rng = torch.get_rng_state()
    kept = x.clone()
    what(model, x=x, memory=memory)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert weight.grad is grad and torch.equal(grad, torch.ones_like(grad))
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, kept) and not x.requires_grad


def test_state_is_restored_when_the_model_fails():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            self.norm(x)
            raise RuntimeError("on purpose")

    model = Broken().eval()
    with pytest.raises(RuntimeError, match="on purpose"):
        measure(model, (1, 3, 8, 8))
    assert not model.training and not model.norm.training
    assert model.norm.num_batches_tracked == 0


def test_works_under_inference_mode_and_no_grad():
    expected = measure(small_net(), (1, 3, 16, 16)).peak_memory_bytes
    with torch.no_grad():
        assert measure(small_net(), (1, 3, 16, 16)).peak_memory_bytes == expected


def test_a_given_image_sets_size_and_dtype():
    cost = measure(small_net().double(), x=torch.rand(2, 3, 8, 24, dtype=torch.float64))
    assert cost.input_size == (2, 3, 8, 24)
    assert cost.macs == 2 * 8 * 24 * (8 * 27 + 3 * 8)


def test_tracker_counts_storages_not_views_and_forgets_freed_ones():
    with MemoryTracker() as tracker:
        a = torch.empty(1000)  # 4000 -> 4096 bytes
        view = a[10:].view(-1, 10).t()
        assert tracker.current == 4096
        b = a + 1
        assert tracker.current == 8192
        del a
        assert tracker.current == 8192  # the view keeps it
        del view
        assert tracker.current == 4096
        c = b.add_(1)
        assert tracker.current == 4096 and c is b
        torch.empty(1)
        assert tracker.current == 4096
    assert tracker.peak == 8192


def test_tracker_adds_existing_storages_once():
    x = torch.empty(128)
    tracker = MemoryTracker()
    tracker.add([x, x.view(8, 16), x[3:]])
    assert tracker.current == tracker.peak == 512


@pytest.fixture
def custom_operator():
    library = torch.library.Library("mirage_complexity_test", "DEF")
    library.define("halve(Tensor x) -> Tensor")

    def kernel(x: Tensor) -> Tensor:
        scratch = torch.empty(100 * 1024, dtype=torch.uint8)
        del scratch
        return x / 2

    library.impl("halve", kernel, "CPU")
    torch.library.register_fake("mirage_complexity_test::halve", torch.empty_like, lib=library)
    torch.library.register_autograd(
        "mirage_complexity_test::halve", lambda ctx, grad: torch.ops.mirage_complexity_test.halve(grad), lib=library
    )
    yield torch.ops.mirage_complexity_test.halve
    library._destroy()


def test_custom_operators_are_seen(custom_operator):
    class Halve(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x):
            return custom_operator(self.conv(x))

    image = 3 * 16 * 16 * 4
    real, fake = (measure(Halve(), (1, 3, 16, 16), memory=memory) for memory in ("tracker", "fake"))
    assert fake.peak_memory_bytes == 512 + 3 * image  # the output of a custom operator counts like any
    assert real.peak_memory_bytes == 512 + 2 * image + 100 * 1024  # and what it needs while it runs
    assert real.macs == 16 * 16 * 9
    assert real.uncounted_operators == fake.uncounted_operators == ("mirage_complexity_test.halve.default",)
    assert measure_step(Halve(), (1, 3, 16, 16)).peak_memory_bytes > real.peak_memory_bytes


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="memory: expected one of auto, tracker, cuda, fake, got 'rss'"):
        measure(small_net(), (1, 3, 8, 8), memory="rss")
    with pytest.raises(ValueError, match="memory: 'cuda' needs a model on a CUDA device, got one on cpu"):
        measure(small_net(), (1, 3, 8, 8), memory="cuda")


def test_units():
    cost = measure(small_net(), (1, 3, 16, 16))
    assert cost.peak_memory_mib * MIB == cost.peak_memory_bytes
    assert cost.gmacs == cost.macs / 1e9
    assert cost.as_dict()["input_size"] == (1, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_estimate():
    model = small_mirage().cuda()
    real, fake = (measure(model, (1, 3, 128, 128), memory=memory) for memory in ("auto", "fake"))
    assert real.memory_method == "cuda"
    assert real.peak_memory_bytes == pytest.approx(fake.peak_memory_bytes, rel=0.1)
