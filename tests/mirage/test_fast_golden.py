"""Golden parity of accelerated models and blocks, in eval and training mode, on every implementation.

The limits are those of the reference. Where eager float32 itself comes close to its limit (sums that cancel), an
accelerated model may be twice as far off as eager is, as everywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from golden import BLOCK_CASES, MODEL_CASES, Comparison, Results, assert_within, compare_block, compare_model
from harness import device_of, require
from torch import nn

import mirage_kernels
from mirage.blocks import TransformerBlock as ReferenceBlock
from mirage.fast import TransformerBlock, accelerate

MODES = pytest.mark.parametrize("mode", ["eval", "train"])
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
OWN_CASE = "mirage_mini_16x24"


def runs(impl: str, case: str, dtype: str) -> Any:
    """Parameters with their marks: Triton needs a GPU, or minutes of its interpreter for all but the smallest case."""
    marks = []
    if impl == "triton":
        on_gpu = torch.cuda.is_available()
        marks = [pytest.mark.gpu] if on_gpu else [] if case == OWN_CASE else [pytest.mark.slow]
    return pytest.param(impl, case, dtype, id=f"{impl}-{case}-{dtype}", marks=marks)


def all_runs(cases: Any) -> list[Any]:
    """C++ in both dtypes; Triton, which has no float64, in float32."""
    return [runs("cpp", case, dtype) for case in cases for dtype in DTYPES] + [
        runs("triton", case, "fp32") for case in cases
    ]


@functools.cache
def eager(case: str, dtype: str, mode: str) -> Results:
    if case in BLOCK_CASES:
        return compare_block(case, ReferenceBlock, DTYPES[dtype], mode)
    return compare_model(case, MODEL_CASES[case], DTYPES[dtype], mode)


def assert_parity(results: Results, case: str, dtype: str, mode: str) -> None:
    """Each figure within the released limit, or in float32 within twice eager's error."""
    allowed: Results = {}
    for group, comparisons in results.items():
        allowed[group] = {}
        for name, (error, limit) in comparisons.items():
            if error > limit and dtype == "fp32":
                limit = max(limit, 2 * eager(case, dtype, mode)[group][name].error)
            allowed[group][name] = Comparison(error, limit)
    assert_within(allowed)


def accelerated(case: str) -> Any:
    def factory(*arguments: Any, **options: Any) -> nn.Module:
        return accelerate(MODEL_CASES[case](*arguments, **options))

    return factory


@MODES
@pytest.mark.parametrize(("impl", "case", "dtype"), all_runs(MODEL_CASES))
def test_model(impl: str, case: str, dtype: str, mode: str) -> None:
    require(impl)
    with mirage_kernels.use(impl):
        results = compare_model(case, accelerated(case), DTYPES[dtype], mode, device=device_of(impl))
    assert mirage_kernels.last_used("channel_attention_fusion") == impl
    assert_parity(results, case, dtype, mode)


@MODES
@pytest.mark.parametrize(("impl", "case", "dtype"), all_runs(BLOCK_CASES))
def test_block(impl: str, case: str, dtype: str, mode: str) -> None:
    require(impl)
    with mirage_kernels.use(impl):
        results = compare_block(case, TransformerBlock, DTYPES[dtype], mode, device=device_of(impl))
    assert mirage_kernels.last_used("gated_depthwise_ffn") == impl
    assert_parity(results, case, dtype, mode)
