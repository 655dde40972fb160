"""The accelerated network traced, saved, transformed and differentiated forward: as the reference, or refused."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import mirage
import mirage.fast
import mirage_kernels

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def small():
    torch.manual_seed(0)
    return mirage.MIRAGE(dim=12, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2)).eval()


@pytest.fixture(scope="module")
def networks():
    """The accelerated network and the reference, of equal weights."""
    return mirage.fast.accelerate(small()), small()


@pytest.fixture(scope="module")
def images():
    """Two of one shape, at which feature maps come from the workspace, and one of another."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(shape, generator=generator) for shape in ((1, 3, 128, 128), (1, 3, 128, 128), (2, 3, 96, 160))]


@pytest.fixture(scope="module")
def restored(networks, images):
    with torch.no_grad():
        return [networks[1](x) for x in images]


@pytest.fixture(scope="module")
def traced(networks, images):
    with torch.no_grad():
        return torch.jit.trace(networks[0], images[0])


def test_a_trace_is_right_for_other_images_and_sizes(traced, images, restored):
    with torch.no_grad():
        results = [traced(x) for x in images]  # all of them: what was given before stays
    for result, expected in zip(results, restored, strict=True):
        close(result, expected)


def test_a_saved_trace_is_right_in_another_process(traced, images, restored, tmp_path):
    torch.jit.save(traced, tmp_path / "net.pt")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, mirage_kernels; torch.set_grad_enabled(False); folder = sys.argv[1]; "
        "net, images = torch.jit.load(folder + '/net.pt'), torch.load(folder + '/images.pt'); "
        "torch.save([net(x) for x in images], folder + '/results.pt')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    for result, expected in zip(torch.load(tmp_path / "results.pt"), restored, strict=True):
        close(result, expected)


def test_a_trace_serves_threads(traced, images, restored):
    def run(i):
        with torch.no_grad():
            return traced(images[i % 3])

    with ThreadPoolExecutor(2) as threads:
        for i, result in enumerate(threads.map(run, range(12))):
            close(result, restored[i % 3])


@pytest.mark.parametrize("options", [{}, {"pre_dispatch": True}, {"tracing_mode": "symbolic"}], ids=str)
def test_graphs_of_make_fx(networks, images, restored, options):
    if "tracing_mode" in options:
        options = {**options, "_allow_non_fake_inputs": True}
    with torch.no_grad():
        graph = make_fx(networks[0], **options)(images[0])
        results = [graph(x) for x in images[:2]]
    for result, expected in zip(results, restored[:2], strict=True):
        close(result, expected)


def test_transforms(networks, images, restored):
    fast, x, y = networks[0], *images[:2]
    with torch.no_grad():
        close(torch.func.functionalize(fast)(x), restored[0])
        close(torch.vmap(fast)(torch.stack((x, y))), torch.stack(restored[:2]))
        close(torch.func.functionalize(torch.vmap(fast))(torch.stack((x, y)))[1], restored[1])


def test_modes(networks, images, restored):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        results = [networks[0](x) for x in images]
    for result, expected in zip(results, restored, strict=True):
        close(result, expected)


def test_forward_mode_derivatives(networks, images):
    fast, reference = networks
    x, direction = (image[..., :32, :40] for image in images[:2])
    expected = torch.func.jvp(reference, (x,), (direction,))
    assert (expected[1] - direction).abs().max() > 0.01, "more than the tangent of the image itself"
    close(torch.func.jvp(fast, (x,), (direction,)), expected)
    with torch.no_grad():
        close(torch.func.jvp(fast, (x,), (direction,)), expected)
    forward_ad = torch.autograd.forward_ad
    for grad in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            close(forward_ad.unpack_dual(fast(forward_ad.make_dual(x, direction))).tangent, expected[1])


def gradients(model, images, per_sample):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, buffers, x):
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().mean()

    if not per_sample:
        return torch.func.grad(loss)(parameters, buffers, images)
    of_one = torch.func.grad(lambda p, b, x: loss(p, b, x[None]))
    return torch.vmap(of_one, in_dims=(None, None, 0))(parameters, buffers, images)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_by_torch_func(networks, images, per_sample):
    batch = torch.cat([image[..., :24, :32] for image in images[:2]])
    found, expected = (gradients(model, batch, per_sample) for model in networks)
    for name, right in expected.items():
        close(found[name], right)


def test_second_derivatives_by_torch_func(networks, images):
    x, direction = (image[..., :16, :24] for image in images[:2])
    found, expected = (
        torch.func.jvp(torch.func.grad(lambda v, m=model: m(v).square().mean()), (x,), (direction,))[1]
        for model in networks
    )
    close(found, expected)


def test_a_forced_implementation_names_the_way_out(networks, images):
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    with mirage_kernels.use("cpp"), pytest.raises(RuntimeError, match="cannot run: inside a transform of torch.func"):
        torch.vmap(networks[0])(images[0][None])


def test_torchscript_files_hold_no_pictures(traced, images):
    """What a file holds is weights: it does not grow with the image that was traced."""
    file = io.BytesIO()
    torch.jit.save(traced, file)
    weights = sum(t.nbytes for t in traced.state_dict().values())
    assert len(file.getvalue()) < 2 * weights + (1 << 20)
