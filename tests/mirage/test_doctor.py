"""What `mirage doctor` makes of errors; the command itself is tested in test_cli.py."""

import json
import math
import os

import pytest
import torch

import mirage_kernels
from mirage import doctor, self_check
from mirage_kernels._runtime import dispatch
from mirage_kernels._runtime.accuracy import Comparison, relative_error

LIMITS = {"output": 1e-6, "grad 0": 1e-3, "grad 1": 1e-5}


@pytest.mark.parametrize(
    ("errors", "worst", "passed"),
    [
        ((5e-7, 5e-4, 9e-6), "grad 1", True),
        ((5e-7, 2e-3, 9e-6), "grad 0", False),
        ((math.nan, 5e-4, 9e-6), "output", False),  # and not forgotten for the numbers after it
        ((5e-7, 5e-4, math.nan), "grad 1", False),
        ((5e-7, math.inf, 9e-6), "grad 0", False),
    ],
)
def test_the_worst_error_decides(errors, worst, passed):
    found = [Comparison(name, error, limit) for (name, limit), error in zip(LIMITS.items(), errors, strict=True)]
    decides = self_check._worst(found)
    assert decides.name == worst
    check = doctor.Check("some", "cpp", "cpu", "float32", decides.error, worst, decides.allowed)
    assert check.passed is passed


def test_a_check_that_ended_in_an_error_has_not_passed():
    assert not doctor.Check("some", "cpp", "cpu", "float32", None, "", None, "RuntimeError: no").passed


@pytest.mark.parametrize(
    ("result", "expected", "error"),
    [((3.0, 4.0), (3.0, 0.0), 4 / 3), ((0.0, 0.0), (0.0, 0.0), 0.0), ((1e-9, 0.0), (0.0, 0.0), 1e-9)],
)
def test_errors_are_relative_to_the_truth(result, expected, error):
    """Where that is not zero."""
    assert relative_error(torch.tensor(result), torch.tensor(expected)) == pytest.approx(error)


def test_nan_is_an_error_of_nan():
    assert math.isnan(relative_error(torch.tensor([math.nan, 0.0]), torch.zeros(2)))


def test_an_instruction_set_that_was_chosen_is_told(fresh):
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    built_in = dispatch.native.built_in_cpu_isa()
    code = "from mirage import doctor; import json; print(json.dumps(doctor._instruction_set()))"
    for wish, told in (("", None), (built_in, None), ("baseline", f"MIRAGE_CPU_ISA; by itself {built_in} runs")):
        done = fresh.run(code, environment={**os.environ, "MIRAGE_CPU_ISA": wish})
        found = json.loads(done.stdout)
        assert found["instruction set"] == (wish or built_in)
        assert found.get("chosen by") == (told if wish != built_in else None)
