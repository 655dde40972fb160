"""What every test shares: where modules are found, and where Triton kernels run.

`golden` and other helpers of this folder are importable from any test. An installed `mirage` is preferred; without one
the tests run on this checkout. Triton and CUDA kernels run on the GPU where there is one, else in Triton's interpreter
and emulated on the host.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fresh import Fresh

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when mirage_kernels is imported, like the next
    os.environ.setdefault("MIRAGE_CUDA_EMULATE", "1")
else:
    # What kernels are compared with: convolutions of float32 in float32, and products that are the same every time.
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

TESTS = Path(__file__).resolve().parent

for folder in (TESTS, TESTS / "kernels", TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from interpreter import replace_once_a_launch

    replace_once_a_launch()


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    """Runs programs in fresh processes."""
    processes = Fresh()
    yield processes
    processes.close()


def pytest_report_header() -> list[str]:
    import mirage_kernels

    reasons = ", ".join(f"{name}: {reason}" for name, reason in mirage_kernels.available().items())
    return [f"mirage_kernels: {Path(mirage_kernels.__file__).parent} ({reasons})"]
