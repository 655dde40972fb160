import pytest
import torch
from harness import (
    LAYOUTS,
    ON_GPUS,
    OperatorTests,
    assert_as_good_as_eager,
    device_of,
    evaluate,
    implementations,
    in_float64,
    relative_error,
    require,
    slowly,
)

import mirage_kernels
from mirage_kernels import channel_layer_norm
from mirage_kernels._runtime import accuracy
from mirage_kernels.channel_layer_norm import cases, reference
from mirage_kernels.feed_forward_stage import cases as feed_forward_stage
from mirage_kernels.mixer_stage import cases as mixer_stage

IMPLEMENTATIONS = ("cpp", "triton", "cuda")


class TestChannelLayerNorm(OperatorTests):
    (operator,) = cases.CASES
    alias = ("weight", "bias")


def inputs_of(*shape, dtype=torch.float32, device="cpu"):
    tensors = cases.make(shape, torch.Generator().manual_seed(0))
    return [t.to(dtype=dtype, device=device).requires_grad_() for t in tensors]


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wider_weights_promote(x_dtype, impl):
    """As in the reference under autocast: a 16-bit x and float32 parameters give float32."""
    require(impl)
    x, weight, bias = inputs_of(2, 6, 5, 7, device=device_of(impl))
    x = x.detach().to(x_dtype).requires_grad_()
    wide = torch.float64 if x_dtype == torch.float32 else torch.float32
    weight, bias = (t.detach().to(wide).requires_grad_() for t in (weight, bias))
    with mirage_kernels.use(impl):
        if wide == torch.float64 and impl in ON_GPUS:
            with pytest.raises(RuntimeError, match="float32, float16 and bfloat16, not torch.float64"):
                channel_layer_norm(x, weight, bias)
            return
        y = channel_layer_norm(x, weight, bias)
    exact = reference(x.double(), weight.double(), bias.double())
    assert y.dtype == wide
    assert relative_error(y, exact) < 2e-7
    grad_x, grad_weight, _ = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert grad_x.dtype == x_dtype and grad_weight.dtype == wide


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
def test_other_16_bit_weights(dtypes, impl):
    """Weights narrower than x, or of the other 16-bit type: the gradients have each argument's dtype."""
    require(impl)
    x, weight, bias = inputs_of(2, 20, 5, 7, device=device_of(impl))
    inputs = [t.detach().to(d).requires_grad_() for t, d in ((x, dtypes[0]), (weight, dtypes[1]), (bias, dtypes[1]))]
    with mirage_kernels.use(impl):
        results = evaluate(channel_layer_norm, inputs)
    truth = evaluate(reference, in_float64(inputs))
    assert [t.dtype for t in results] == [torch.float32, *(t.dtype for t in inputs)]
    for value, exact in zip(results, truth, strict=True):
        # Triton's interpreter truncates to bfloat16 instead of rounding.
        assert relative_error(value, exact) <= max(2e-7, torch.finfo(value.dtype).eps)


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
def test_large_offset_is_centred_first(impl):
    """Mean 200, deviation 0.01: E[x^2] - E[x]^2 would lose everything."""
    require(impl)
    x = (200 + 0.01 * torch.randn(1, 24, 9, 9, generator=torch.Generator().manual_seed(0))).to(device_of(impl))
    ones, zeros = x.new_ones(24), x.new_zeros(24)
    with mirage_kernels.use(impl):
        error = relative_error(channel_layer_norm(x, ones, zeros), reference(x.double(), ones, zeros))
    assert error <= 2 * relative_error(reference(x, ones, zeros), reference(x.double(), ones, zeros))


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("channels", [16, 17, 240, 255, 257, 300, 1031])
def test_channels(impl, channels):
    """As many as threads of a block hold, one more, and more than all of them do."""
    require(impl)
    inputs = inputs_of(2, channels, 5, 9, device=device_of(impl))
    with mirage_kernels.use(impl):
        results = evaluate(channel_layer_norm, inputs)
    for value, exact in zip(results, evaluate(reference, in_float64(inputs)), strict=True):
        assert relative_error(value, exact) < 5e-7


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [24, 25])
def test_pairs_of_pixels(layout, wide, width):
    """The CUDA kernels take 16-bit pixels two at a time where there are many: not where their addresses forbid it."""
    require("cuda")
    device = device_of("cuda")
    batch = 1 if device == "cpu" else 20  # a tile of 64 pixels for each multiprocessor, of which the emulation has few
    x, weight, bias = inputs_of(batch, 18, 44, width, dtype=torch.float16, device=device)
    if wide:
        weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    with mirage_kernels.use("cuda"):
        y = channel_layer_norm(x, weight, bias)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
        moved, moved_grad = x.detach(), grad
        if layout != "contiguous":
            moved, moved_grad = LAYOUTS[layout](moved), LAYOUTS[layout](grad)
        inputs = [moved.requires_grad_(), weight, bias]
        results = evaluate(channel_layer_norm, inputs, moved_grad)
    eager = evaluate(reference, inputs, grad)
    truth = evaluate(reference, in_float64(inputs), grad.double().cpu())
    assert_as_good_as_eager(torch.float16, results, eager, truth)


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("channels", [24, 131])
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_a_mean_far_above_the_deviation(ratio, channels, impl):
    """No further from the truth than eager is, although the mean's last bits are a good part of the deviation."""
    require(impl)
    x, weight, bias = inputs_of(2, channels, 5, 9)
    x = (1000 + x.detach() / x.detach().std(1, keepdim=True) * (1000 / ratio)).requires_grad_()
    inputs = [t.detach().to(device_of(impl)).requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    eager = evaluate(reference, inputs, grad)
    truth = evaluate(reference, in_float64(inputs), grad.double().cpu())
    with mirage_kernels.use(impl):
        results = evaluate(channel_layer_norm, inputs, grad)
    assert_as_good_as_eager(torch.float32, results, eager, truth)
    assert relative_error(results[0], truth[0]) <= 2e-7 * ratio


@pytest.mark.parametrize("impl", implementations(IMPLEMENTATIONS))
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("stage", [feed_forward_stage.MIRAGE, mixer_stage.EVAL], ids=lambda stage: stage.name)
def test_a_mean_far_above_the_deviation_in_stages(stage, ratio, impl):
    """Which begin with a norm of their own, forward and backward."""
    require(impl)
    if slowly(impl) and ratio != 1e3:
        pytest.skip("one ratio where kernels run on the host")
    inputs = [t.detach() for t in stage.inputs(stage.shapes[0], torch.float32, "cpu")]
    inputs[0] = 1000 + inputs[0] / inputs[0].std(1, keepdim=True) * (1000 / ratio)
    inputs = [t.to(device_of(impl)).requires_grad_() for t in inputs]
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    names = ["output", *(f"grad_{name}" for name in stage.arguments)]
    with mirage_kernels.use(impl):
        found = accuracy.compare(
            stage.public, stage.reference, inputs, grad, names, roundings=5, of_scalars="gradients of one number"
        )
    for result in found:
        assert result.passed, result


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
