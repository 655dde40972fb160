"""docs/family.md and its table in the README: what the results say, and of which sources."""

from __future__ import annotations

import json

import pytest

from benchmarks import family

FACTS = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "python": "3.11", "date": "2026-01-02"}
FACTS |= {"commit": "abc1234", "macs_per_s": 40e9, "copy_bytes_per_s": 12.5e9}


def benchmark(peer, seconds, test="test_inference", **others):
    """An entry of pytest-benchmark's JSON."""
    info = {"peer": peer, "label": f"the {peer}", "dtype": "bfloat16" if peer == "fast-bf16" else "float32"}
    info |= {"variant": "restormer", "mode": "inference", "shape": [1, 3, 256, 256], "versions": {"openvino": "1.2"}}
    info |= {"error_restored": 1e-6, "relative_error_restored": 2e-6, **others}
    stats = {"median": seconds, "q1": seconds, "q3": seconds, "rounds": 5}
    return {"name": f"{test}[{peer}]", "group": "a", "stats": stats, "extra_info": info}


@pytest.fixture
def checkout(tmp_path):
    """A folder with sources, and the pages of a run of them."""
    for name in ("mirage_kernels/some/op.py", "mirage/networks/some.py", "mirage/cli.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    entries = [benchmark("eager", 4.0), benchmark("openvino-f32", 1.5), benchmark("fast", 1.0)]
    entries += [benchmark("fast-bf16", 0.5), benchmark("eager", 0.9, variant="nafnet32"),
                benchmark("fast", 0.3, variant="nafnet32")]  # fmt: skip
    memory = {"code_mib": 1, "built_mib": 1, "tracker_mib": 5}
    entries += [benchmark("eager", 1, "test_memory", rss_mib=900, **memory)]
    entries += [benchmark("fast", 1, "test_memory", rss_mib=300, **memory)]
    run = {"machine_info": {"mirage": FACTS}, "datetime": "2026-01-02T00:00:00", "benchmarks": entries}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for folder in (family.RESULTS, family.PAGE.parent):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text("a\n<!-- table: family -->\nold\n<!-- end of family -->\nb\n")
    results = family.results_of([tmp_path / "run.json"], "pytest some", tmp_path)
    (tmp_path / family.RESULTS / "family.json").write_text(json.dumps(results))
    family.write((family.RESULTS / "family.json").as_posix(), tmp_path)
    return tmp_path


def test_pages_hold_what_was_measured(checkout):
    text = (checkout / family.PAGE).read_text()
    assert "a CPU, 2 threads, torch 2.13.0, openvino 1.2, Python 3.11, 2026-01-02, commit abc1234." in text
    assert "80 GFLOP/s" in text and "    pytest some\n" in text and "those that were measured" in text
    assert "| Restormer | inference, time | 1x3x256x256 | 1000 ms | 4.00x | 1.50x |" in text
    assert "| Restormer | inference, memory | 1x3x256x256 | 300 MiB | 3.00x | - |" in text
    assert "| the openvino-f32 | float32 | 1500 | 1500 to 1500 | 1.50x | 1.0e-06 | 2.0e-06 |" in text
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("a\n<!-- table") and readme.endswith("b\n") and "old" not in readme
    assert "| Restormer | 256x256 | 4000 | 1500 | 1000 | 500 | 4.00x |" in readme
    assert "| NAFNet, width 32 | 256x256 | 900 | - | 300 | - | 3.00x |" in readme
    assert list(family.stale(checkout)) == []


@pytest.mark.parametrize("name", ["mirage_kernels/some/op.py", "mirage/networks/some.py"])
def test_pages_say_that_the_sources_have_changed(checkout, name):
    (checkout / name).write_text("2")
    assert len(list(family.stale(checkout))) == 2
    family.write(family.named(family.PAGE, checkout), checkout)
    assert list(family.stale(checkout)) == []
    for page in ("README.md", family.PAGE):
        text = (checkout / page).read_text()
        assert "have changed since these figures were taken" in text and "those that were measured" not in text
    (checkout / name).write_text("1")
    family.write(family.named(family.PAGE, checkout), checkout)
    assert not any("have changed" in (checkout / page).read_text() for page in ("README.md", family.PAGE))


def test_other_sources_do_not_count(checkout):
    (checkout / "mirage/cli.py").write_text("2")
    assert list(family.stale(checkout)) == []


def test_what_is_wrong_is_found(checkout):
    page = checkout / family.PAGE
    page.write_text(page.read_text().replace("1500", "1501"))
    (problem,) = family.stale(checkout)
    assert "docs/family.md is not what benchmarks/results/family.json says" in problem
    page.unlink()
    assert "names no file" in next(family.stale(checkout))
    with pytest.raises(ValueError, match="table: family"):
        family.fill("no place", "block", family.BLOCK)


def test_the_pages_are_of_this_code():
    assert list(family.stale()) == []
