"""docs/measured.md and the README's table: of the present code, and what the results say."""

from __future__ import annotations

import json

import pytest
from manual import ROOT

from benchmarks import measured_page


def _row(peer: str, ms: float, mib: float, **others) -> dict:
    row = {"variant": "tiny", "shape": [1, 3, 224, 224], "peer": peer, "label": f"the {peer}", "dtype": "float32"}
    return {**row, "ms": ms, "ms_min": ms / 2, "ms_max": 2 * ms, "rounds": 3, "mib": mib, "difference": 1e-6, **others}


@pytest.fixture
def checkout(tmp_path):
    """A folder with sources, a file of results of them, and the pages written from it."""
    for name, content in {
        "csrc/ops/some/cpu.cpp": "1",
        "csrc/ops/some/cuda.cu": "1",
        "csrc/ops/some/cuda_kernels.h": "1",
        "mirage_kernels/some/op.py": "1",
        "mirage_kernels/some/triton/forward.py": "1",
        "mirage_kernels/_triton/launch.py": "1",
        "mirage/cli.py": "1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    conditions = {"device": "a CPU", "isa": "avx2", "threads": 2, "torch": "2.13.0", "versions": {"openvino": "1.2"}}
    conditions |= {"python": "3.11", "date": "2026-01-02", "commit": "abc1234", "command": "make measured"}
    large = {"shape": [1, 3, 512, 768]}
    results = {
        "conditions": {**conditions, "sources": measured_page.fingerprint(tmp_path)},
        "inference": [_row("eager", 400, 200), _row("fast", 100, 50), _row("eager", 4000.4, 900, **large)],
        "step": [_row("eager", 900, 300), _row("fast-low", 300, 30)],
        "table6": {
            "paper": [{"method": "MIRAGE-T", "psnr": 32.77, "memory": 3729, "params": 6.21, "gmacs": 16}],
            "measured": [
                {"method": "MIRAGE-T", "implementation": "fast", "params": 6.2, "gmacs": 16.25, "memory_mib": 252.4}
                | {"seconds": 0.2271}
            ],
        },
    }
    (tmp_path / "docs").mkdir()
    (tmp_path / measured_page.RESULTS).mkdir(parents=True)
    (tmp_path / measured_page.RESULTS / "cpu.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("a\n<!-- table: inference -->\nold\n<!-- end of table -->\nb\n")
    measured_page.write(measured_page.RESULTS / "cpu.json", tmp_path)
    return tmp_path


def test_pages_hold_what_was_measured(checkout):
    page = (checkout / "docs/measured.md").read_text()
    assert "a CPU (avx2), 2 threads, torch 2.13.0, openvino 1.2, Python 3.11, 2026-01-02, commit abc1234" in page
    assert "| MIRAGE-T | 224x224 | the fast | 100 | 50 to 200 | 4.00x | 50 | 25% | 1.0e-06 |" in page
    assert "| MIRAGE-T | paper | 32.77 | 6.21 | 16 | 3729 |  |" in page
    assert "| MIRAGE-T | ours, fast |  | 6.20 | 16.25 | 252 | 0.227 |" in page
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("a\n<!-- table") and readme.endswith("b\n") and "old" not in readme
    assert "|  | MIRAGE-T 224x224, ms | MiB | MIRAGE-T 512x768, ms | MiB |" in readme
    assert "| the eager | 400 | 200 | 4000 | 900 |\n| **the fast** | **100** | **50** | **-** | **-** |" in readme


def test_what_was_not_measured_leaves_the_pages_valid(checkout):
    for name in ("csrc/ops/some/cuda.cu", "csrc/ops/some/cuda_kernels.h", "mirage_kernels/some/triton/forward.py"):
        (checkout / name).write_text("2")
    for name in ("mirage_kernels/_triton/launch.py", "mirage/cli.py"):
        (checkout / name).write_text("2")
    assert list(measured_page.stale(checkout)) == []


@pytest.mark.parametrize("name", ["csrc/ops/some/cpu.cpp", "mirage_kernels/some/op.py", "mirage_kernels/some/new.py"])
def test_other_sources_make_the_page_stale(checkout, name):
    (checkout / name).write_text("2")
    (problem,) = measured_page.stale(checkout)
    assert "other sources" in problem


def test_a_number_changed_by_hand_is_found(checkout):
    for name in ("docs/measured.md", "README.md"):
        path = checkout / name
        path.write_text(path.read_text().replace("400", "401"))
    assert len(list(measured_page.stale(checkout))) == 2


def test_a_missing_page_is_found(checkout):
    (checkout / measured_page.RESULTS / "cpu.json").unlink()
    assert "names no file" in next(measured_page.stale(checkout))
    (checkout / "docs/measured.md").unlink()
    assert "missing" in next(measured_page.stale(checkout))


def test_every_measured_file_is_there():
    assert [name for name in measured_page.MEASURED if not (ROOT / name).exists()] == []
    found = {path.as_posix() for path in measured_page.measured_files()}
    assert {"CMakeLists.txt", "csrc/common/cpu/gemm.h", "mirage_kernels/spd_covariance/cpp.py"} <= found
    assert not any("triton" in path or path.endswith(".cu") for path in found)


def test_the_pages_are_of_this_code():
    assert list(measured_page.stale()) == []
