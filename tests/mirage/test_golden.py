"""Parity with the released network, case by case: outputs, features, losses, gradients, buffers; fp64 and fp32."""

import functools
import json

import pytest
import torch
from golden import (
    BLOCK_CASES,
    MODEL_CASES,
    STATE_DICTS,
    Results,
    assert_within,
    check_block,
    compare_model,
    golden_file,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
MODES = pytest.mark.parametrize("mode", ["eval", "train"])


@functools.cache
def model_results(case: str, mode: str, dtype: torch.dtype) -> Results:
    """One run serves every test of a case."""
    return compare_model(case, MODEL_CASES[case], dtype, mode)


GROUPS = [
    *(("eval", group) for group in ("outputs", "losses", "features", "checksums")),
    *(("train", group) for group in ("outputs", "losses", "gradient norms", "gradients", "buffers")),
]


@DTYPES
@pytest.mark.parametrize(("mode", "group"), GROUPS, ids=[f"{m}-{g.replace(' ', '-')}" for m, g in GROUPS])
@pytest.mark.parametrize("case", MODEL_CASES)
def test_model(case: str, mode: str, group: str, dtype: torch.dtype) -> None:
    assert_within({group: model_results(case, mode, dtype)[group]})


@DTYPES
@MODES
@pytest.mark.parametrize("case", BLOCK_CASES)
def test_block(case: str, mode: str, dtype: torch.dtype) -> None:
    check_block(case, dtype=dtype, mode=mode)


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_names_shapes_and_order(name: str) -> None:
    expected = json.loads(golden_file(f"{name}.json").read_text())
    model = STATE_DICTS[name]()
    parameters = [(k, list(v.shape)) for k, v in model.named_parameters()]
    buffers = [(k, list(v.shape)) for k, v in model.named_buffers()]
    assert parameters == list(expected["parameters"].items())
    assert buffers == list(expected["buffers"].items())
    assert set(model.state_dict()) == {k for k, _ in parameters + buffers}
