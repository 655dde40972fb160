"""Golden parity of accelerated models and blocks, in eval and training mode, on every implementation.

The limits are those of the reference. The gradients of a few scalars are sums that nearly cancel, and their error in
float32 is the luck of one rounding: that of MIRAGE-S' encoder_level3.2.attn.alpha_att lies between 3e-5 and 3e-4 in
eager PyTorch too, as threads and instruction sets vary. Where a run is past a limit, the median of five equivalent
roundings (the image perturbed in its last bit) has to be within it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden import (
    BLOCK_CASES,
    MODEL_CASES,
    OUTPUT_LIMIT,
    Comparison,
    Results,
    assert_within,
    compare_block,
    compare_model,
    golden_file,
    load_golden_weights,
    relative_error,
)
from harness import device_of, forced, require
from torch import nn

import mirage_kernels
from mirage.fast import TransformerBlock, accelerate
from mirage_kernels._runtime import dispatch

MODES = pytest.mark.parametrize("mode", ["eval", "train"])
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
OWN_CASE = "mirage_mini_16x24"


def runs(impl: str, case: str, dtype: str) -> Any:
    """Parameters with their marks: Triton needs a GPU, or minutes of its interpreter for all but the smallest case;
    so do PyTorch's own convolutions for whole networks in float64."""
    marks = []
    if impl == "composite" and dtype == "fp64" and case in ("mirage_tiny_64x64", "mirage_small_72x40"):
        marks = [pytest.mark.slow]
    if impl == "cuda":
        marks = [pytest.mark.gpu] if torch.cuda.is_available() else []
    if impl == "triton":
        on_gpu = torch.cuda.is_available()
        marks = [pytest.mark.gpu] if on_gpu else [] if case == OWN_CASE else [pytest.mark.slow]
    return pytest.param(impl, case, dtype, id=f"{impl}-{case}-{dtype}", marks=marks)


def all_runs(cases: Any) -> list[Any]:
    """C++ and the composite of plain PyTorch in both dtypes; Triton and CUDA, which have no float64, in float32."""
    return [runs(impl, case, dtype) for impl in ("cpp", "composite") for case in cases for dtype in DTYPES] + [
        runs(impl, case, "fp32") for impl in ("triton", "cuda") for case in cases
    ]


def perturbed(factory: Callable[..., nn.Module], seed: int) -> Callable[..., nn.Module]:
    """The factory's model or block, its input off by about one unit in the last place."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x * (1 + torch.finfo(x.dtype).eps * noise), *rest

    def build(*arguments: Any, **options: Any) -> nn.Module:
        module = factory(*arguments, **options)
        module.register_forward_pre_hook(hook)
        return module

    return build


def assert_parity(compare: Callable[[Callable[..., nn.Module]], Results], factory: Callable[..., nn.Module]) -> None:
    results = compare(factory)
    past = {
        (group, name): [error]
        for group, comparisons in results.items()
        for name, (error, limit) in comparisons.items()
        if not error <= limit
    }
    if past:
        for seed in range(4):
            again = compare(perturbed(factory, seed))
            for (group, name), errors in past.items():
                errors.append(again[group][name].error)
        for (group, name), errors in past.items():
            results[group][name] = Comparison(statistics.median(errors), results[group][name].limit)
    assert_within(results)


def accelerated(case: str) -> Any:
    def factory(*arguments: Any, **options: Any) -> nn.Module:
        return accelerate(MODEL_CASES[case](*arguments, **options))

    return factory


def models() -> list[Any]:
    """Every run in both modes. A training step takes the interpreter minutes even in the smallest case, and the
    emulation one in MIRAGE-T; test_cuda.py and test_cuda_mixer.py have every width by itself."""
    found = []
    for run in all_runs(MODEL_CASES):
        for mode in ("eval", "train"):
            impl, case, _ = run.values
            long = impl == "triton" and mode == "train"
            long |= impl == "cuda" and case != OWN_CASE and (case, mode) != ("mirage_tiny_64x64", "eval")
            slow = long and not torch.cuda.is_available()
            marks = [*run.marks, pytest.mark.slow] if slow else run.marks
            found.append(pytest.param(*run.values, mode, id=f"{run.id}-{mode}", marks=marks))
    return found


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_last_used", {})


def ran() -> set[str]:
    """The implementations that the operators of blocks have run on in this test."""
    found = {mirage_kernels.last_used(n) for n in ("mixer_stage", "feed_forward_stage", "transformer_blocks")}
    return {name for name in found if name is not None}


@pytest.mark.parametrize(("impl", "case", "dtype", "mode"), models())
def test_model(impl: str, case: str, dtype: str, mode: str) -> None:
    require(impl)
    with forced(impl):
        assert_parity(lambda f: compare_model(case, f, DTYPES[dtype], mode, device_of(impl)), accelerated(case))
    assert ran() == {impl}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MODEL_CASES)
def test_inference(case: str, dtype: str) -> None:
    """Without autograd, where whole levels run as one operator."""
    require("cpp")
    with np.load(golden_file(f"{case}.npz")) as data:
        image, expected = (torch.from_numpy(data[name]) for name in ("input", "eval.restored"))
    model = load_golden_weights(accelerated(case)(drop_path=0.0)).to(DTYPES[dtype]).eval()
    with mirage_kernels.use("cpp"), torch.inference_mode():
        restored = model(image.to(DTYPES[dtype]))
    assert ran() == {"cpp"}
    assert relative_error(restored, expected) <= OUTPUT_LIMIT[DTYPES[dtype]]


@MODES
@pytest.mark.parametrize(("impl", "case", "dtype"), all_runs(BLOCK_CASES))
def test_block(impl: str, case: str, dtype: str, mode: str) -> None:
    require(impl)
    with forced(impl):
        assert_parity(lambda f: compare_block(case, f, DTYPES[dtype], mode, device_of(impl)), TransformerBlock)
    assert ran() == {impl}
