"""The kinds of norm that stages begin with: PyTorch's definition, and the composite's formulas and gradients."""

import pytest
import torch
import torch.nn.functional as F

from mirage.networks.restormer import BiasFreeLayerNorm
from mirage_kernels import _composite
from mirage_kernels._runtime.norms import NORMS, channel_norm, check_norm


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 7, 5, 3), (7,), (7,), (2, 7, 5, 3)
    x, weight, bias, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return (2 * x + 3).to(dtype), (1 + 0.2 * weight).to(dtype), (0.2 * bias).to(dtype), grad.to(dtype)


def test_the_definitions():
    x, weight, bias, _ = tensors()
    expected = F.layer_norm(x.movedim(1, 3), (7,), weight, bias, 1e-5).movedim(3, 1)
    torch.testing.assert_close(channel_norm(x, weight, bias, 1e-5, "centred"), expected)
    without = channel_norm(x, weight, None, 1e-5, "centred")
    torch.testing.assert_close(without + bias.view(1, -1, 1, 1), expected)
    module = BiasFreeLayerNorm(7).double()
    module.body.weight.data.copy_(weight)
    torch.testing.assert_close(channel_norm(x, weight, None, 1e-5, "uncentred"), module(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("impl", ["composite", "cpp"])
def test_the_composite(norm, with_bias, impl):
    x, weight, bias, grad = (t.requires_grad_() for t in tensors())
    if not with_bias:
        bias = None
    expected = channel_norm(x, weight, bias, 1e-5, norm)
    of = [t for t in (x, weight, bias) if t is not None]
    gradients = torch.autograd.grad(expected, of, grad)
    with torch.no_grad():
        y, mean, rstd = _composite.layer_norm(x, weight, bias, 1e-5, impl, norm)
        found = _composite.layer_norm_backward(grad, x, weight, mean, rstd, impl, norm)
    torch.testing.assert_close(y, expected)
    for value, exact in zip(found, gradients, strict=False):
        torch.testing.assert_close(value, exact)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="norm: expected one of 'centred', 'uncentred', got 'rms'"):
        check_norm("rms")
