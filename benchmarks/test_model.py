"""The whole network, reference against fast: inference at 224x224 and a training step at 128x128."""

from __future__ import annotations

import pytest
import torch

import mirage
import mirage.fast
from mirage.losses import MirageLoss

BUILDERS = {
    "tiny-eager": mirage.mirage_tiny,
    "tiny-fast": mirage.fast.mirage_tiny,
    "small-eager": mirage.mirage_small,
    "small-fast": mirage.fast.mirage_small,
}

pytestmark = pytest.mark.benchmark(max_time=3.0, min_rounds=5)


@pytest.fixture(params=list(BUILDERS))
def model(request: pytest.FixtureRequest, device: str, benchmark) -> mirage.MIRAGE:
    variant, implementation = request.param.split("-")
    benchmark.extra_info.update(variant=variant, implementation=implementation)
    torch.manual_seed(0)
    return BUILDERS[request.param]().to(device)


def test_inference(model, timed, device, benchmark):
    benchmark.group = f"inference 1x3x224x224, MIRAGE {benchmark.extra_info['variant']}"
    benchmark.extra_info["workload"] = "inference 1x3x224x224"
    model.eval()
    image = torch.rand(1, 3, 224, 224, device=device)
    with torch.inference_mode():
        timed(lambda: model(image))


def test_training_step(model, timed, device, benchmark):
    benchmark.group = f"training step 1x3x128x128, MIRAGE {benchmark.extra_info['variant']}"
    benchmark.extra_info["workload"] = "training step 1x3x128x128"
    model.train()
    criterion = MirageLoss(preset="released")
    image, target = torch.rand(1, 3, 128, 128, device=device), torch.rand(1, 3, 128, 128, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        criterion(model(image, return_spd=True), target)[0].backward()

    timed(step)
