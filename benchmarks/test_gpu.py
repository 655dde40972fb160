"""The network on a GPU beside eager PyTorch and torch.compile: time, peak memory and distance from float32.

    pytest benchmarks/test_gpu.py --benchmark-only                (--peers all adds torch.compile, minutes each)
    python -m benchmarks.gpu_report out/gpu.json

`gpu.py` says how times are taken. On a CPU (--device cpu) only the smallest problem runs, to try the suite out.
"""

from __future__ import annotations

import pytest
import torch

import mirage_kernels
from benchmarks import gpu
from benchmarks.replay import CLOCK, replay
from benchmarks.stages import HALVES, block_kinds, make_half

SHAPES = ((1, 3, 224, 224), (1, 3, 512, 512), (1, 3, 1080, 1920), (16, 3, 256, 256))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEP_SHAPES = ((1, 3, 128, 128), (32, 3, 128, 128))
STAGE_SIZES = ((224, 224), (512, 512), (1080, 1920))
SMALLEST = (1, 3, 16, 16)
pytestmark = pytest.mark.benchmark(timer=CLOCK.read)


def problems(shapes, dtypes=DTYPES):
    return [gpu.Problem(variant, shape, dtype) for variant in gpu.BUILDERS for shape in shapes for dtype in dtypes]


@pytest.fixture
def usable(request, device, benchmark):
    """A function that takes a peer and its problem, skips what does not run here, and notes what is timed."""

    def check(peer, problem):
        if device == "cuda" and problem.shape == SMALLEST:
            pytest.skip("a CPU's problem")
        if device != "cuda" and (problem.shape != SMALLEST or peer.startswith("graph")):
            pytest.skip("needs a GPU")
        missing = mirage_kernels.available()["cuda"]
        if peer.endswith("cuda") and missing != "yes":
            pytest.skip(missing)
        if peer in gpu.SLOW and request.config.getoption("--peers") != "all":
            pytest.skip(f"{peer} takes minutes to build: --peers all")
        facts = {"peer": peer, "variant": problem.variant, "shape": list(problem.shape)}
        benchmark.extra_info.update(facts, dtype=str(problem.dtype).removeprefix("torch."))
        benchmark.group = f"{request.node.originalname.removeprefix('test_')} {problem}"
        return gpu.Problem(problem.variant, problem.shape, problem.dtype, device)

    yield check
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("peer", gpu.PEERS)
@pytest.mark.parametrize("problem", [*problems(SHAPES), *problems((SMALLEST,), DTYPES[:1])], ids=str)
def test_inference(problem, peer, usable, device, benchmark):
    problem = usable(peer, problem)
    with gpu.precision(problem.tf32):
        call = gpu.inference(problem, peer)
        error = gpu.relative_error(call(), gpu.truth(problem))
        assert error <= gpu.FARTHEST[problem.dtype], f"{peer} is {error:.1e} from eager in float32"
        benchmark.extra_info.update(error=error, peak_mib=gpu.peak_mib(call, device))
        replay(benchmark, gpu.samples(call, device))


@pytest.mark.parametrize("peer", gpu.STEP_PEERS)
@pytest.mark.parametrize("problem", problems((*STEP_SHAPES, SMALLEST), (torch.bfloat16,)), ids=str)
def test_step(problem, peer, usable, device, benchmark):
    with gpu.precision(tf32=False):
        call = gpu.step(usable(peer, problem), peer)
        assert call().isfinite()
        benchmark.extra_info.update(peak_mib=gpu.peak_mib(call, device))
        replay(benchmark, gpu.samples(call, device))


@pytest.mark.parametrize("implementation", ["eager", "fast", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for size in STAGE_SIZES for kind in block_kinds("tiny", *size)], ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_stage(name, kind, dtype, implementation, device, benchmark):
    """Halves of a block, forward, with the least that they can move and multiply."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    if implementation == "cuda" and mirage_kernels.available()["cuda"] != "yes":
        pytest.skip(mirage_kernels.available()["cuda"])
    found = make_half(name, kind, training=False, device=device, dtype=dtype)
    dim, _, height, width = kind
    x = torch.randn(1, dim, height, width, device=device, dtype=dtype)
    floor = {"bytes": found.bytes_forward, "macs": found.macs_forward}
    facts = {"stage": name, "peer": implementation, "shape": list(x.shape), "dtype": str(dtype).removeprefix("torch.")}
    benchmark.extra_info.update(facts | floor)
    benchmark.group = f"stage {name} {dim}x{height}x{width} {facts['dtype']}"
    function = found.eager if implementation == "eager" else found.fast
    with torch.inference_mode(), gpu.written_in(implementation), gpu.precision(tf32=False):
        replay(benchmark, gpu.samples(lambda: function(x), device))
