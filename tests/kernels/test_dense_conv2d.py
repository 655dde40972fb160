import pytest
import torch
import torch.nn.functional as F
from harness import (
    LAYOUTS,
    ON_GPU,
    OperatorTests,
    device_of,
    dtypes_of,
    evaluate,
    implementations,
    random_like,
    relative_error,
    require,
    slowly,
)
from torch.utils.flop_counter import FlopCounterMode

import mirage_kernels
from mirage_kernels import dense_conv2d
from mirage_kernels._runtime import dispatch
from mirage_kernels.dense_conv2d import cases, reference

IMPLEMENTATIONS = ("cpp",)
TYPICAL, MIX = (2, 6, 9, 13, 10, 3), (2, 9, 6, 11, 5, 1)  # kernels of 3x3 and of 1x1


def inputs_for(shape, dtype=torch.float32, device="cpu"):
    return [t.to(device, dtype).requires_grad_() for t in cases.make(shape, torch.Generator().manual_seed(0))]


class TestDenseConv2d(OperatorTests):
    (operator,) = cases.CASES


def compare(impl, x, weight, dtype, bound):
    """Output and gradients against float64; `x` and `weight` in float64, on the CPU."""
    inputs = [t.to(device_of(impl), dtype).requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(x.shape[0], weight.shape[0], *x.shape[2:], generator=generator).to(inputs[0])
    with mirage_kernels.use(impl):
        results = evaluate(dense_conv2d, inputs, grad_output=grad)
    assert mirage_kernels.last_used("dense_conv2d") == impl
    truth = evaluate(reference, exact, grad_output=grad.double().cpu())
    for result, expected in zip(results, truth, strict=True):
        assert relative_error(result, expected) < bound * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_count_of_channels(impl, size, dtype):
    """Rests of the blocks of registers and of the pairs of channels, in both roles."""
    require(impl)
    generator = torch.Generator().manual_seed(0)
    for channels in range(1, 15, 5 if slowly(impl) else 1):
        outputs = 15 - channels
        x = torch.randn(1, channels, 5, 9, generator=generator, dtype=torch.float64)
        weight = torch.randn(outputs, channels, size, size, generator=generator, dtype=torch.float64)
        compare(impl, x, weight, dtype, bound=4)


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 70, 20, 9, 40), (2, 20, 70, 19, 14), (1, 40, 50, 33, 17)),
        *((3, 9, 34, 1, 50), (1, 130, 8, 4, 64), (1, 64, 64, 9, 21)),
    ],
    ids=str,
)
def test_tiles_of_pixels_and_channels(impl, size, shape):
    """batch, channels, outputs, height, width: both widths of a tile, rests of each kind, sums over several blocks."""
    require(impl)
    batch, channels, outputs, height, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, channels, size, size, generator=generator, dtype=torch.float64)
    for dtype in dtypes_of(impl):
        if dtype != torch.float64:
            compare(impl, x, weight / (channels * size * size) ** 0.5, dtype, bound=4)


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixing_in_any_layout(impl, layout):
    """Where lines of an image do not follow each other a 1x1 convolution cannot take them as one."""
    require(impl)
    inputs = inputs_for(MIX, device=device_of(impl))
    with mirage_kernels.use(impl):
        expected = evaluate(dense_conv2d, inputs)
        inputs[0] = LAYOUTS[layout](inputs[0].detach()).requires_grad_()
        results = evaluate(dense_conv2d, inputs, grad_output=LAYOUTS[layout](random_like(expected[0])))
    for value, peer in zip(results, expected, strict=True):
        assert relative_error(value, peer) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_long_sums_keep_their_accuracy(impl):
    """2304 products an output: the error may not grow with them as in one running sum."""
    require(impl)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(1, 256, 16, 16, generator=generator), torch.rand(8, 256, 3, 3, generator=generator)
    with mirage_kernels.use(impl):
        value = dense_conv2d(x.to(device_of(impl)), weight.to(device_of(impl)))
    exact = reference(x.double(), weight.double())
    assert relative_error(value, exact) <= 1e-6
    assert relative_error(value, exact) <= 2 * relative_error(reference(x, weight), exact)


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_weight_of_any_strides(impl):
    require(impl)
    x, weight = inputs_for(TYPICAL, device=device_of(impl))
    strided = weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with mirage_kernels.use(impl):
        assert torch.equal(dense_conv2d(x, strided), dense_conv2d(x, weight))


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_only_x_and_weight_are_saved(impl):
    require(impl)
    x, weight = inputs_for(TYPICAL, device=device_of(impl))
    saved = []
    with mirage_kernels.use(impl), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        dense_conv2d(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("case", [TYPICAL, MIX, cases.CASES[0].empty], ids=str)
def test_one_gradient_alone(impl, case):
    """The other is not computed, and this one is what it was."""
    require(impl)
    inputs = inputs_for(case, device=device_of(impl))
    with mirage_kernels.use(impl):
        both = evaluate(dense_conv2d, inputs)[1:]
        for i in range(2):
            tensors = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
            with FlopCounterMode(display=False) as counter:
                y = dense_conv2d(*tensors)
                (alone,) = torch.autograd.grad(y, tensors[i : i + 1], random_like(y))
            forward = 2 * y.numel() * inputs[1][0].numel()
            assert torch.equal(alone, both[i]) and counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_no_channels(impl):
    """Nothing to add up is zero."""
    require(impl)
    device = device_of(impl)
    with mirage_kernels.use(impl):
        x, weight = torch.randn(1, 0, 5, 4, device=device), torch.randn(3, 0, 3, 3, device=device)
        assert torch.equal(dense_conv2d(x, weight), torch.zeros(1, 3, 5, 4, device=device))
        x = torch.randn(1, 3, 5, 4, device=device, requires_grad=True)
        value = dense_conv2d(x, torch.randn(0, 3, 3, 3, device=device))
        assert value.shape == (1, 0, 5, 4)
        assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros_like(x))


def test_where_the_library_does_not_run_it_is_the_convolution_of_pytorch():
    x, weight = inputs_for(TYPICAL)
    for default in ("triton", "cuda"):
        with dispatch.by_itself(default):
            value = dense_conv2d(x, weight)
        assert mirage_kernels.last_used("dense_conv2d") == "torch"
        assert torch.equal(value, F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("case", [TYPICAL, MIX], ids=str)
def test_under_cuda_it_runs_as_by_itself(case):
    """Nothing of it is written in CUDA C++: PyTorch's on a GPU, the C++ library where a CPU emulates CUDA."""
    require("cuda")
    inputs = inputs_for(case, device=device_of("cuda"))
    expected = "torch" if ON_GPU else "cpp"
    with mirage_kernels.use("cuda"):
        results = evaluate(dense_conv2d, inputs)
        assert mirage_kernels.last_used("dense_conv2d") == expected
    with mirage_kernels.use(expected):
        peers = evaluate(dense_conv2d, inputs)
    for result, peer in zip(results, peers, strict=True):
        assert torch.equal(result, peer)

def test_errors_name_the_argument():
    x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(6, 4, 3, 3)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[4, 3, 3\]"):
        dense_conv2d(x[0], weight)
    with pytest.raises(ValueError, match=r"weight: expected shape \[M, 4, K, K\].*got \[6, 3, 3, 3\]"):
        dense_conv2d(x, weight[:, :3])
    with pytest.raises(ValueError, match=r"weight: expected shape.*got \[6, 4, 5, 5\]"):
        dense_conv2d(x, torch.zeros(6, 4, 5, 5))
    with pytest.raises(ValueError, match=r"weight: expected shape.*got \[6, 4, 1, 3\]"):
        dense_conv2d(x, torch.zeros(6, 4, 1, 3))
    with pytest.raises(TypeError, match="weight: expected torch.float32 like x, got torch.float64"):
        dense_conv2d(x, weight.double())
    with pytest.raises(TypeError, match="x: expected float32.*got torch.int64"):
        dense_conv2d(x.long(), weight)
