"""benchmarks/peers_report.py: every figure in the document comes from the rows, and ratios are the right way round."""

import json
from pathlib import Path

import pytest

from benchmarks import peers_report

FACTS = {
    "device": "a CPU",
    "threads": 2,
    "torch": "2.x",
    "python": "3.x",
    "commit": "abc1234",
    "copy_bytes_per_s": 1e9,
    "macs_per_s": 1e9,
}


def _entry(test: str, median: float, **info) -> dict:
    stats = {"median": median, "q1": median * 0.9, "q3": median * 1.1, "rounds": 7}
    return {"name": f"{test}[id]", "group": "a group", "stats": stats, "extra_info": info}


def _peer(test: str, peer: str, median: float, dtype: str = "float32", mode: str = "inference", **info) -> dict:
    shape = info.pop("shape", [1, 3, 8, 16])
    common = {"peer": peer, "label": f"the {peer} peer", "mode": mode, "variant": "tiny", "shape": shape}
    return _entry(test, median, **common, dtype=dtype, versions={"onnx": "1.2.3"}, **info)


def _memory(peer: str, rss: float, tracker: float | None, mode: str = "inference") -> dict:
    return _peer("test_memory", peer, 1.0, mode=mode, rss_mib=rss, code_mib=1, built_mib=2, tracker_mib=tracker)


ERRORS = {"error_restored": 1e-6, "relative_error_restored": 2e-6}
STEP_ERRORS = {"relative_error_loss": 3e-7, "relative_error_gradients": 4e-7}
ENTRIES = [
    _peer("test_inference", "eager", 0.8, **ERRORS),
    _peer("test_inference", "openvino", 0.3, dtype="bfloat16", **ERRORS),
    _peer("test_inference", "fast", 0.2, **ERRORS),
    _peer("test_inference", "fast-bf16", 0.1, dtype="bfloat16", **ERRORS),
    _peer("test_step", "eager", 0.9, mode="step", **STEP_ERRORS),
    _peer("test_step", "fast-low", 0.3, mode="step", **STEP_ERRORS),
    _peer("test_scaling", "fast", 0.128, shape=[1, 3, 8, 16]),
    _peer("test_scaling", "fast", 0.640, shape=[1, 3, 16, 32]),
    _memory("eager", 300, 400),
    _memory("onnxruntime", 150, None),
    _memory("fast", 75, 50),
    _memory("fast-low", 500, 400, mode="forward"),
    _memory("checkpoint", 400, 200, mode="forward"),
    *(
        _entry("test_half", t, variant="tiny", half="ffn", direction="forward", implementation=i, shape=[1, 24, 8, 8],
               bytes=1_000_000, macs=2_000_000)
        for i, t in (("eager", 0.009), ("fast", 0.003))
    ),
    *(
        _entry("test_network_step", t, variant="tiny", step=step, bytes=4_000_000, macs=1, is_blocks=step == "latent")
        for step, t in (("latent", 0.06), ("output", 0.02), ("the whole network", 0.1))
    ),
]  # fmt: skip


def _run(path: Path, entries: list[dict], **facts) -> Path:
    data = {"machine_info": {"mirage": FACTS | facts}, "datetime": "2026-01-02T03:04:05", "benchmarks": entries}
    path.write_text(json.dumps(data))
    return path


def _write(tmp_path: Path, entries: list[dict]) -> list[Path]:
    return peers_report.write([_run(tmp_path / "rows.json", entries)], tmp_path / "docs")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = _write(folder, ENTRIES)
    return paths, paths[0].read_text()


def _row(text: str, *cells: str) -> list[str]:
    """Cells of the one table row that has all of these."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if all(cell in row for cell in cells)]
    return found


def test_files_and_heading(written):
    paths, text = written
    assert [path.name for path in paths] == ["cpu-peers.md", "cpu-peers-time.png", "cpu-peers-memory.png"]
    assert all(path.stat().st_size > 5000 for path in paths[1:])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
    for fact in ("a CPU", "2 threads", "onnx 1.2.3", "abc1234", "2026-01-02", "1.0 GB/s", "2 GFLOP/s"):
        assert fact in " ".join(text.split())


def test_in_short_there_is_a_line_for_each_problem(written):
    short = written[1].split("## In short")[1].split("##")[0]
    assert _row(short, "inference, time") == ["MIRAGE-T", "inference, time", "1x3x8x16", "200 ms", "4.00x", "-"]
    assert _row(short, "training step, time")[3:] == ["300 ms", "3.00x", "-"]
    assert _row(short, "inference, memory")[3:] == ["75 MiB", "4.00x", "-"]
    assert _row(short, "forward with autograd, memory")[3:] == ["500 MiB", "-", "-"]


def test_inference_is_compared_within_its_precision(written):
    _, text = written
    assert _row(text, "the eager peer", "800")[2:5] == ["800", "720 to 880", "4.00x"]
    assert _row(text, "the openvino peer")[4] == "3.00x"
    assert _row(text, "the fast-bf16 peer")[4:] == ["1.00x", "1.0e-06", "2.0e-06"]


def test_steps_are_compared_with_eager(written):
    _, text = written
    assert _row(text, "the fast-low peer", "300")[3:] == ["300", "270 to 330", "3.00x", "3.0e-07", "4.0e-07"]


def test_scaling_is_per_pixel(written):
    _, text = written
    assert _row(text, "1x3x16x32")[3:] == ["640", "1250.000", "1.25"]


def test_memory_is_a_share_of_eager(written):
    _, text = written
    assert _row(text, "the fast peer", "75")[3:] == ["75", "1", "2", "50", "25%", "12%"]
    assert _row(text, "the onnxruntime peer")[3:] == ["150", "1", "2", "-", "50%", "-"]


def test_floors_and_profile(written):
    _, text = written
    row = _row(text, "ffn")
    assert row[4:] == ["1.0", "2", "2.00", "products", "3.00", "1.50", "9.00", "3.00x"]
    assert _row(text, "output") == ["MIRAGE-T", "output", "20.0", "20.0%", "4.00"]
    assert _row(text, "latent")[2:] == ["60.0", "60.0%", "-"]
    assert _row(text, "everything outside the blocks")[2:4] == ["20.0", "20.0%"]


def test_sections_without_rows_are_left_out(tmp_path):
    paths = _write(tmp_path, ENTRIES[4:6])
    text = paths[0].read_text()
    assert "## Training step" in text and "## Inference" not in text and "## Memory" not in text
    assert [path.name for path in paths] == ["cpu-peers.md", "cpu-peers-time.png"]


def test_a_run_in_parts(tmp_path, written):
    parts = [_run(tmp_path / f"{i}.json", part) for i, part in enumerate((ENTRIES[:7], ENTRIES[7:]))]
    assert peers_report.write(parts, tmp_path / "docs")[0].read_text() == written[1]


def test_parts_of_different_runs_are_refused(tmp_path):
    parts = [_run(tmp_path / "a.json", ENTRIES[:7]), _run(tmp_path / "b.json", ENTRIES[7:], commit="def5678")]
    with pytest.raises(ValueError, match=r"b\.json: expected commit 'abc1234' as in .*a\.json, got 'def5678'"):
        peers_report.write(parts, tmp_path / "docs")
