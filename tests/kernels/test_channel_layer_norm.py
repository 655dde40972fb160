import pytest
import torch
from harness import Operator, OperatorTests, relative_error

import mirage_kernels
from mirage_kernels import channel_layer_norm
from mirage_kernels.channel_layer_norm import reference


def make(shape, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.5
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    return x, weight + 1, bias


class TestChannelLayerNorm(OperatorTests):
    operator = Operator(
        name="channel_layer_norm",
        public=channel_layer_norm,
        reference=reference,
        make=make,
        arguments=("x", "weight", "bias"),
        shapes=(
            (2, 6, 5, 7),
            (1, 5, 1, 1),
            (1, 3, 1, 13),
            (2, 24, 11, 1),
            (1, 30, 16, 17),
            (3, 97, 3, 3),
            (1, 24, 33, 47),
        ),
        empty=(0, 6, 5, 7),
        large=(1, 6, 1024, 1024),
        alias=("weight", "bias"),
    )


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wider_weights_promote(x_dtype):
    """As in the reference under autocast: a 16-bit x and float32 parameters give float32."""
    x, weight, bias = (t.float() for t in make((2, 6, 5, 7), torch.Generator().manual_seed(0)))
    x = x.to(x_dtype).requires_grad_()
    wide = torch.float64 if x_dtype == torch.float32 else torch.float32
    weight, bias = weight.to(wide).requires_grad_(), bias.to(wide).requires_grad_()
    with mirage_kernels.use("cpp"):
        y = channel_layer_norm(x, weight, bias)
    exact = reference(x.double(), weight.double(), bias.double())
    assert y.dtype == wide
    assert relative_error(y, exact) < 2e-7
    grad_x, grad_weight, _ = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert grad_x.dtype == x_dtype and grad_weight.dtype == wide


def test_large_offset_is_centred_first():
    """Mean 200, deviation 0.01: E[x^2] - E[x]^2 would lose everything."""
    x = 200 + 0.01 * torch.randn(1, 24, 9, 9, generator=torch.Generator().manual_seed(0))
    ones, zeros = torch.ones(24), torch.zeros(24)
    with mirage_kernels.use("cpp"):
        error = relative_error(channel_layer_norm(x, ones, zeros), reference(x.double(), ones, zeros))
    assert error <= 2 * relative_error(reference(x, ones, zeros), reference(x.double(), ones, zeros))


def test_errors_name_the_argument():
    x, weight = torch.zeros(1, 4, 2, 2), torch.zeros(4)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[4, 2, 2\]"):
        channel_layer_norm(x[0], weight, weight)
    with pytest.raises(ValueError, match=r"weight: expected shape \[4\].*got \[3\]"):
        channel_layer_norm(x, weight[:3], weight)
    with pytest.raises(TypeError, match="x: expected float32.*got torch.int64"):
        channel_layer_norm(x.long(), weight, weight)
    with pytest.raises(TypeError, match="bias: expected torch.float32 like weight, got torch.float64"):
        channel_layer_norm(x, weight, weight.double())
    with pytest.raises(TypeError, match="weight: expected a tensor, got NoneType"):
        channel_layer_norm(x, None, weight)
