import pytest
import torch
import torch.nn.functional as F
from harness import (
    ON_GPU,
    OperatorTests,
    assert_as_good_as_eager,
    device_of,
    evaluate,
    implementations,
    in_float64,
    relative_error,
    require,
)

import mirage_kernels
from mirage_kernels import gated_depthwise_ffn
from mirage_kernels.gated_depthwise_ffn import cases, reference

IMPLEMENTATIONS = ("cpp", "triton", "cuda")


def inputs_for(shape, dtype=torch.float32, device="cpu"):
    return [t.to(device, dtype) for t in cases.make(shape, torch.Generator().manual_seed(0))]


def reference_without_fma(h, weight):
    """The reference with every product rounded before it is added, as in Triton's interpreter."""
    a, (height, width) = F.pad(F.gelu(h), (1, 1, 1, 1)), h.shape[2:]
    taps = ((y, x) for y in range(3) for x in range(3))
    d = sum(a[:, :, y : y + height, x : x + width] * weight[:, 0, y, x].view(1, -1, 1, 1) for y, x in taps)
    first, second = d.chunk(2, 1)
    return F.gelu(first) * second


class TestGatedDepthwiseFfn(OperatorTests):
    (operator,) = cases.CASES

    def test_extremes(self, impl):
        native = mirage_kernels._runtime.dispatch.native
        baseline = impl == "cpp" and native is not None and native.cpu_isa() == "baseline"
        if (impl == "triton" and device_of(impl) == "cpu") or baseline:  # SSE2 has no fused multiply-add either
            self.reference = reference_without_fma
        super().test_extremes(impl)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, impl, poison):
        """As float64 eager does: float32 eager's vectorised erf makes NaN of gelu(inf), on some processors only."""
        h, weight = inputs_for((2, 6, 5, 7), device=device_of(impl))
        h.view(-1)[h.numel() // 2 + 17] = poison
        value, peer = gated_depthwise_ffn(h, weight), reference(h.double().cpu(), weight.double().cpu())
        value = value.cpu().double()
        assert torch.equal(value.isnan(), peer.isnan()) and torch.equal(value.isinf(), peer.isinf())
        assert not peer.isfinite().all()
        healthy = peer.isfinite()
        assert torch.allclose(value[healthy], peer[healthy], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_weight_without_the_group_dimension(impl):
    require(impl)
    h, weight = inputs_for((1, 4, 4, 5), device=device_of(impl))
    with mirage_kernels.use(impl):
        expected = gated_depthwise_ffn(h, weight)
        short = weight[:, 0].clone().requires_grad_()
        value = gated_depthwise_ffn(h, short)
        (gradient,) = torch.autograd.grad(value.sum(), short)
    assert torch.equal(value, expected) and gradient.shape == (4, 3, 3)
    assert torch.equal(reference(h, short), reference(h, weight))


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_weight_of_any_strides(impl):
    require(impl)
    h, weight = inputs_for((1, 4, 4, 5), device=device_of(impl))
    strided = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with mirage_kernels.use(impl):
        assert torch.equal(gated_depthwise_ffn(h, strided), gated_depthwise_ffn(h, weight))


@pytest.mark.parametrize("size", [(34, 36), (33, 64), (65, 8), (5, 68), (12, 35)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_that_meet_and_tiles_that_end(size, dtype):
    """Several samples and tiles, whole and not; lines whose fours can be loaded at once, and others."""
    require("cuda")
    inputs = [t.requires_grad_() for t in inputs_for((2, 4, *size), dtype, device_of("cuda"))]
    with mirage_kernels.use("cuda"):
        results = evaluate(gated_depthwise_ffn, inputs)
    eager, truth = evaluate(reference, inputs), evaluate(reference, in_float64(inputs))
    assert_as_good_as_eager(dtype, results, eager, truth)


@pytest.mark.skipif(ON_GPU, reason="a GPU runs them in its own order")
def test_threads_may_run_in_any_order():
    """Between two barriers: one that is missing would show."""
    require("cuda")
    library, results = mirage_kernels._runtime.dispatch.cuda, []
    inputs = [t.requires_grad_() for t in inputs_for((2, 4, 34, 36))]
    try:
        for order in ("forward", "backward", "shuffled"):
            library.set_order(order)
            with mirage_kernels.use("cuda"):
                results.append(evaluate(gated_depthwise_ffn, inputs))
    finally:
        library.set_order("forward")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("place", [(0, 0), (4, 6), (2, 3), (0, 6), (4, 0), (0, 3)])
def test_infinity_stays_in_the_taps_it_meets(place):
    """Tiles reach past the plane; neither an infinite pixel nor its gradient must become NaN by the zeros there."""
    require("cuda")
    h, weight = (t.requires_grad_() for t in inputs_for((1, 2, 5, 7), device=device_of("cuda")))
    with torch.no_grad():
        h[0, 1, place[0], place[1]] = float("inf")
    grad = torch.rand_like(h[:, :1]) + 0.5
    with mirage_kernels.use("cuda"):
        value, weight_grad = torch.autograd.grad(gated_depthwise_ffn(h, weight), (h, weight), grad)
    h, weight, grad = (t.detach().double().cpu() for t in (h, weight, grad))  # float32 eager may make NaN of gelu(inf)
    a = F.gelu(h)
    d = F.conv2d(a, weight, padding=1, groups=2)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(d[:, :1]), d[:, :1])
    grads = torch.cat((grad * d[:, 1:] * slope, grad * F.gelu(d[:, :1])), 1)
    exact = torch.zeros_like(weight)
    for row in range(3):
        for column in range(3):
            here = [slice(max(1 - i, 0), n + min(1 - i, 0)) for i, n in ((row, 5), (column, 7))]
            there = [slice(max(i - 1, 0), n + min(i - 1, 0)) for i, n in ((row, 5), (column, 7))]
            met = grads[0, :, here[0], here[1]] * a[0, :, there[0], there[1]]
            exact[:, 0, row, column] = met.sum((1, 2))
    assert torch.allclose(weight_grad.double().cpu(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert weight_grad[1].isinf().any() and not weight_grad[1].isnan().any()
    assert value[0, 1].isnan().sum() == 1  # the slope of the infinite pixel


def test_strips_meet_without_a_seam():
    """Few channels and many rows: the plane is cut into strips, each with rows that its neighbour computes too."""
    h, weight = (t.requires_grad_() for t in inputs_for((1, 2, 300, 33), torch.float64))
    with mirage_kernels.use("cpp"):
        value = gated_depthwise_ffn(h, weight)
    exact = reference(h, weight)
    grad = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = [value, *torch.autograd.grad(value, (h, weight), grad)]
    truth = [exact, *torch.autograd.grad(exact, (h, weight), grad)]
    for result, expected in zip(results, truth, strict=True):
        assert relative_error(result, expected) < 1e-14


def test_only_h_and_weight_are_saved():
    h, weight = (t.requires_grad_() for t in inputs_for((1, 4, 6, 6)))
    saved = []
    with mirage_kernels.use("cpp"), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        gated_depthwise_ffn(h, weight)
    assert {t.data_ptr() for t in saved} <= {h.data_ptr(), weight.data_ptr()}

def test_errors_name_the_argument():
    h, weight = torch.zeros(1, 4, 3, 3), torch.zeros(4, 1, 3, 3)
    with pytest.raises(ValueError, match=r"h: expected 4 dimensions, got shape \[4, 3, 3\]"):
        gated_depthwise_ffn(h[0], weight)
    with pytest.raises(ValueError, match=r"h: expected an even number of channels.*\[1, 3, 3, 3\]"):
        gated_depthwise_ffn(h[:, :3], weight[:3])
    with pytest.raises(ValueError, match=r"weight: expected shape \[4, 1, 3, 3\].*got \[4, 1, 5, 5\]"):
        gated_depthwise_ffn(h, torch.zeros(4, 1, 5, 5))
    with pytest.raises(TypeError, match="weight: expected torch.float32 like h, got torch.float64"):
        gated_depthwise_ffn(h, weight.double())
    with pytest.raises(TypeError, match="h: expected float32.*got torch.int64"):
        gated_depthwise_ffn(h.long(), weight)
