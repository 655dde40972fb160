from functools import partial

import attention_terms
import pytest
import torch
from harness import (
    OperatorTests,
    detached,
    device_of,
    evaluate,
    implementations,
    relative_error,
    require,
)

import mirage_kernels
from mirage_kernels import _composite, channel_attention
from mirage_kernels.channel_attention import cases, reference

public, plain = (partial(cases.call, function) for function in (channel_attention, reference))


class TestChannelAttention(OperatorTests):
    (operator,) = cases.CASES
    alias = ("q", "k")
    terms = attention_terms.of_attention
    roundings = 9  # the gradient of the temperature is a number a head


def _inputs(shape, dtype=torch.float64):
    return [t.to(dtype) for t in cases.make(shape, torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("d", [1, 5, 8, 10, 24, 67])
def test_any_head_size(d):
    """Every remainder of the register blocks, against float64 and against the sums written out."""
    q, k, v, temperature = _inputs((1, 2 * d, 6, 9, 2))
    with mirage_kernels.use("cpp"):
        out = public(q, k, v, temperature)
    for head in range(2):
        part = slice(head * d, (head + 1) * d)
        qn, kn, vh = (t[0, part].flatten(1) for t in (q, k, v))
        scores = temperature[head] * (qn / qn.norm(dim=1, keepdim=True)) @ (kn / kn.norm(dim=1, keepdim=True)).T
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        assert relative_error(out[0, part].flatten(1), weights @ vh) < 1e-14


@pytest.mark.parametrize("impl", implementations(("cuda",)))
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("d", [1, 17, 48, 64])
def test_any_head_size_on_a_gpu(impl, d, precision):
    """Every number of blocks of 16 channels, exact and with TF32, forward and backward."""
    require(impl)
    inputs = detached([t.to(device_of(impl)) for t in _inputs((1, 2 * d, 9, 21, 2), torch.float32)])
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    truth = evaluate(plain, [t.detach().double().requires_grad_() for t in inputs], grad.double())
    torch.set_float32_matmul_precision(precision)
    try:
        with mirage_kernels.use(impl):
            results = evaluate(public, inputs, grad)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert mirage_kernels.last_used("channel_attention") == impl
    errors = [relative_error(value, exact) for value, exact in zip(results, truth, strict=True)]
    if precision == "highest":
        assert max(errors) < 2e-6
    else:
        assert 1e-5 < errors[0] < 2e-3 or d == 1  # whose softmax is 1
        assert max(errors) < 2e-2


@pytest.mark.parametrize("impl", implementations(("cuda",)))
def test_a_head_of_more_channels_than_kernels_take(impl):
    require(impl)
    q, k, v, temperature = (t.to(device_of(impl)) for t in _inputs((1, 65, 3, 5, 1), torch.float32))
    with mirage_kernels.use(impl):
        out = public(q, k, v, temperature)
    assert mirage_kernels.last_used("channel_attention") not in (impl, None)
    assert relative_error(out, plain(q.double(), k.double(), v.double(), temperature.double())) < 1e-6


def test_chunks_of_one_tensor_are_read_in_place():
    qkv = torch.randn(2, 24, 7, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    temperature = torch.ones(2, 1, 1)
    with mirage_kernels.use("cpp"):
        (grad,) = torch.autograd.grad(public(*qkv.chunk(3, 1), temperature).square().sum(), qkv)
    exact = qkv.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(plain(*exact.chunk(3, 1), temperature.double()).square().sum(), exact)
    assert relative_error(grad, truth) < 1e-6


@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_temperature(impl, dtype):
    """A parameter stays float32 beside 16-bit maps: the result has their dtype, the gradient that of the parameter."""
    require(impl)
    q, k, v, temperature = (t.to(device_of(impl)) for t in _inputs((2, 8, 5, 7, 2), dtype))
    temperature = temperature.float().requires_grad_()
    with mirage_kernels.use(impl):
        out = public(q, k, v, temperature)
    assert out.dtype == dtype
    (grad,) = torch.autograd.grad(out.float().square().sum(), temperature)
    assert grad.dtype == torch.float32 and grad.shape == (2, 1, 1)


def test_temperature_of_one_dimension():
    q, k, v, temperature = _inputs((1, 8, 3, 3, 2))
    flat = temperature.flatten().requires_grad_()
    with mirage_kernels.use("cpp"):
        out = public(q, k, v, flat)
        assert torch.equal(out, public(q, k, v, temperature))
        (grad,) = torch.autograd.grad(out.sum(), flat)
    assert grad.shape == (2,)


@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
def test_pixels_of_zero_norm(impl):
    """A zero plane is divided by eps, as F.normalize does: uniform weights, and finite gradients beside it."""
    require(impl)
    q, k, v, temperature = (t.to(device_of(impl)) for t in _inputs((1, 8, 5, 7, 1), torch.float32))
    q[:, 3], k[:, 5] = 0, 0
    inputs = [t.requires_grad_() for t in (q, k, v, temperature)]
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    with mirage_kernels.use(impl):
        ours = torch.autograd.grad(public(*inputs), inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(plain(*exact), exact, grad.double())
    for value, peer in zip(ours, truth, strict=True):
        assert relative_error(value, peer) < 1e-6


def _of_all(function, inputs, grad):
    """The result and the gradients of q, k, v and the temperature, in float64."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [t.double() for t in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out)))]


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0, 1e-4, 500])
def test_planes_whose_squares_float16_has_not(size, dtype, impl):
    """Zero, tiny and large: as far from float64 as ordinary values are."""
    require(impl)
    errors = []
    for scale in (1, size):
        q, k, v, temperature = _inputs((1, 8, 24, 40, 2), torch.float32)
        inputs = [(q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype), temperature.to(dtype)]
        grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        with mirage_kernels.use(impl):
            results = _of_all(public, inputs, grad)
        truth = _of_all(plain, [t.double() for t in inputs], grad)
        assert all(value.isfinite().all() for value in results)
        errors.append([relative_error(results[i], truth[i]) for i in (0, 3)])  # y and the gradient of v
    assert all(e <= max(2 * usual, 1.5 * torch.finfo(dtype).eps) for e, usual in zip(*errors[::-1], strict=True))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("side", [512, 2048])
def test_large_plain_planes(side, impl):
    """Cosines of 1 and -1, whose softmax a norm's error reaches undiminished: with PyTorch's norm 1e-4 and 1e-3."""
    require(impl)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0]).view(1, 4, 1, 1)
    q, k = signs * torch.full((1, 4, side, side), 0.7), -signs * torch.full((1, 4, side, side), 0.3)
    v, temperature = torch.arange(1.0, 5.0).view(1, 4, 1, 1).expand_as(q), torch.full((1,), 2.0)
    with mirage_kernels.use(impl):
        out = public(q, k, v, temperature)
    assert relative_error(out, plain(*(t.double() for t in (q, k, v, temperature)))) < 1e-6


@pytest.mark.parametrize("side", [512, 2048])
def test_norms_of_large_plain_planes_in_the_composite(side):
    q, k, nothing = torch.full((1, 2, side, side), 0.7), torch.full((1, 2, side, side), 0.3), torch.zeros(())
    fusion = _composite.Fusion(q, k, k, torch.ones(1), q, k, (nothing, nothing, nothing))
    _, matrices = _composite.fuse(fusion, "composite")  # [1, 1, 2 d + 2, d], |q| and |k| last
    exact = torch.stack([t.double().flatten(2).norm(dim=-1) for t in (q, k)], 1)
    assert relative_error(matrices[0, 0, -2:], exact[0]) < 5e-7


def test_errors_name_the_argument():
    q, temperature = torch.zeros(1, 6, 2, 2), torch.ones(2, 1, 1)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the 6 channels of q, got 4"):
        channel_attention(q, q, q, temperature, 4)
    with pytest.raises(TypeError, match="num_heads: expected an int, got float"):
        channel_attention(q, q, q, temperature, 2.0)
    with pytest.raises(ValueError, match=r"temperature: expected shape \[2, 1, 1\] or \[2\].*got \[3, 1, 1\]"):
        channel_attention(q, q, q, torch.ones(3, 1, 1), 2)
    with pytest.raises(ValueError, match=r"k: expected shape \[1, 6, 2, 2\].*got \[1, 6, 2, 3\]"):
        channel_attention(q, torch.zeros(1, 6, 2, 3), q, temperature, 2)
    with pytest.raises(TypeError, match="v: expected torch.float32 like q, got torch.float64"):
        channel_attention(q, q, q.double(), temperature, 2)
