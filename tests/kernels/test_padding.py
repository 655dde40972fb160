"""A pixel that is not finite harms what it is multiplied with and nothing else: not the sums in which it only meets the
zeros that a kernel keeps around a plane, or behind the last pixel of a line. Zero times infinity is NaN.

Truth is the reference in float64 on convolutions without padding. PyTorch's own multiply it or not, as their algorithm
demands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from harness import device_of, implementations, require
from torch import Tensor

import mirage_kernels

IMPLEMENTATIONS = ("cpp",)
# [height, width]: ends of strips, tiles and vectors; planes that are smaller than the kernel
PLANES = ((9, 11), (6, 16), (20, 33), (70, 5), (1, 1), (1, 18), (17, 1), (2, 2))
OPERATORS: dict[str, tuple[str, Callable[[int, int], tuple[int, ...]]]] = {
    "dense_conv2d": ("dense_conv2d", lambda height, width: (1, 3, height, width, 5, 3)),
    "dynamic_depthwise_conv2d 3x3": ("dynamic_depthwise_conv2d", lambda height, width: (1, 2, height, width, 3)),
    "dynamic_depthwise_conv2d 7x7": ("dynamic_depthwise_conv2d", lambda height, width: (1, 2, height, width, 7)),
    "dynamic_depthwise_conv2d 11x11": ("dynamic_depthwise_conv2d", lambda height, width: (1, 1, height, width, 11)),
    "gated_depthwise_ffn": ("gated_depthwise_ffn", lambda height, width: (1, 4, height, width)),
    "feed_forward_stage": ("feed_forward_stage", lambda height, width: (1, 3, height, width)),
    "mixer_stage": ("mixer_stage", lambda height, width: (1, 6, height, width, 1)),
}


def convolve_without_padding(
    x: Tensor, weight: Tensor, bias: None = None, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Tensor:
    """F.conv2d of kernels that are centred on their pixel, tap by tap over the pixels that have one."""
    (batch, channels, height, width), (outputs, inputs, size, _) = x.shape, weight.shape
    x = x.reshape(batch, groups, 1, channels // groups, height, width)
    weight = weight.reshape(groups, outputs // groups, inputs, size, size, 1, 1)
    y = x.new_zeros(batch, groups, outputs // groups, height, width)
    for row in range(-(size // 2), size // 2 + 1):
        for column in range(-(size // 2), size // 2 + 1):
            if abs(row) >= height or abs(column) >= width:
                continue
            taps = x[..., max(row, 0) : height + min(row, 0), max(column, 0) : width + min(column, 0)]
            product = (weight[..., row + size // 2, column + size // 2, :, :] * taps).sum(3)
            y = y + F.pad(product, (max(-column, 0), max(column, 0), max(-row, 0), max(row, 0)))
    return y.reshape(batch, outputs, height, width)


def evaluate(function: Callable[..., Tensor], tensors: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad_output)]


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: "x".join(map(str, plane)))
@pytest.mark.parametrize("name", OPERATORS)
def test_a_pixel_that_is_not_finite_never_meets_the_padding(name, plane, impl, monkeypatch):
    require(impl)
    height, width = plane
    places = {(row, column) for row in (0, height // 2, height - 1) for column in (0, width // 2, width - 1)}
    for dtype in (torch.float32, torch.bfloat16):
        for place in sorted(places):
            for poison in (float("nan"), float("inf")):
                for poisoned in ("x", "grad_output"):
                    assert_padding_is_not_met(name, plane, impl, dtype, place, poison, poisoned, monkeypatch)


@lru_cache(maxsize=1)
def healthy_case(name, plane, impl, dtype):
    """The operator, its inputs and a gradient of its output."""
    module, shape = OPERATORS[name]
    operator = import_module(f"mirage_kernels.{module}.cases").CASES[0]
    inputs = [t.detach() for t in operator.inputs(shape(*plane), dtype, device_of(impl))]
    torch.manual_seed(0)
    with torch.no_grad():
        return operator, inputs, torch.rand_like(operator.reference(*inputs)) + 0.5


def assert_padding_is_not_met(name, plane, impl, dtype, place, poison, poisoned, monkeypatch):
    operator, inputs, grad_output = healthy_case(name, plane, impl, dtype)
    tensors, grad_output = [inputs[0].clone(), *inputs[1:]], grad_output.clone()
    (tensors[0] if poisoned == "x" else grad_output)[0, 0, place[0], place[1]] = poison
    with mirage_kernels.use(impl):
        results = evaluate(operator.public, tensors, grad_output)
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", convolve_without_padding)
        exact = evaluate(operator.reference, [t.double().cpu() for t in tensors], grad_output.double().cpu())
    for result, value, truth in zip(("output", *operator.arguments), results, exact, strict=True):
        where = f"{result} with {poison} in {poisoned} at {place}, {dtype}"
        healthy = truth.isfinite()
        assert torch.equal(value.isfinite().cpu(), healthy), where
        scale = truth[healthy].abs().max().item() if healthy.any() else 1.0
        bound = (1e-5 if dtype == torch.float32 else 2e-2) * max(scale, 1e-3)
        error = (value.double().cpu()[healthy] - truth[healthy]).abs()
        assert not error.numel() or error.max() <= bound, where


ON_GPU_PLANES = {  # ends of groups, strips and tiles; planes that are smaller than the kernel
    ("triton", "gated_depthwise_ffn"): ((17, 18), (3, 16), (1, 2)),
    ("triton", "feed_forward_stage"): ((6, 17), (1, 2)),
    ("triton", "dynamic_depthwise_conv2d 3x3"): ((17, 18), (36, 33), (1, 2)),
    ("triton", "dynamic_depthwise_conv2d 7x7"): ((20, 17), (1, 2)),
    ("cuda", "dynamic_depthwise_conv2d 3x3"): ((33, 34), (1, 2)),
    ("cuda", "dynamic_depthwise_conv2d 7x7"): ((70, 67), (40, 5), (1, 2)),
    ("cuda", "dynamic_depthwise_conv2d 11x11"): ((33, 36), (4, 31)),
}


@pytest.mark.parametrize(("impl", "name", "plane"), [
    (*which, plane) for which, planes in ON_GPU_PLANES.items() for plane in planes
])  # fmt: skip
def test_kernels_for_gpus_never_meet_the_padding(impl, name, plane, monkeypatch):
    """As above in float32, at corners and in the middle: the interpreter and the emulation are slow."""
    require(impl)
    height, width = plane
    for place in sorted({(0, 0), (height - 1, width - 1), (0, width - 1), (height // 2, 0), (height - 1, width // 2)}):
        for poison, poisoned in ((float("inf"), "x"), (float("nan"), "grad_output")):
            assert_padding_is_not_met(name, plane, impl, torch.float32, place, poison, poisoned, monkeypatch)


@pytest.mark.parametrize("groups", [1, 2])
def test_without_padding_is_the_convolution_where_all_is_finite(groups):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, 7, 7, generator=generator, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=3, groups=groups)
    assert torch.allclose(convolve_without_padding(x, weight, padding=3, groups=groups), expected, rtol=1e-12)
