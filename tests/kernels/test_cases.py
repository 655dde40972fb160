"""What operators' `cases.py` say, beside what else knows it. Their FLOPs: `OperatorTests.test_flops`."""


import pytest
import torch

import mirage_kernels
from mirage_kernels._runtime.cases import DIMS, Level, levels, operators

OPERATORS = operators()
IDS = [f"{operator.name} {operator.mode}".strip() for operator in OPERATORS]


def test_every_public_operator_has_one():
    helpers = {"available", "last_used", "limit_workspace", "release_workspace", "use", "why_not"}
    public = {name: getattr(mirage_kernels, name) for name in mirage_kernels.__all__ if name not in helpers}
    functions = {name for name, value in public.items() if callable(value) and not isinstance(value, type)}
    assert {operator.name for operator in OPERATORS} == functions
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("operator", OPERATORS, ids=IDS)
def test_shapes(operator):
    """All that a case says of shapes is of one kind, and the arguments are as many as their names."""
    shapes = [*operator.shapes, operator.empty, operator.large, *operator.compiled]
    shapes += [shape for dim in DIMS.values() for shape in operator.in_network(dim, 64)]
    for shape in shapes:
        tensors = operator.without_memory(shape, torch.float16)
        assert len(tensors) == len(operator.arguments)
        assert tensors[0].shape == shape[:4] and tensors[0].dtype == torch.float16 and tensors[0].is_meta
    assert operator.empty[0] == 0 and 2**18 <= operator.large[2] * operator.large[3] <= 1.1 * 2**20


def test_arguments_far_apart():
    (operator,) = operators(["channel_layer_norm"])
    x, weight, _ = operator.without_memory((2, 6, 5, 7), far=True)
    assert x.stride() == (6 * 2**31, 2**31, 7, 1) and weight.is_contiguous()


def test_the_least_that_is_moved_and_multiplied():
    stage, *_ = operators(["feed_forward_stage"])  # MIRAGE's mode is the first
    (fusion,) = operators(["channel_attention_fusion"])
    image, weights = 4 * 24 * 224 * 224, 4 * (24 + 24 + 96 * 24 + 96 * 9 + 24 * 48)
    shape = stage.in_network(24, 224)[0]
    assert shape == (1, 24, 224, 224)
    assert stage.nbytes(shape) == 2 * image + weights
    assert stage.nbytes(shape, both=True) == 5 * image + 3 * weights
    assert stage.nbytes(shape, dtype=torch.bfloat16) == stage.nbytes(shape) // 2
    assert stage.macs(shape) == (96 * 24 + 96 * 9 + 24 * 48) * 224 * 224
    assert stage.macs(shape, both=True) == 3 * stage.macs(shape)
    # q, k, v, conv and mlp in, three branches out; backward reads those five and three gradients, writes five
    shape, branch = fusion.in_network(24, 224)[2], 4 * 16 * 112 * 112
    assert shape == (1, 16, 112, 112, 2)
    assert fusion.nbytes(shape) - 8 * branch == 4 * (2 + 3)
    assert fusion.nbytes(shape, both=True) - 21 * branch == 4 * 3 * (2 + 3)
    assert fusion.macs(shape) == 2 * 16 * 8 * 112 * 112


def test_levels_of_the_networks():
    assert levels(DIMS["small"], 224, 320)[2:] == [
        Level(60, 2, 112, 160),
        Level(120, 4, 56, 80),
        Level(240, 8, 28, 40),
    ]


def test_cases_import_nothing_else(fresh):
    code = (
        "import sys, mirage_kernels; before = set(sys.modules)\n"
        "from mirage_kernels._runtime.cases import operators; assert len(operators()) > 10\n"
        "print([name for name in set(sys.modules) - before if not name.startswith('mirage_kernels.')])"
    )
    assert fresh.run(code).stdout.strip() == "[]"
