"""mirage.fast.Conv2d: which convolutions outside blocks run on operators, and that they compute the same."""

import copy

import pytest
import torch
from harness import operators, require
from same_networks import check_same
from torch import nn

import mirage
import mirage.fast
from mirage.fast import modules, strips


def accelerated(conv: nn.Conv2d) -> nn.Module:
    """A copy, from a network in which something else is recognised: convolutions alone are left alone."""
    network = nn.Sequential(mirage.blocks.LayerNorm(conv.in_channels).to(conv.weight.dtype), copy.deepcopy(conv))
    return mirage.fast.accelerate(network)[1]


@pytest.mark.parametrize(("inputs", "outputs", "size"), [(3, 6, 3), (6, 4, 3), (6, 7, 1)])
def test_convolutions_with_a_bias(inputs, outputs, size):
    """Where PyTorch's take long: on either side of a network, and of single pixels."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2).double()
    fast = accelerated(conv)
    x = torch.rand(2, inputs, 9, 11, dtype=torch.float64)
    assert type(fast) is mirage.fast.Conv2d
    assert operators(lambda: fast(x)) == ["dense_conv2d"]
    check_same(conv, fast, x)


def test_an_image_of_one_pixel_is_no_matter_for_an_operator():
    """As behind a global average: the call would take longer than the product."""
    network = nn.Sequential(mirage.blocks.LayerNorm(6), nn.Conv2d(6, 5, 1, bias=False), nn.Conv2d(5, 4, 1))
    fast, x = mirage.fast.accelerate(copy.deepcopy(network)), torch.rand(3, 6, 1, 1)
    assert operators(lambda: fast(x)) == ["channel_layer_norm"]
    torch.testing.assert_close(fast(x), network(x))


@pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "bias"])
def test_convolutions_that_halve_large_images(bias, monkeypatch):
    """Of squares of 2x2 pixels side by side, where no gradient is wanted."""
    require("cpp")
    conv = nn.Conv2d(6, 9, 2, stride=2, bias=bias).double()
    fast = accelerated(conv)
    x = torch.rand(2, 6, 8, 12, dtype=torch.float64)
    check_same(conv, fast, x)
    with torch.no_grad():
        assert type(fast) is mirage.fast.Conv2d and not operators(lambda: fast(x))
        monkeypatch.setattr(strips, "LARGE_FROM", 1)
        for image in (x, x.transpose(2, 3), x.to(memory_format=torch.channels_last)):
            assert operators(lambda image=image: fast(image)) == ["dense_conv2d"]
            torch.testing.assert_close(fast(image), conv(image), rtol=1e-12, atol=1e-13)
        odd = x[..., :-1]
        assert operators(lambda: fast(odd)) == ["dense_conv2d"]
        torch.testing.assert_close(fast(odd), conv(odd), rtol=1e-12, atol=1e-13)
        with pytest.raises(RuntimeError, match="can't be greater than actual input size"):
            fast(x[:, :, :1])
    assert not operators(lambda: fast(x)), "the copy would be kept for backward"


CONVOLUTIONS = {
    "halving": lambda: nn.Conv2d(6, 9, 2, stride=2, bias=False),
    "halving, with a bias": lambda: nn.Conv2d(6, 9, 2, stride=2),
    "3x3 of many channels, with a bias": lambda: nn.Conv2d(6, 9, 3, padding=1),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
class TestConvolutionsThatPyTorchHasLoopsFor:
    """Of half precision, on CPUs without instructions for it. In float32 PyTorch's are as fast or keep less."""

    @pytest.fixture
    def fast(self, make) -> nn.Module:
        require("cpp")
        torch.manual_seed(0)
        return accelerated(make())

    def test_gradients(self, fast, make, monkeypatch):
        conv = make().double()
        conv.load_state_dict(fast.double().state_dict())
        x = torch.rand(2, 6, 9, 11, dtype=torch.float64)
        monkeypatch.setattr(modules, "LOOPED", frozenset())
        assert not operators(lambda: fast(x))
        check_same(conv, fast, x)
        monkeypatch.setattr(modules, "LOOPED", {torch.float64})
        assert operators(lambda: fast(x)) == ["dense_conv2d"]
        check_same(conv, fast, x)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, fast, make, dtype, monkeypatch):
        monkeypatch.setattr(modules, "LOOPED", {dtype})
        x = torch.rand(2, 6, 8, 12)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            assert operators(lambda: fast(x)) == ["dense_conv2d"]
            under_autocast = fast(x)
        halved, rounded = fast.to(dtype), x.to(dtype)
        assert operators(lambda: halved(rounded)) == ["dense_conv2d"]
        truth = copy.deepcopy(halved).double()(rounded.double())
        for found in (under_autocast, halved(rounded)):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=0.02)


def test_pytorch_says_which_dtypes_it_has_loops_for():
    """By functions of its own whose names may change: then all of half precision would be taken from it."""
    assert all(type(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()) is bool for name in ("bf16", "fp16"))


@pytest.mark.parametrize("size", [3, 7, 11])
@pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "bias"])
def test_depthwise_convolutions(size, bias):
    """Outside of blocks, in whatever network has something that is recognised."""
    conv = nn.Conv2d(6, 6, size, padding=size // 2, groups=6, bias=bias).double()
    fast = accelerated(conv)
    x = torch.rand(2, 6, 13, 13, dtype=torch.float64)
    assert type(fast) is mirage.fast.Conv2d
    assert operators(lambda: fast(x)) == ["dynamic_depthwise_conv2d"]
    check_same(conv, fast, x)
    with torch.autocast("cpu"):
        assert fast.float()(x.float()).dtype == torch.bfloat16


def test_convolutions_that_are_left_alone():
    """Two inputs for each output, a stride, and an even size are something else."""
    others = (
        nn.Conv2d(6, 3, 3, padding=1, groups=3, bias=False),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, stride=2),
        nn.Conv2d(6, 6, 4, padding=2, groups=6),
    )
    network = mirage.fast.accelerate(nn.Sequential(mirage.blocks.LayerNorm(6), *others))
    assert all(type(conv) is nn.Conv2d for conv in network[1:])
