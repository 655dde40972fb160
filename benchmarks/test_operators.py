"""Each operator against the PyTorch expression it replaces, at the shapes of MIRAGE-T for 224x224 and 128x128."""

from __future__ import annotations

import pytest
import torch

import mirage_kernels
from benchmarks.workloads import Workload, operator_workloads

WORKLOADS = {f"{size}-{w.operator.name}-{w.name}": w for size in (224, 128) for w in operator_workloads(size)}

pytestmark = pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=True, warmup_iterations=2)


@pytest.fixture(params=WORKLOADS, ids=list(WORKLOADS))
def workload(request: pytest.FixtureRequest, benchmark) -> Workload:
    found = WORKLOADS[request.param]
    benchmark.group = request.param
    benchmark.extra_info.update(found.facts())
    return found


@pytest.fixture(params=["eager", "cpp", "triton"])
def function(request: pytest.FixtureRequest, workload: Workload, device: str, benchmark):
    benchmark.extra_info["implementation"] = request.param
    if request.param == "eager":
        return workload.expression
    if request.param != ("triton" if device == "cuda" else "cpp"):
        pytest.skip(f"{request.param} does not run on {device}")
    if request.param not in workload.operator.implementations:
        pytest.skip(f"{workload.operator.name} has no kernel of its own for {request.param}")
    if mirage_kernels.available()[request.param] != "yes":
        pytest.skip(f"{request.param}: {mirage_kernels.available()[request.param]}")
    return workload.operator.public


def test_forward(workload, function, timed, device, benchmark):
    benchmark.extra_info["direction"] = "forward"
    tensors = [t.to(device) for t in workload.make()]
    with torch.inference_mode():
        timed(lambda: function(*tensors))


def test_forward_backward(workload, function, timed, device, benchmark):
    benchmark.extra_info["direction"] = "forward+backward"
    tensors = [t.to(device).requires_grad_() for t in workload.make()]
    grad = torch.randn_like(function(*tensors))
    timed(lambda: torch.autograd.grad(function(*tensors), tensors, grad))
