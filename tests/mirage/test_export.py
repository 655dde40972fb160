"""Networks as exported programs and ONNX files: other sizes, other batches, gradients where there were none."""

import pytest
import torch
from torch.export import Dim

import mirage
import mirage.fast
from mirage_kernels._runtime import dispatch

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = ((1, 3, 40, 48), (3, 3, 64, 32))  # neither is that of the export


def network(fast: bool) -> mirage.MIRAGE:
    torch.manual_seed(0)
    model = mirage.MIRAGE(dim=12, num_blocks=(1, 0, 0, 0), num_refinement_blocks=0, heads=(1, 1, 2, 2), spd=False)
    return (mirage.fast.accelerate(model) if fast else model).eval()


def images(shapes=SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(shape, generator=generator) for shape in shapes]


def dynamic(batch: bool) -> dict[int, object]:
    sizes = {2: 8 * Dim("h", min=2, max=200), 3: 8 * Dim("w", min=2, max=200)}
    return {0: Dim("b", min=1, max=64), **sizes} if batch else sizes


def export_to_onnx(model, example, path, dynamo, dynamic_batch):
    pytest.importorskip("onnx")
    names = {"input_names": ["image"], "output_names": ["restored"]}
    if dynamo:
        pytest.importorskip("onnxscript")
        options = {"dynamic_shapes": (dynamic(dynamic_batch),), "verbose": False}
    else:
        options = {"dynamic_axes": {"image": {0: "b", 2: "h", 3: "w"} if dynamic_batch else {2: "h", 3: "w"}}}
    with torch.no_grad():
        torch.onnx.export(model, (example,), path, dynamo=dynamo, **names, **options)


@pytest.mark.parametrize("dynamic_batch", [False, True], ids=["one image", "any batch"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["trace", "dynamo"])
@pytest.mark.parametrize("fast", [False, True], ids=["reference", "fast"])
def test_onnx_of_any_size(tmp_path, fast, dynamo, dynamic_batch):
    onnxruntime = pytest.importorskip("onnxruntime")
    path, expected = tmp_path / "net.onnx", network(fast=False)
    (example,) = images([(2 if dynamic_batch else 1, 3, 32, 24)])
    export_to_onnx(network(fast), example, path, dynamo, dynamic_batch)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for image in images(SIZES if dynamic_batch else [(1, *shape[1:]) for shape in SIZES]):
        (restored,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(restored), expected(image), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def program():
    """The accelerated network, exported where no gradient was wanted."""
    (example,) = images([(2, 3, 32, 24)])
    with torch.no_grad():
        return torch.export.export(network(fast=True), (example,), dynamic_shapes=(dynamic(batch=True),))


def gradients(run, image):
    image = image.clone().requires_grad_()
    y = run(image)
    return y.detach(), torch.autograd.grad(y.square().mean(), image)[0]


def test_a_program_exported_without_gradients_has_them(program):
    for image in images():
        found, expected = (gradients(run, image) for run in (program.module(), network(fast=False)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_trace_recorded_without_gradients_has_them():
    image = images()[0]
    with torch.no_grad():
        traced = torch.jit.trace(network(fast=True), image)
    torch.testing.assert_close(gradients(traced, image), gradients(network(fast=False), image), rtol=1e-4, atol=1e-6)


def test_a_program_names_an_implementation_that_is_not_there(program, monkeypatch):
    """Recorded where C++ or Triton was, run where it is not."""
    graph = program.module()
    for node in graph.graph.nodes:
        if str(node.target).startswith("mirage_kernels"):
            node.args = tuple("triton" if a in ("cpp", "torch", "composite") else a for a in node.args)
    graph.recompile()
    monkeypatch.setitem(dispatch.runnable, "cpu", {"composite"})
    for image in images():
        with torch.no_grad():
            torch.testing.assert_close(graph(image), network(fast=False)(image), rtol=1e-4, atol=1e-5)
