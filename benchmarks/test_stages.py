"""Each half of each kind of block, and each step outside the blocks, beside its floor.

    pytest benchmarks/test_stages.py --benchmark-only

At an image of 224x224, float32. `python -m benchmarks.report` divides the bytes and multiply-adds of a row by
the rates of the machine, measured in the same run.
"""

from __future__ import annotations

import pytest
import torch

import mirage.fast
from benchmarks.networks import make
from benchmarks.peers import make_images
from benchmarks.stages import HALVES, STEPS, WHOLE, Step, block_kinds, make_half, network_steps

SIZE = 224
KINDS = [(variant, *kind) for variant in ("tiny", "small") for kind in block_kinds(variant, SIZE, SIZE)]

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=7)


def _id(kind: tuple[str, int, int, int, int]) -> str:
    return "-".join(map(str, kind))


@pytest.mark.parametrize("implementation", ["eager", "fast"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_half(kind, half, direction, implementation, timed, device, benchmark):
    variant, *kind = kind
    dim, heads, height, width = kind
    both = direction == "forward+backward"
    found = make_half(half, kind, both, device)
    benchmark.group = f"{half} {direction}, {dim} channels, {heads} heads, {height}x{width}"
    benchmark.extra_info.update(
        variant=variant,
        half=half,
        direction=direction,
        implementation=implementation,
        shape=[1, dim, height, width],
        bytes=found.bytes_both if both else found.bytes_forward,
        macs=found.macs_forward * (3 if both else 1),
    )
    function = getattr(found, implementation)
    x = torch.randn(1, dim, height, width, device=device)
    if not both:
        with torch.inference_mode():
            timed(lambda: function(x))
        return
    tensors, grad = (x.requires_grad_(), *found.parameters), torch.randn_like(x)
    timed(lambda: torch.autograd.grad(function(x), tensors, grad))


@pytest.fixture(scope="module", params=["tiny", "small"])
def steps(request: pytest.FixtureRequest) -> tuple[str, dict[str, Step]]:
    device = request.config.getoption("--device")
    model = mirage.fast.accelerate(make(request.param)).to(device).eval()
    return request.param, network_steps(model, make_images((1, 3, SIZE, SIZE))[0].to(device))


@pytest.mark.parametrize("name", [*STEPS, WHOLE])
def test_network_step(name, steps, timed, benchmark):
    variant, found = steps
    if name not in found:
        pytest.skip(f"{name} is not a step of its own in the accelerated network")
    step = found[name]
    benchmark.group = f"steps of MIRAGE {variant}, 1x3x{SIZE}x{SIZE}"
    benchmark.extra_info.update(
        variant=variant, step=name, bytes=step.bytes_forward, macs=step.macs_forward, is_blocks=step.is_blocks
    )
    with torch.inference_mode():
        timed(step.run)
