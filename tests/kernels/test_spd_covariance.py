import pytest
import torch
from harness import (
    OperatorTests,
    device_of,
    evaluate,
    implementations,
    in_float64,
    relative_error,
    require,
    slowly,
)

import mirage_kernels
from mirage_kernels import spd_covariance
from mirage_kernels.spd_covariance import cases, reference

IMPLEMENTATIONS = ("cpp", "triton", "cuda")


class TestSpdCovariance(OperatorTests):
    (operator,) = cases.CASES


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("shape", [(2, 12, 33, 29), (1, 24, 16, 16)])
def test_large_offset_loses_nothing(impl, shape):
    """Mean 200, deviation 0.01: E[x x^T] - E[x] E[x]^T would lose everything, of the result and of the gradient."""
    require(impl)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = (200 + 0.01 * noise).to(device_of(impl)).requires_grad_()
    grad = torch.randn(shape[0], shape[1], shape[1], generator=torch.Generator().manual_seed(1)).to(x.device)
    with mirage_kernels.use(impl):
        results = evaluate(spd_covariance, [x], grad)
    truth = evaluate(reference, [x.detach().double().cpu().requires_grad_()], grad.double().cpu())
    eager = evaluate(reference, [x], grad)
    for value, peer, exact in zip(results, eager, truth, strict=True):
        assert relative_error(value, exact) <= 2 * relative_error(peer, exact)


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_exactly_symmetric_and_positive_definite(impl):
    require(impl)
    x = torch.randn(2, 24, 9, 11, generator=torch.Generator().manual_seed(0)).to(device_of(impl))
    x[:, 5] = x[:, 4]  # a singular covariance, which eps makes positive definite
    with mirage_kernels.use(impl):
        y = spd_covariance(x, eps=1e-2)
    assert torch.equal(y, y.mT)
    assert torch.linalg.eigvalsh(y.double()).min() > 0.99e-2


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 5, 3, 2, 4)])
def test_any_trailing_shape(impl, shape):
    require(impl)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device_of(impl)).requires_grad_()
    with mirage_kernels.use(impl):
        value = evaluate(spd_covariance, [x])
        flat = evaluate(lambda t: spd_covariance(t.flatten(2).unsqueeze(3)), [x])
    assert value[1].shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip(value, flat, strict=True))
    assert relative_error(value[0], reference(x.detach().double())) < 1e-6


@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
def test_many_channels_and_chunks(impl):
    """More chunks than units of work, more channels than a chunk's cache has room for, a tail in every dimension."""
    require(impl)
    channels, height = (67, 29) if slowly(impl) else (131, 83)
    x = torch.randn(1, channels, height, 97, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 50, 97)
    x = x.to(device_of(impl)).requires_grad_()
    with mirage_kernels.use(impl):
        results = evaluate(spd_covariance, [x])
    truth = evaluate(reference, in_float64([x]))
    assert all(relative_error(a, b) < 5e-7 for a, b in zip(results, truth, strict=True))


@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
@pytest.mark.parametrize("channels", [16, 17, 33])
def test_first_pixel_is_an_outlier(impl, channels):
    """No mean is counted from it."""
    require(impl)
    x = torch.randn(1, channels, 19, 31, generator=torch.Generator().manual_seed(0)).to(device_of(impl))
    x[0, :, 0, 0] = 1000
    x.requires_grad_()
    with mirage_kernels.use(impl):
        results = evaluate(spd_covariance, [x])
    truth = evaluate(reference, in_float64([x]))
    assert all(relative_error(a, b) < 5e-7 for a, b in zip(results, truth, strict=True))

def test_half_precision_under_the_other_autocast():
    """The reference's bfloat16 product plus its float16 identity is float32."""
    x = torch.randn(1, 4, 3, 3).half()
    with torch.autocast("cpu", torch.bfloat16), mirage_kernels.use("cpp"):
        assert spd_covariance(x).dtype == reference(x).dtype == torch.float32


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"x: expected at least 2 positions .*got shape \[1, 4, 1, 1\]"):
        spd_covariance(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"x: expected \[B, C, ...\].*got shape \[4, 9\]"):
        spd_covariance(torch.zeros(4, 9))
    with pytest.raises(TypeError, match="x: expected float32.*got torch.int64"):
        spd_covariance(torch.zeros(1, 4, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x: expected a tensor, got NoneType"):
        spd_covariance(None)
