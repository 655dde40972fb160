"""AdaIR's module of frequencies on `mirage.fast`: the authors' Fourier transforms against products with a few waves."""

import copy
import io

import pytest
import torch
from harness import operators
from lookalike_restormer import FrequencyModule
from torch import nn

import mirage.fast
from mirage.fast.frequencies import split

DIM = 12


def pair(dtype=torch.float64):
    """A module of an unknown class, no weight of which is what it begins with, and its fast counterpart."""
    torch.manual_seed(0)
    module = FrequencyModule(DIM).to(dtype)
    with torch.no_grad():
        module.para1.normal_()
        module.para2.normal_()
        module.rate_conv[2].bias.copy_(torch.tensor([1.5, 0.9]))
    fast = mirage.fast.accelerate(nn.Sequential(copy.deepcopy(module)))[0]
    assert type(fast) is mirage.fast.FrequencyModule
    return module, fast


def of_one(size, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def three_quarters_are_low(fast):
    """Of the most that can be: of 10 and of 6, no rounding makes 7.5 or 4.5 another number."""
    with torch.no_grad():
        fast.rate_conv[2].weight.mul_(0.01)
        fast.rate_conv[2].bias.fill_(1.1)


ANY_SIZE = ({2: torch.export.Dim("height", min=32, max=1024), 3: torch.export.Dim("width", min=32, max=1024)},) * 2


def of_two_sizes(batch=2):
    """Inputs of which nothing is low, and some is."""
    return ((of_one(size, batch, torch.float32), torch.randn(batch, DIM, *size)) for size in ((64, 96), (300, 260)))


def gradients(module, results):
    """Of some weights in front of the results; the shares that decide how much is low have none."""
    torch.manual_seed(2)
    loss = sum((result * torch.randn_like(result)).sum() for result in results)
    return torch.autograd.grad(loss, list(module.conv1.parameters()))


@pytest.mark.parametrize("parts", [2, 3, 5, 9])
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (16, 7), (31, 20)], ids="{0[0]}x{0[1]}".format)
def test_low_and_high_frequencies(size, parts):
    """With and without gradients; at odd sizes, where one side of zero has a frequency less."""
    module, fast = pair()
    image = of_one(size)
    results = module.fft(image, parts), split(fast, image, parts)
    for value, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for value, expected in zip(gradients(fast, results[1]), gradients(module, results[0]), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        for value, expected in zip(split(fast, image, parts), results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_each_image_has_its_own_rectangle():
    """And is in a batch what it is alone."""
    module, fast = pair()
    image = of_one((16, 16), batch=4) * torch.tensor([0.1, 1, 5, 30], dtype=torch.float64).view(-1, 1, 1, 1)
    with torch.no_grad():
        module.rate_conv[2].weight.mul_(20)
        fast.load_state_dict(module.state_dict())
        shares = module.rate_conv(module.conv1(image).mean((2, 3), keepdim=True)).sigmoid()
        assert len((8 * shares).int().unique()) > 2, "they must differ"
        together = split(fast, image, 2)
        for value, expected in zip(together, module.fft(image, 2), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        for sample in range(4):
            alone = split(fast, image[sample : sample + 1], 2)
            for value, whole in zip(alone, together, strict=True):
                torch.testing.assert_close(value, whole[sample : sample + 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 12), (260, 12), (257, 300)], ids="{0[0]}x{0[1]}".format)
def test_values_and_gradients(size):
    """Of small images nothing is low; the last has frequencies to both sides of zero."""
    module, fast = pair()
    image, y = of_one((size[0] // 2 + 1, size[1])), torch.randn(2, DIM, *size, dtype=torch.float64)
    if size == (257, 300):
        with torch.no_grad():
            assert module.fft(torch.nn.functional.interpolate(image, size, mode="bilinear"))[1].any()
    results = []
    for one in (module, fast):
        inputs = [image.clone().requires_grad_(), y.clone().requires_grad_()]
        result = one(*inputs)
        result.square().sum().backward()
        results.append([result, *(t.grad for t in (*inputs, *one.parameters()))])
        assert all(parameter.grad is None for parameter in one.rate_conv.parameters())
    for value, expected in zip(*reversed(results), strict=True):
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(fast(image, y), results[0][0], rtol=1e-9, atol=1e-10)
        assert operators(lambda: fast(image, y)).count("channel_attention") == 3


@pytest.mark.parametrize("size", [(8, 8), (256, 256)], ids=["nothing is low", "some is"])
def test_no_gradient_is_not_a_number(size):
    """Where a map is zero, as that of a black image is, both magnitudes are."""
    module, fast = pair()
    image = torch.zeros(1, 3, *size, dtype=torch.float64, requires_grad=True)
    results = []
    for parts in (module.fft(image), split(fast, image)):
        results.append(torch.autograd.grad(sum(part.sum() for part in parts), image))
    assert not results[1][0].any() and torch.equal(*(grad for (grad,) in results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_other_dtypes(dtype):
    """Half precision too, of which the authors' code has no transform; its sums are in float32."""
    module, _ = pair()
    _, fast = pair(torch.float32)
    three_quarters_are_low(fast)
    with torch.no_grad():
        fast.to(dtype)
        module.load_state_dict(fast.state_dict())
        image = of_one((40, 24)).to(dtype)
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        for value, expected in zip(split(fast, image, 4), module.fft(image.double(), 4), strict=True):
            assert value.dtype == dtype
            assert (value.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_round_the_waves(dtype):
    """What the convolution in front makes is in half precision then, and so are the results; no product between."""
    _, fast = pair(torch.float32)
    three_quarters_are_low(fast)
    image = of_one((40, 24), dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        x = fast.conv1(image)
        results = split(fast, image, 4)
        compiled = torch.compile(split, fullgraph=True, backend="aot_eager")(fast, image, 4)
        sum(result.float().sum() for result in results).backward()
    assert x.dtype == dtype and fast.conv1.weight.grad.isfinite().all()
    given, still = copy.deepcopy(fast).double(), copy.deepcopy(x.detach()).double()
    given.conv1 = nn.Identity()
    for value, again, expected in zip(results, compiled, FrequencyModule.fft(given, still, 4), strict=True):
        assert value.dtype == again.dtype == dtype
        assert (value.double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()
        torch.testing.assert_close(again, value)


@pytest.mark.parametrize("dynamo", [True, False], ids=["exported", "traced"])
def test_exported_to_onnx_for_any_size(dynamo):
    """Where nothing is low, and where some is: ONNX has no Fourier transforms that could be rolled."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, fast = pair(torch.float32)
    fast.eval()
    first, second = of_two_sizes(batch=1)
    with torch.no_grad():
        session = onnxruntime.InferenceSession(_onnx(fast, first, dynamo))
        for inputs in (first, second):
            feed = {given.name: t.numpy() for given, t in zip(session.get_inputs(), inputs, strict=True)}
            (value,) = session.run(None, feed)
            torch.testing.assert_close(torch.from_numpy(value), fast(*inputs), rtol=1e-3, atol=1e-4)


def _onnx(model, inputs, dynamo: bool) -> bytes:
    if dynamo:
        return torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=ANY_SIZE).model_proto.SerializeToString()
    names, file = ["x", "y"], io.BytesIO()
    sizes = {name: {2: f"height of {name}", 3: f"width of {name}"} for name in names}
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=sizes, opset_version=20)
    return file.getvalue()


def test_compiled_and_exported_for_any_size():
    """The authors' code reads how much is low from each image in Python, so neither can take it."""
    _, fast = pair(torch.float32)
    fast.eval()
    first, second = of_two_sizes()
    with torch.no_grad():
        exported = torch.export.export(fast, first, dynamic_shapes=ANY_SIZE).module()
        compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
        for inputs in (first, second):
            for run in (exported, compiled):
                torch.testing.assert_close(run(*inputs), fast(*inputs), rtol=1e-4, atol=1e-5)
        traced = torch.jit.trace(fast, first)
        torch.testing.assert_close(traced(*second), fast(*second), rtol=1e-4, atol=1e-5)


def test_hooks_of_its_children_are_called():
    _, fast = pair(torch.float32)
    seen = []
    for name in ("conv1", "rate_conv", "frequency_refine", "channel_cross_agg"):
        fast.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    with torch.no_grad():
        fast(of_one((8, 8), dtype=torch.float32), torch.randn(2, DIM, 8, 8))
    assert seen == ["conv1", "rate_conv", "frequency_refine", "channel_cross_agg"]


class Fewer(FrequencyModule):
    """Another split, which shows on images of 128 pixels alone."""

    def fft(self, x, n=128):
        return super().fft(x, 2 * n)


class Halved(FrequencyModule):
    def forward(self, x, y):
        return super().forward(x, y) / 2


class Without(FrequencyModule):
    fft = None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Fewer, "it computes something else than FrequencyModule"),
        (Halved, "it computes something else than FrequencyModule"),
        (Without, "comparing it with FrequencyModule failed"),
    ],
)
def test_what_is_another_module(kind, reason):
    summary = mirage.fast.summary(mirage.fast.accelerate(nn.Sequential(kind(DIM))))
    assert reason in summary.kept["0"]
    assert summary.replaced["0.channel_cross_l"] == "CrossChannelAttention"


def test_parameters_of_another_shape():
    module = FrequencyModule(DIM)
    module.para2 = nn.Parameter(torch.ones(DIM))
    kept = mirage.fast.summary(mirage.fast.accelerate(nn.Sequential(module))).kept
    assert "para2 is (12,), not of shape (12, 1, 1)" in kept["0"]


def test_revert():
    module, fast = pair()
    assert type(mirage.fast.revert(fast)) is FrequencyModule
    assert fast.state_dict().keys() == module.state_dict().keys()
