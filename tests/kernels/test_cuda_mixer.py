"""mixer_stage's backward in CUDA C++, beyond what every implementation is tested for."""

import numpy as np
import pytest
import torch
from harness import ON_GPU, device_of, random_like, relative_error, require
from test_mixer_stage import arguments, flat, weights_of

import mirage_kernels
from mirage_kernels import mixer_stage
from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import to_dlpack
from mirage_kernels.mixer_stage import cuda
from mirage_kernels.mixer_stage.weights import LEARNED, statistics_shapes

pytestmark = [pytest.mark.gpu] if ON_GPU else []
SUMS = ("temperature", "gate_temperature", "alpha_att", "alpha_conv", "alpha_mlp")
"""Scalars, of terms that cancel: compared with the tolerance of the terms in test_mixer_stage."""


@pytest.fixture(autouse=True)
def _cuda():
    require("cuda")
    with mirage_kernels.use("cuda"):
        yield


@pytest.fixture
def strict():
    """A call that has no kernel raises."""
    with mirage_kernels.use("cuda", strict=True):
        yield


def declined():
    """Whether the last backward pass had no kernel."""
    return bool(mirage_kernels.why_not("mixer_stage_backward").get("cuda"))


def tensors_of(shape, dtype=torch.float32):
    return [t.detach().to(dtype).requires_grad_() for t in arguments(shape, device=device_of("cuda"))]


def gradients(tensors, scale=1.0, **options):
    value = flat(mixer_stage, *tensors, **options)
    return torch.autograd.grad(value, tensors, (random_like(value).cpu().double() * scale).to(value))


def exact_gradients(tensors, scale=1.0, **options):
    with mirage_kernels.use("torch"):
        return gradients([t.detach().double().cpu().requires_grad_() for t in tensors], scale, **options)


def check(grads, expected, tolerance):
    for name, grad, exact in zip(("x", *LEARNED), grads, expected, strict=True):
        assert grad.isfinite().all(), name
        if name not in SUMS:
            assert relative_error(grad, exact) < tolerance, name


@pytest.mark.parametrize("channels", [24, 48, 96, 144, 192, 240, 246])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_that_has_a_kernel(channels, dtype):
    """In several tiles; others as the stage runs by itself."""
    tensors = tensors_of((1, channels, 9, 18, 2), dtype)
    value = flat(mixer_stage, *tensors, training=True)
    grads = torch.autograd.grad(value, tensors, random_like(value))
    assert declined() == (channels > (192 if dtype == torch.float32 else 240))
    check(grads, exact_gradients(tensors, training=True), 2e-6 if dtype == torch.float32 else 2e-2)
    assert all(g.dtype == dtype for g in grads)


@pytest.mark.parametrize("size", [(2, 3), (5, 7), (9, 20), (11, 19), (17, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mean_of_equal_values(size, dtype):
    """It is that value, exactly, whatever the number of pixels: of a constant image the layer norm leaves its bias."""
    tensors = tensors_of((2, 48, *size, 2), dtype)
    tensors[0] = (tensors[0] * 0 + 3).detach()
    bias = dict(zip(("x", *LEARNED), tensors, strict=True))["norm_bias"]
    y = mixer_stage(tensors[0], weights_of(tensors), training=True)
    assert torch.equal(y.batch_mean, bias[16:32].float())
    assert y.batch_var.max() < 1e-12


@pytest.mark.skipif(ON_GPU, reason="NumPy gives the strides away, PyTorch has 1 there")
@pytest.mark.parametrize("single", [2, 3], ids=["row", "column"])
def test_the_stride_of_a_single_row_or_column(single, monkeypatch):
    """It may be anything, as in C++; in bytes here, far beyond what windows around a tile could step over."""
    shape = [2, 48, 17, 17]
    shape[single] = 1
    tensors = tensors_of((*shape, 2))
    value = flat(mixer_stage, *tensors, training=True)
    grads = torch.autograd.grad(value, tensors, random_like(value))

    def vast(tensor):
        array = tensor.detach().numpy()
        strides = [2**33 if i == single and list(array.shape) == shape else n for i, n in enumerate(array.strides)]
        return np.lib.stride_tricks.as_strided(array, array.shape, strides).__dlpack__()

    monkeypatch.setattr(cuda, "to_dlpack", vast)
    again = flat(mixer_stage, *tensors, training=True)
    for one, other in zip(torch.autograd.grad(again, tensors, random_like(value)), grads, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(again, value)


@pytest.mark.usefixtures("strict")
def test_tf32_where_pytorch_is_set_to_it():
    tensors = tensors_of((2, 48, 9, 18, 2))
    expected = exact_gradients(tensors, training=True)
    torch.set_float32_matmul_precision("high")
    try:
        grads = gradients(tensors, training=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    check(grads, expected, 4e-3)
    assert relative_error(grads[0], expected[0]) > 1e-6


@pytest.mark.skipif(ON_GPU, reason="a GPU runs them in its own order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 13, 21, 2), (1, 102, 9, 17, 1)], ids=str)
def test_threads_may_run_in_any_order(shape, dtype):
    """Between two barriers, lanes of a warp and warps of a block: a missing barrier would show."""
    tensors, results = tensors_of(shape, dtype), []
    try:
        for order in ("forward", "backward", "shuffled"):
            cuda_runtime.library().set_order(order)
            results.append(gradients(tensors, training=True, drop=True))
    finally:
        cuda_runtime.library().set_order("forward")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("strict")
@pytest.mark.skipif(ON_GPU, reason="which has as many multiprocessors as it has")
@pytest.mark.parametrize("count", [1, 3, 132])
@pytest.mark.parametrize("training", [False, True])
def test_in_few_parts_and_in_many(count, training):
    """A block that has tiles of all three samples, blocks that share samples, and one for each tile."""
    tensors = tensors_of((3, 24, 20, 37, 2))
    expected = exact_gradients(tensors, training=training, drop=True)
    library = cuda_runtime.library()
    library.set_multiprocessors(count)
    try:
        grads = gradients(tensors, training=training, drop=True)
    finally:
        library.set_multiprocessors(4)
    check(grads, expected, 2e-6)


def test_gradients_of_products_below_the_range_of_float16():
    """That of q k^T falls with the square of qkv's scale, where those of q and k fall with the scale."""
    tensors = tensors_of((1, 24, 13, 21, 2))
    branch, index = 8, 1 + LEARNED.index("qkv")
    with torch.no_grad():
        tensors[index][: 2 * branch] *= 4000
        tensors = [t.half().requires_grad_() for t in tensors]
    grads = gradients(tensors, scale=200.0)
    expected = exact_gradients(tensors, scale=200.0)
    rows = slice(0, 2 * branch)
    assert relative_error(grads[index][rows], expected[index][rows]) < 6e-3


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_float32_beside_16_bits(dtype):
    """As under autocast: gradients of weights in float32, of x in its own dtype."""
    x, *weights = tensors_of((2, 24, 9, 21, 2))
    tensors = [x.detach().to(dtype).requires_grad_(), *weights]
    grads = gradients(tensors, training=True)
    assert [g.dtype for g in grads] == [dtype] + [torch.float32] * len(weights)
    check(grads, exact_gradients(tensors, training=True), 2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.usefixtures("strict")
def test_other_strides_and_poison():
    """x and the gradient of y as every second column of what is NaN elsewhere."""
    tensors = tensors_of((2, 24, 9, 21, 2))
    value = flat(mixer_stage, *tensors, training=True)
    grad_y = random_like(value)
    expected = torch.autograd.grad(value, tensors, grad_y)
    wide = [torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"), device=t.device)[..., ::2] for t in (value, value)]
    wide[0].copy_(tensors[0].detach())
    wide[1].copy_(grad_y)
    tensors[0] = wide[0].requires_grad_()
    grads = torch.autograd.grad(flat(mixer_stage, *tensors, training=True), tensors, wide[1])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_scratch_memory_and_the_gradients_are_checked():
    x, *learned = (t.detach() for t in tensors_of((1, 12, 5, 3, 2)))
    weights = weights_of([x, *learned])
    library, heads, hidden = cuda_runtime.library(), 2, weights.gic2.shape[1]
    size = library.mixer_stage_backward_workspace(to_dlpack(x), heads, hidden, False)
    statistics = [torch.rand(shape, device=x.device) for shape in statistics_shapes(1, 12, heads)]
    inputs = (
        to_dlpack(x),
        to_dlpack(x),
        list(map(to_dlpack, weights)),
        to_dlpack(torch.ones(1, device=x.device)),
        False,
        1e-5,
        1e-5,
    )
    inputs += (list(map(to_dlpack, statistics)), to_dlpack(torch.empty_like(x)))
    grads = [torch.empty_like(t) for t in learned]

    def run(grads, bytes_given, grad_x=inputs[-1]):
        memory = to_dlpack(cuda_runtime.workspace(bytes_given, x))
        library.mixer_stage_backward(*inputs[:-1], grad_x, list(map(to_dlpack, grads)), memory, 0, False)

    with pytest.raises(ValueError, match=f"workspace: expected {size} bytes, got {size - 4}"):
        run(grads, size - 4)
    with pytest.raises(ValueError, match="gradients: expected 19 tensors, got 18"):
        run(grads[:-1], size)
    with pytest.raises(ValueError, match=r"grad_norm_bias: expected shape \[12\], got \[4\]"):
        run([grads[0], grads[LEARNED.index("bn_bias")], *grads[2:]], size)
    with pytest.raises(ValueError, match="grad_x: expected float32, got float16"):
        run(grads, size, to_dlpack(x.half()))
    with pytest.raises(ValueError, match="x: expected what the CUDA kernels of mixer_stage_backward take, got float64"):
        wide = [to_dlpack(t.double()) for t in weights]
        double = [to_dlpack(t.double()) for t in statistics]
        library.mixer_stage_backward(
            *(
                to_dlpack(x.double()),
                to_dlpack(x.double()),
                wide,
                to_dlpack(torch.ones(1, device=x.device).double()),
                *inputs[4:7],
                double,
            ),
            *(
                to_dlpack(x.double()),
                [to_dlpack(t.double()) for t in grads],
                to_dlpack(cuda_runtime.workspace(size, x)),
                0,
                False,
            ),
        )
    run(grads, size)


def test_no_samples():
    tensors = tensors_of((0, 12, 5, 7, 2))
    assert gradients(tensors)[0].shape == tensors[0].shape
    assert declined() and mirage_kernels.last_used("mixer_stage") == "cuda"
