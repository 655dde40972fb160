"""Table 6 of the paper: time of a forward pass on a photograph, with parameters, multiply-adds and memory beside it."""

from __future__ import annotations

import pytest
import torch

from mirage import complexity, table6

pytestmark = pytest.mark.benchmark(max_time=3.0, min_rounds=5, group="Table 6, 1x3x224x224")


@pytest.mark.parametrize("implementation", table6.IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", table6.VARIANTS)
def test_row(variant, implementation, timed, device, benchmark):
    model = table6.build(variant, implementation, seed=0).to(device)
    image = table6.load_photograph(None, 224).to(device)
    cost = complexity.measure(model, x=image)
    benchmark.extra_info.update(
        method=f"MIRAGE-{variant}",
        implementation=implementation,
        params=cost.parameters / 1e6,
        gmacs=cost.gmacs,
        memory_mib=cost.peak_memory_mib,
        memory_method=cost.memory_method,
    )
    model.eval()
    with torch.inference_mode():
        timed(lambda: model(image))
