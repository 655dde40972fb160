"""What is special about the operators in CUDA C++: threads, scratch memory, TF32, and what happens without a kernel.

That they compute the right thing is tested with the other implementations, operator by operator.
"""

import pytest
import torch
from harness import ON_GPU, device_of, evaluate, random_like, relative_error, require
from test_mixer_stage import arguments as mixer_arguments
from test_transformer_blocks import SMALL, halves, several

import mirage_kernels
from mirage_kernels import BlockWeights, feed_forward_stage, mixer_stage, transformer_blocks
from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.cases import operators
from mirage_kernels._runtime.library import to_dlpack
from mirage_kernels.feed_forward_stage.weights import OF_MIRAGE, shapes
from mirage_kernels.mixer_stage.cases import call as flat
from mirage_kernels.mixer_stage.weights import statistics_shapes

pytestmark = [pytest.mark.gpu] if ON_GPU else []
SHAPES = [(1, 24, 20, 37), (2, 48, 9, 17), (1, 96, 5, 3)]


@pytest.fixture(autouse=True)
def _cuda():
    require("cuda")
    with mirage_kernels.use("cuda"):
        yield


def feed_forward(shape, dtype=torch.float32):
    """x and the weights of MIRAGE's feed-forward stage."""
    generator = torch.Generator().manual_seed(0)
    found = shapes(shape[1], 2 * shape[1])
    sizes = [shape, *(found[name] for name in OF_MIRAGE)]
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    scaled = [t / max(t[0].numel(), 1) ** 0.5 if t.dim() == 4 and i > 0 else t for i, t in enumerate(tensors)]
    return [t.to(device_of("cuda"), dtype) for t in scaled]


def mixer(shape, dtype=torch.float32):
    return [t.detach().to(device_of("cuda"), dtype) for t in mixer_arguments((*shape, 2))]


@pytest.mark.skipif(ON_GPU, reason="a GPU runs them in its own order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_may_run_in_any_order(shape, dtype):
    """Between two barriers, lanes of a warp and warps of a block: a missing barrier would show."""
    results = []
    try:
        for order in ("forward", "backward", "shuffled"):
            cuda_runtime.library().set_order(order)
            tensors = [t.requires_grad_() for t in feed_forward(shape, dtype)]
            results.append([value := feed_forward_stage(*tensors)])
            results[-1] += torch.autograd.grad(value, tensors, random_like(value))
            with torch.no_grad():
                for training in (False, True):
                    results[-1].append(flat(mixer_stage, *mixer(shape, dtype), training=training))
    finally:
        cuda_runtime.library().set_order("forward")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


OPERATORS = [op for op in operators() if "cuda" in op.implementations and not op.is_stage]


@pytest.mark.skipif(ON_GPU, reason="a GPU runs them in its own order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_threads_of_operators_may_run_in_any_order(operator, dtype):
    check_orders(operator.public, *operator.inputs(operator.shapes[-1], dtype))
    assert mirage_kernels.last_used(operator.name) == "cuda"


@pytest.mark.skipif(ON_GPU, reason="a GPU runs them in its own order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 24, 16, 18), (2, 260, 7, 9)], ids=str)
def test_threads_of_channel_layer_norm_may_run_in_any_order(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_orders(mirage_kernels.channel_layer_norm, x, torch.rand(shape[1]), torch.rand(shape[1]))


@pytest.mark.skipif(ON_GPU, reason="a GPU runs them in its own order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 47, 61), (1, 40, 47, 61)], ids=str)
def test_threads_of_spd_covariance_may_run_in_any_order(shape, dtype):
    """Parts of several chunks, channels of one tile and of two."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_orders(mirage_kernels.spd_covariance, x)


def check_orders(function, *tensors, **options):
    """Forward and backward give the same bits whatever thread comes first."""
    inputs, results = [t.detach().requires_grad_() for t in tensors], []
    try:
        for order in ("forward", "backward", "shuffled"):
            cuda_runtime.library().set_order(order)
            results.append(evaluate(function, inputs, **options))
    finally:
        cuda_runtime.library().set_order("forward")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def large_gpu():
    """As many multiprocessors as an H200 has: kernels cut their work into more parts than on the emulation's four."""
    cuda_runtime.library().set_multiprocessors(132)
    yield
    cuda_runtime.library().set_multiprocessors(4)


@pytest.mark.skipif(ON_GPU, reason="which has as many as it has")
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_operators_in_many_parts(operator, large_gpu):
    inputs = operator.inputs(operator.shapes[-1], torch.float32)
    results = evaluate(operator.public, inputs)
    with mirage_kernels.use("torch"):
        exact = [t.detach().double().requires_grad_() for t in inputs]
        truth = evaluate(operator.reference, exact, random_like(results[0]).double())
    for name, value, peer in zip(("output", *operator.arguments), results, truth, strict=True):
        assert relative_error(value, peer) < 1e-5, name


@pytest.mark.skipif(ON_GPU, reason="which has as many as it has")
@pytest.mark.parametrize("training", [False, True])
def test_stages_in_many_parts(training, large_gpu):
    """The mixer's sums over 40 tiles, each of a block of its own; pairs of channels of the feed-forward one by one."""
    with torch.no_grad():
        for function, tensors in (
            (lambda *t: flat(mixer_stage, *t, training=training), mixer((2, 24, 40, 100))),
            (feed_forward_stage, feed_forward((1, 24, 20, 37))),
        ):
            value = function(*tensors)
            with mirage_kernels.use("torch"):
                assert relative_error(value, function(*(t.double() for t in tensors))) < 1e-6


@pytest.mark.skipif(ON_GPU, reason="of the emulation")
def test_unknown_orders_are_refused():
    with pytest.raises(ValueError, match="order: expected forward, backward or shuffled, got sideways"):
        cuda_runtime.library().set_order("sideways")
    with pytest.raises(ValueError, match="count: expected a positive number, got 0"):
        cuda_runtime.library().set_multiprocessors(0)


@pytest.mark.parametrize("name", ["feed_forward_stage", "spd_covariance"])
def test_tf32_only_where_pytorch_is_set_to_it(name):
    tensors = feed_forward((1, 24, 20, 37))[: None if name == "feed_forward_stage" else 1]
    function = getattr(mirage_kernels, name)
    with torch.no_grad(), mirage_kernels.use("torch"):
        truth = function(*(t.double() for t in tensors))
    errors = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.no_grad():
                errors.append(relative_error(function(*tensors), truth))
        finally:
            torch.set_float32_matmul_precision("highest")
    assert mirage_kernels.last_used(name) == "cuda"
    assert errors[0] < 3e-7 and 1e-6 < errors[1] < 1e-3


def test_more_channels_than_a_kernel_takes():
    """The stage runs as it would by itself, and says so."""
    for function, name, tensors in (
        (feed_forward_stage, "feed_forward_stage", feed_forward((1, 264, 3, 3))),
        (lambda *t: flat(mixer_stage, *t), "mixer_stage", mixer((1, 246, 3, 3))),
    ):
        with torch.no_grad():
            value = function(*tensors)
            assert mirage_kernels.last_used(name) not in ("cuda", None)
            with mirage_kernels.use("torch"):
                assert relative_error(value, function(*tensors)) < 1e-5


@pytest.mark.parametrize("channels", [48, 64, 96, 128, 132, 240, 243])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_of_the_feed_forward_stage(channels, dtype):
    """Every number of channels that has a kernel, in several tiles; others as the stage runs by itself."""
    tensors = [t.requires_grad_() for t in feed_forward((1, channels, 9, 18), dtype)]
    value = feed_forward_stage(*tensors)
    grads = torch.autograd.grad(value, tensors, random_like(value))
    reason = mirage_kernels.why_not("feed_forward_stage_backward").get("cuda", "")
    assert bool(reason) == (channels > (96 if dtype == torch.float32 else 240))
    assert not reason or f"takes x of shape [1, {channels}, 9, 18] in {dtype}" in reason
    truth = [t.detach().double().cpu().requires_grad_() for t in tensors]
    with mirage_kernels.use("torch"):
        exact = torch.autograd.grad(feed_forward_stage(*truth), truth, random_like(value).double().cpu())
    for grad, expected in zip(grads, exact, strict=True):
        assert grad.dtype == dtype and relative_error(grad, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_backward_checks_its_scratch_memory_and_the_gradients():
    x, *weights = (to_dlpack(t) for t in feed_forward((1, 24, 20, 37)))
    library = cuda_runtime.library()
    size = library.feed_forward_stage_backward_workspace(x, weights[-1], False)
    grads = [torch.empty_like(t) for t in feed_forward((1, 24, 20, 37))]
    grad_x, *grads = map(to_dlpack, grads)

    def run(grads, bytes_given, grad_y=x):
        memory = to_dlpack(cuda_runtime.workspace(bytes_given, torch.empty(0, device=device_of("cuda"))))
        norm, matrices = weights[:2], weights[2:]
        library.feed_forward_stage_backward(grad_y, x, *norm, 1e-5, *matrices, grad_x, grads, memory, 0, False)

    with pytest.raises(ValueError, match=f"workspace: expected {size} bytes, got {size - 4}"):
        run(grads, size - 4)
    with pytest.raises(ValueError, match="gradients: expected 5 to 10 tensors, got 4"):
        run(grads[:4], size)
    distant = far(torch.randn(1, 24, 20, 37, device=device_of("cuda")))
    with pytest.raises(ValueError, match="grad_y: expected rows and columns less than .* apart, got rows or"):
        run(grads, size, to_dlpack(distant))
    with pytest.raises(ValueError, match=r"grad_norm_bias: expected shape \[24\], got \[24, 48, 1, 1\]"):
        run([grads[0], grads[4], *grads[2:]], size)
    run(grads, size)


def far(t):
    """The same values, rows so far apart that no kernel of the stages takes them."""
    memory = torch.empty(cuda_runtime.FAR * (t.shape[2] - 1) + t[:, :, 0].numel(), dtype=t.dtype, device=t.device)
    strides = (t.shape[1] * t.shape[3], t.shape[3], cuda_runtime.FAR, 1)
    return memory.as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("name", ["feed_forward_stage", "mixer_stage"])
def test_rows_far_apart_are_copied(name):
    """And the library by itself refuses them, in every argument."""
    stage = {"feed_forward_stage": feed_forward_stage, "mixer_stage": lambda *t: flat(mixer_stage, *t)}[name]
    x, *weights = (feed_forward if name == "feed_forward_stage" else mixer)((1, 24, 2, 5), torch.float16)
    results = []
    for change in (torch.clone, far):
        tensors = [change(x).requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
        value = stage(*tensors)
        results.append([value, *torch.autograd.grad(value, tensors, change(random_like(value)))])
        assert mirage_kernels.last_used(name) == "cuda"
    for near, other in zip(*results, strict=True):
        assert torch.equal(near, other)
    library = cuda_runtime.library()
    rest = (to_dlpack(weights[-1]), False) if name == "feed_forward_stage" else (2, 16, False)
    for size in (f"{name}_workspace", f"{name}_backward_workspace"):
        assert getattr(library, size)(to_dlpack(x), *rest) is not None
        assert getattr(library, size)(to_dlpack(far(x)), *rest) is None


def test_operators_without_cuda_run_as_by_themselves():
    x = torch.randn(1, 6, 5, 4, device=device_of("cuda"))
    dispatch = mirage_kernels._runtime.dispatch
    declined = {"cuda": "it has no kernels in CUDA C++"}
    with_cuda = dispatch.choose("an_operator", x, declined)
    assert dispatch.choose("another", x) == "cuda"
    with dispatch.by_itself():
        assert with_cuda == dispatch.choose("an_operator", x, declined) != "cuda"


def test_float64_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="'cuda' was asked for but cannot run: CUDA kernels take float32, float16"):
        feed_forward_stage(*(t.double() for t in feed_forward((1, 6, 5, 4))))


def call_library(tensors, workspace=None, y=None):
    """The library's function itself, which trusts nobody."""
    library, (x, norm_weight, norm_bias, *matrices) = cuda_runtime.library(), tensors
    size = library.feed_forward_stage_workspace(to_dlpack(x), to_dlpack(matrices[-1]), False)
    workspace = torch.empty(size // 4, device=x.device) if workspace is None else workspace
    y = torch.empty_like(x) if y is None else y
    library.feed_forward_stage(
        *(
            to_dlpack(x),
            to_dlpack(norm_weight),
            to_dlpack(norm_bias),
            1e-5,
            *map(to_dlpack, matrices),
            to_dlpack(y),
            to_dlpack(workspace),
            0,
            False,
        )
    )
    return y


def test_the_library_checks_its_arguments():
    tensors = feed_forward((1, 48, 5, 3))  # few pixels: several blocks share them, and need memory for their sums
    call_library(tensors)
    with pytest.raises(ValueError, match=r"workspace: expected \d+ bytes, got 0"):
        call_library(tensors, workspace=torch.empty(0, device=tensors[0].device))
    with pytest.raises(ValueError, match="project_in: expected float32, got float16"):
        call_library([t.half() if i == 3 else t for i, t in enumerate(tensors)])
    with pytest.raises(ValueError, match="norm_weight: expected float32, got bfloat16"):
        call_library([tensors[0], *(t.bfloat16() for t in tensors[1:])])
    with pytest.raises(ValueError, match=r"y: expected shape \[1, 48, 5, 3\], got \[1, 48, 5, 4\]"):
        call_library(tensors, y=torch.empty(1, 48, 5, 4, device=tensors[0].device))
    with pytest.raises(ValueError, match=r"dwconv: expected shape \[192, 9\], got \[191, 9\]"):
        call_library([t[:-1].contiguous() if i == 4 else t for i, t in enumerate(tensors)])
    with pytest.raises(ValueError, match="x: expected 4 dimensions"):
        cuda_runtime.library().feed_forward_stage_workspace(to_dlpack(tensors[0][0]), to_dlpack(tensors[-1]), False)


def test_the_library_checks_the_arguments_of_channel_layer_norm():
    library, x = cuda_runtime.library(), torch.randn(1, 6, 5, 4, device=device_of("cuda"))
    weight, mean = torch.ones(6, device=x.device), torch.empty(1, 5, 4, device=x.device)

    def forward(x, weight, y, mean):
        library.channel_layer_norm_forward(
            *map(to_dlpack, (x, weight, weight)), 1e-5, *map(to_dlpack, (y, mean, torch.empty_like(mean))), 0
        )

    def backward(grad_x, workspace):
        grad_weight = torch.empty_like(weight)
        tensors = (x, x, weight, mean, mean, grad_x, grad_weight, grad_weight, workspace)
        library.channel_layer_norm_backward(*map(to_dlpack, tensors), 0)

    with pytest.raises(ValueError, match=r"weight: expected shape \[6\], got \[5\]"):
        forward(x, weight[:5], x, mean)
    with pytest.raises(ValueError, match=r"y: expected float32 \(or float32 for a 16-bit x\), got float16"):
        forward(x, weight, x.half(), mean)
    with pytest.raises(ValueError, match="x: expected float32, float16 or bfloat16, got float64"):
        forward(x.double(), weight, x.double(), mean.double())
    with pytest.raises(ValueError, match="weight: expected float32, float16 or bfloat16, got float64"):
        forward(x, weight.double(), x, mean)
    with pytest.raises(ValueError, match="mean: expected float32, got float16"):
        forward(x, weight, x, mean.half())
    with pytest.raises(ValueError, match="grad_x: expected a contiguous tensor, got other strides"):
        backward(x.mT.contiguous().mT, torch.empty(1000, device=x.device))
    with pytest.raises(ValueError, match=r"workspace: expected \d+ bytes, got 4"):
        backward(torch.empty_like(x), torch.empty(1, device=x.device))


def test_the_library_checks_the_arguments_of_spd_covariance():
    library, x = cuda_runtime.library(), torch.randn(1, 6, 5, 4, device=device_of("cuda"))
    y, mean = torch.empty(1, 6, 6, device=x.device), torch.empty(1, 2, 6, device=x.device)
    memory = torch.empty(library.spd_covariance_workspace(to_dlpack(x)) // 4, device=x.device)

    def forward(x, y, mean, memory):
        library.spd_covariance_forward(to_dlpack(x), 1e-5, to_dlpack(y), to_dlpack(mean), to_dlpack(memory), 0, False)

    def backward(grad_y, grad_x):
        library.spd_covariance_backward(to_dlpack(grad_y), to_dlpack(x), to_dlpack(mean), to_dlpack(grad_x), 0, False)

    forward(x, y, mean, memory)
    with pytest.raises(ValueError, match=r"x: expected at least 2 pixels, got \[1, 6, 1, 1\]"):
        forward(x[:, :, :1, :1], y, mean, memory)
    with pytest.raises(ValueError, match="x: expected float32, float16 or bfloat16, got float64"):
        forward(x.double(), y.double(), mean.double(), memory)
    with pytest.raises(ValueError, match="y: expected a contiguous tensor, got other strides"):
        forward(x, y.mT, mean, memory)
    with pytest.raises(ValueError, match=r"mean: expected shape \[1, 2, 6\], got \[1, 1, 6\]"):
        forward(x, y, mean[:, :1], memory)
    with pytest.raises(ValueError, match=r"workspace: expected \d+ bytes, got 4"):
        forward(x, y, mean, memory[:1])
    with pytest.raises(ValueError, match="grad_y: expected float32, got float16"):
        backward(y.half(), torch.empty_like(x))
    with pytest.raises(ValueError, match=r"grad_x: expected shape \[1, 6, 5, 4\], got \[1, 6, 4, 5\]"):
        backward(y, torch.empty(1, 6, 4, 5, device=x.device))


def test_the_library_checks_the_weights_of_the_mixer():
    x, *weights = mixer((1, 12, 5, 3))
    library = cuda_runtime.library()
    with pytest.raises(ValueError, match="heads: expected a positive number, got 0"):
        library.mixer_stage_workspace(to_dlpack(x), 0, 5, False)
    with pytest.raises(ValueError, match="hidden: expected at least a third of the channels of x, got 3"):
        library.mixer_stage_workspace(to_dlpack(x), 2, 3, False)
    size = library.mixer_stage_workspace(to_dlpack(x), 2, 5, False)
    statistics = [to_dlpack(torch.empty(shape, device=x.device)) for shape in statistics_shapes(1, 12, 2)]
    rest = (to_dlpack(torch.ones(1, device=x.device)), False, 1e-5, 1e-5, statistics, to_dlpack(torch.empty_like(x)))
    with pytest.raises(ValueError, match="weights: expected 21 tensors, got 19"):
        library.mixer_stage(
            to_dlpack(x),
            list(map(to_dlpack, weights)),
            *rest,
            to_dlpack(torch.empty(size // 4, device=x.device)),
            0,
            False,
        )


def on_device(x, blocks, dtype):
    """In `dtype`, weights of the mixer in float32."""
    device = device_of("cuda")
    moved = [
        BlockWeights(
            type(b.mixer)(*(w.to(device) for w in b.mixer)),
            type(b.feed_forward)(*(w.to(device, dtype) for w in b.feed_forward if w is not None)),
            *b[2:],
        )
        for b in blocks
    ]
    return x.to(device, dtype), moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_have_the_bits_of_the_stages(count, dtype):
    """One call of the library; and what it has of the first block does not reach the next."""
    x, blocks = on_device(*several((2, 24, 13, 21, 2), count), dtype)
    with torch.no_grad():
        value, expected = transformer_blocks(x, blocks), halves(x, *blocks)
        assert mirage_kernels.last_used("transformer_blocks") == "cuda"
        # the stages took float32 weights of one half and those of `dtype` of the other; together they are float32
        assert relative_error(value, expected) <= (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), float("nan"), dtype=dtype, device=x.device)[..., ::2]
        wide.copy_(x)
        assert torch.equal(transformer_blocks(wide, blocks), value)
        last = x.contiguous(memory_format=torch.channels_last)
        assert transformer_blocks(last, blocks).stride() == last.stride()
    x.requires_grad_()
    assert transformer_blocks(x, blocks).requires_grad


def test_blocks_without_a_kernel_or_without_pixels():
    with torch.no_grad():
        x, blocks = on_device(*several((1, 246, 3, 3, 2), 2), torch.float32)
        value = transformer_blocks(x, blocks)
        assert mirage_kernels.last_used("transformer_blocks") not in ("cuda", None)
        with mirage_kernels.use("torch"):
            assert relative_error(value, halves(x, *blocks)) < 1e-5
        x, blocks = on_device(*several((0, 6, 5, 7, 1), 2), torch.float32)
        assert transformer_blocks(x, blocks).shape == x.shape


def test_blocks_are_registered_right():
    x, blocks = on_device(*several(SMALL, 2), torch.float32)
    weights = [w for b in blocks for half in b[:2] for w in half if w is not None]
    operator = torch.ops.mirage_kernels.transformer_blocks.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, (x, weights, [1e-5] * 6, "cuda"), test_utils=checks)
    with pytest.raises(ValueError, match="weights: expected 52 for 2 blocks, got 51"):
        operator(x, weights[:-1], [1e-5] * 6, "cuda")
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(transformer_blocks, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, blocks), transformer_blocks(x, blocks))


def test_a_gpu_without_triton():
    """What is written in CUDA C++ runs in it, the rest as composites and the other operators in PyTorch."""
    with mirage_kernels._runtime.dispatch.by_itself("cuda"):
        _run_without_triton(device_of("cuda"))


def _run_without_triton(device):
    tensors = [t.requires_grad_() for t in feed_forward((1, 24, 9, 11))]
    value = feed_forward_stage(*tensors)
    assert mirage_kernels.last_used("feed_forward_stage") == "cuda"
    grads = torch.autograd.grad(value.square().sum(), tensors)
    with mirage_kernels.use("torch"):
        truth = [t.detach().double().requires_grad_() for t in tensors]
        expected = torch.autograd.grad(feed_forward_stage(*truth).square().sum(), truth)
    for grad, exact in zip(grads, expected, strict=True):
        assert relative_error(grad, exact) < 1e-5
    x = torch.randn(1, 6, 5, 4, device=device)
    dispatch = mirage_kernels._runtime.dispatch
    assert dispatch.choose("without_cuda", x, {"cuda": "it has no kernels in CUDA C++"}) == "torch"
    mirage_kernels.spd_covariance(x)
    assert mirage_kernels.last_used("spd_covariance") == "cuda"
    mirage_kernels.spd_covariance(x.double())
    assert mirage_kernels.last_used("spd_covariance") == "torch"
    double = [t.detach().double() for t in tensors]
    assert relative_error(feed_forward_stage(*double), value) < 1e-5
    assert mirage_kernels.last_used("feed_forward_stage") == "composite"
