import pytest
import torch
import torch.nn.functional as F
from harness import (
    OperatorTests,
    assert_as_good_as_eager,
    device_of,
    evaluate,
    implementations,
    in_float64,
    relative_error,
    require,
)
from torch.utils.flop_counter import FlopCounterMode

import mirage_kernels
from mirage_kernels import dynamic_depthwise_conv2d
from mirage_kernels.dynamic_depthwise_conv2d import cases, reference

IMPLEMENTATIONS = ("cpp", "triton", "cuda")


class TestDynamicDepthwiseConv2d(OperatorTests):
    (operator,) = cases.CASES


def inputs_of(*shape, dtype=torch.float32, device="cpu"):
    tensors = cases.make(shape, torch.Generator().manual_seed(7))
    return [t.to(dtype=dtype, device=device).requires_grad_() for t in tensors]


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("kernel", [3, 5])
def test_expanded_weight_is_a_static_convolution(impl, kernel):
    """One kernel for all samples without copying it; its gradient is the sum over the batch."""
    require(impl)
    x, weight = inputs_of(3, 2, 10, 13, kernel, device=device_of(impl))
    weight = weight[:1].detach().requires_grad_()

    def static(x, weight):
        return dynamic_depthwise_conv2d(x, weight.expand(3, -1, -1, -1))

    def peer(x, weight):
        return F.conv2d(x, weight[0].unsqueeze(1), padding=kernel // 2, groups=2)

    with mirage_kernels.use(impl):
        results = evaluate(static, [x, weight])
    eager, truth = evaluate(peer, [x, weight]), evaluate(peer, in_float64([x, weight]))
    assert_as_good_as_eager(torch.float32, results, eager, truth)


@pytest.mark.parametrize("width", [*range(1, 36), 47, 48, 49, 63, 64, 65, 80, 112])
def test_every_width_of_a_vector_block(width):
    """Blocks of one to four vectors, whole and overlapping, whatever the instruction set's vector is."""
    require("cpp")
    for kernel in (3, 7):
        x, weight = inputs_of(1, 1, 9, width, kernel)
        with mirage_kernels.use("cpp"):
            results = evaluate(dynamic_depthwise_conv2d, [x, weight])
        truth = evaluate(reference, in_float64([x, weight]))
        for value, exact in zip(results, truth, strict=True):
            assert relative_error(value, exact) < 5e-7


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("height", [0, 5, 8, 9, 33])
def test_heights(impl, height):
    """Strips and groups of rows that the plane does not fill; no rows at all."""
    require(impl)
    x, weight = inputs_of(1, 1, height, 12, 5, device=device_of(impl))
    with mirage_kernels.use(impl):
        results = evaluate(dynamic_depthwise_conv2d, [x, weight])
    truth = evaluate(reference, in_float64([x, weight]))
    for value, exact in zip(results, truth, strict=True):
        assert value.shape == exact.shape
        assert relative_error(value, exact) < 5e-7


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_the_gradient_asked_for(impl, wanted):
    require(impl)
    x, weight = inputs_of(2, 2, 6, 9, 3, device=device_of(impl))
    grad = torch.randn_like(x)
    with mirage_kernels.use(impl):
        both = torch.autograd.grad(dynamic_depthwise_conv2d(x, weight), (x, weight), grad)
        one = x if wanted == "x" else weight
        output = dynamic_depthwise_conv2d(*(t if t is one else t.detach() for t in (x, weight)))
        (alone,) = torch.autograd.grad(output, one, grad)
    assert torch.equal(alone, both[0 if wanted == "x" else 1])


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_one_tensor_as_image_and_kernel(impl):
    """f(x, x) is possible where the plane is as large as the kernel: both gradients must add up, compiled too."""
    require(impl)
    x = inputs_of(2, 2, 3, 3, 3, device=device_of(impl))[0]

    def square(x):
        return dynamic_depthwise_conv2d(x, x) * 2

    with mirage_kernels.use(impl):
        results = evaluate(square, [x])
        torch._dynamo.reset()
        compiled = evaluate(torch.compile(square, fullgraph=True, backend="aot_eager"), [x])
    truth = evaluate(lambda x: reference(x, x) * 2, in_float64([x]))
    for value, same, exact in zip(results, compiled, truth, strict=True):
        assert torch.equal(value, same)
        assert relative_error(value, exact) < 5e-7


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("place", [(0, 0), (5, 8), (2, 4), (4, 8)])
def test_infinity_stays_in_the_taps_it_meets(impl, place):
    """Blocks reach past the plane; an infinite pixel must not become NaN by meeting the zeros there."""
    require(impl)
    x, weight = inputs_of(1, 1, 6, 9, 7, device=device_of(impl))
    with torch.no_grad():
        x[0, 0, place[0], place[1]] = float("inf")
    grad = torch.rand_like(x) + 0.5
    with mirage_kernels.use(impl):
        y = dynamic_depthwise_conv2d(x, weight)
        (value,) = torch.autograd.grad(y, weight, grad)
    exact = torch.zeros_like(value)
    padded = F.pad(x.detach(), (3, 3, 3, 3))
    for row in range(7):
        for column in range(7):
            exact[0, 0, row, column] = (padded[0, 0, row : row + 6, column : column + 9] * grad[0, 0]).sum()
    assert not value.isnan().any()
    assert torch.equal(value.isinf(), exact.isinf())
    assert torch.allclose(value, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_both_arguments(dtype):
    require("cpp")
    x, weight = inputs_of(2, 3, 6, 9, 7)
    with torch.autocast("cpu", dtype), mirage_kernels.use("cpp"):
        y = dynamic_depthwise_conv2d(x, weight)
        mixed = dynamic_depthwise_conv2d(x.to(dtype), weight)
    with mirage_kernels.use("cpp"):
        expected = dynamic_depthwise_conv2d(x.to(dtype), weight.to(dtype))
    assert y.dtype == dtype and torch.equal(y, expected) and torch.equal(mixed, expected)


def test_flops_of_the_gradients_asked_for():
    x, weight = inputs_of(2, 3, 6, 9, 7)
    for wanted, factor in (((x, weight), 3), ((x,), 2), ((weight,), 2)):
        arguments = [t if any(t is w for w in wanted) else t.detach() for t in (x, weight)]
        with FlopCounterMode(display=False) as counter, mirage_kernels.use("cpp"):
            dynamic_depthwise_conv2d(*arguments).sum().backward()
        assert counter.get_total_flops() == factor * 2 * 2 * 3 * 6 * 9 * 49


def test_errors_name_the_argument():
    x, weight = torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 7, 7)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[4, 5, 5\]"):
        dynamic_depthwise_conv2d(x[0], weight)
    with pytest.raises(ValueError, match=r"weight: expected 4 dimensions, got shape \[2, 4, 49\]"):
        dynamic_depthwise_conv2d(x, weight.flatten(2))
    for size in (1, 6, 13):
        with pytest.raises(ValueError, match=r"weight: expected a kernel size of 3, 5, 7, 9 or 11, got shape \[2, 4"):
            dynamic_depthwise_conv2d(x, torch.zeros(2, 4, size, size))
    with pytest.raises(ValueError, match=r"weight: expected shape \[2, 4, 7, 7\] \(a square.*got \[2, 4, 5, 7\]"):
        dynamic_depthwise_conv2d(x, weight[:, :, 1:6])
    with pytest.raises(ValueError, match=r"weight: expected shape \[2, 4, 7, 7\].*got \[1, 4, 7, 7\]"):
        dynamic_depthwise_conv2d(x, weight[:1])
    with pytest.raises(TypeError, match="x: expected float32.*got torch.int64"):
        dynamic_depthwise_conv2d(x.long(), weight)
    with pytest.raises(TypeError, match="weight: expected torch.float32 like x, got torch.float64"):
        dynamic_depthwise_conv2d(x, weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="weight: expected torch.float32 like x, got torch.float64"):
            dynamic_depthwise_conv2d(x, weight.double())
    with pytest.raises(ValueError, match="weight: expected a tensor on cpu like x, got meta"):
        dynamic_depthwise_conv2d(x, weight.to("meta"))
