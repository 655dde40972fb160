import pytest
import torch
import torch.nn.functional as F
from harness import Operator, OperatorTests, relative_error, require
from torch.utils.flop_counter import FlopCounterMode

import mirage_kernels
from mirage_kernels import dense_conv2d
from mirage_kernels.dense_conv2d import reference

SHAPES = {
    # batch, channels, outputs, height, width, kernel size
    "typical": (2, 6, 10, 9, 13, 3),
    "pixel": (1, 3, 4, 1, 1, 3),
    "row": (1, 5, 3, 1, 37, 3),
    "column": (2, 2, 7, 19, 1, 3),
    "one_to_one": (1, 1, 1, 16, 16, 3),
    "image_in": (1, 3, 24, 12, 20, 3),
    "image_out": (1, 24, 3, 20, 12, 3),
    "deep": (1, 96, 20, 7, 8, 3),
    "mix": (2, 9, 5, 6, 11, 1),
    "mix_pixel": (1, 2, 8, 1, 1, 1),
    "tiles": (1, 30, 12, 67, 131, 3),
    "empty": (0, 6, 10, 9, 13, 3),
    "large": (1, 2, 3, 1024, 1024, 3),
}


def make(case, generator):
    batch, channels, outputs, height, width, size = SHAPES[case]
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, channels, size, size, generator=generator, dtype=torch.float64)
    return x, weight / (channels * size * size) ** 0.5


def inputs_for(case, dtype=torch.float32):
    return [t.to(dtype).requires_grad_() for t in make(case, torch.Generator().manual_seed(0))]


class TestDenseConv2d(OperatorTests):
    operator = Operator(
        name="dense_conv2d",
        public=dense_conv2d,
        reference=reference,
        make=make,
        arguments=("x", "weight"),
        shapes=tuple(case for case in SHAPES if case not in ("empty", "large")),
        empty="empty",
        large="large",
    )
    implementations = ("cpp",)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_count_of_channels(size, dtype):
    """Rests of the blocks of registers and of the pairs of channels, in both roles."""
    require("cpp")
    generator = torch.Generator().manual_seed(0)
    for channels in range(1, 15):
        outputs = 15 - channels
        x = torch.randn(1, channels, 5, 9, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(outputs, channels, size, size, generator=generator).to(dtype).requires_grad_()
        with mirage_kernels.use("cpp"):
            value = dense_conv2d(x, weight)
        exact = reference(x.double(), weight.double())
        grad = torch.randn(value.shape, generator=generator).to(dtype)
        results = (value, *torch.autograd.grad(value, (x, weight), grad))
        truth = (exact, *torch.autograd.grad(exact, (x, weight), grad.double()))
        for result, expected in zip(results, truth, strict=True):
            assert relative_error(result, expected) < 4 * torch.finfo(dtype).eps


def test_long_sums_keep_their_accuracy():
    """2304 products an output: the error may not grow with them as in one running sum."""
    require("cpp")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(1, 256, 16, 16, generator=generator), torch.rand(8, 256, 3, 3, generator=generator)
    with mirage_kernels.use("cpp"):
        value = dense_conv2d(x, weight)
    exact = reference(x.double(), weight.double())
    assert relative_error(value, exact) <= 1e-6
    assert relative_error(value, exact) <= 2 * relative_error(reference(x, weight), exact)


def test_weight_of_any_strides():
    require("cpp")
    x, weight = inputs_for("typical")
    strided = weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with mirage_kernels.use("cpp"):
        assert torch.equal(dense_conv2d(x, strided), dense_conv2d(x, weight))


def test_only_x_and_weight_are_saved():
    require("cpp")
    x, weight = inputs_for("typical")
    saved = []
    with mirage_kernels.use("cpp"), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        dense_conv2d(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


def test_where_the_library_does_not_run_it_is_the_convolution_of_pytorch(monkeypatch):
    x, weight = inputs_for("typical")
    monkeypatch.setattr(mirage_kernels._dispatch, "_default", {"cpu": "triton"})
    value = dense_conv2d(x, weight)
    assert mirage_kernels.last_used("dense_conv2d") == "torch"
    assert torch.equal(value, F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("case", ["typical", "mix"])
def test_flops_are_counted(case):
    require("cpp")
    x, weight = inputs_for(case)
    with FlopCounterMode(display=False) as ours, mirage_kernels.use("cpp"):
        y = dense_conv2d(x, weight)
    with FlopCounterMode(display=False) as peer:
        reference(x, weight)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert ours.get_total_flops() == peer.get_total_flops() > 0
    assert backward.get_total_flops() == 2 * ours.get_total_flops()


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
