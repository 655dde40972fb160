"""benchmarks/gpu.py and gpu_report.py, on a CPU: what is called computes what it should, and rows become tables."""

import json

import pytest
import torch
from harness import require

import mirage_kernels
from benchmarks import gpu, gpu_report

PROBLEM = gpu.Problem("tiny", (1, 3, 16, 16), torch.float32, "cpu")


def test_inference_is_that_of_the_reference():
    expected = gpu.truth(PROBLEM)
    for peer in ("eager", "fast"):
        assert gpu.relative_error(gpu.inference(PROBLEM, peer)(), expected) < 1e-6
    for peer in ("graph", "graph-cuda"):
        with pytest.raises(ValueError, match="example: expected a tensor on a CUDA device"):
            gpu.inference(PROBLEM, peer)


def test_inference_in_cuda_is_that_of_the_reference():
    require("cuda")
    assert gpu.relative_error(gpu.inference(PROBLEM, "cuda")(), gpu.truth(PROBLEM)) < 1e-6
    assert mirage_kernels.last_used("transformer_blocks") == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_have_the_same_loss(dtype):
    problem = gpu.Problem("tiny", (2, 3, 16, 16), dtype, "cpu")
    torch.manual_seed(0)
    losses = []
    for peer in ("eager", "fast-low"):
        call = gpu.step(problem, peer)
        torch.manual_seed(0)  # of the stochastic depth
        losses.append(call())
    assert losses[0].isfinite()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5 if dtype == torch.float32 else 2e-2)


def test_samples_are_taken_after_warming_up():
    calls = []
    found = gpu.samples(lambda: calls.append(None), "cpu", seconds=0.0, rounds=(5, 100))
    assert len(found) == 5 and min(found) > 0
    assert len(calls) == 3 + 1 + 5
    assert gpu.peak_mib(lambda: None, "cpu") is None


def _entry(test, group, median, **info):
    stats = {"median": median, "q1": median, "q3": median, "rounds": 5}
    return {"name": f"{test}[x]", "group": group, "stats": stats, "extra_info": info}


def _written(tmp_path):
    mirage = {"device": "NVIDIA H200", "torch": "2.11", "commit": "abc", "copy_bytes_per_s": 4e12}
    inference = {"shape": [1, 3, 224, 224], "error": 1e-6, "peak_mib": 100.0}
    stage = {"stage": "ffn", "bytes": int(4e9), "shape": [1, 24, 8, 8]}
    entries = [
        _entry("test_inference", "i", 0.010, peer="eager", **inference),
        _entry("test_inference", "i", 0.004, peer="fast", **inference),
        _entry("test_inference", "i", 0.0009, peer="graph", **inference),
        _entry("test_step", "s", 0.32, peer="eager", shape=[32, 3, 128, 128], peak_mib=40000.0),
        _entry("test_step", "s", 0.1, peer="fast-low", shape=[32, 3, 128, 128], peak_mib=4000.0),
        _entry("test_stage", "g", 0.005, peer="eager", **stage),
        _entry("test_stage", "g", 0.002, peer="fast", **stage),
    ]
    path = tmp_path / "gpu.json"
    data = {"benchmarks": entries, "machine_info": {"mirage": mirage}, "datetime": "2026-11-22T03:00:00"}
    path.write_text(json.dumps(data))
    return path


def test_report_and_results_file(tmp_path, capsys):
    path = _written(tmp_path)
    assert gpu_report.main([str(path), "--results", str(tmp_path / "results")]) == 0
    text = capsys.readouterr().out
    assert "| i | eager | 10.0 | 10.0 to 10.0 | 1.00x | 100 | 1.0e-06 |" in text
    assert "| i | graph | 0.900 | 0.900 to 0.900 | 11.11x | 100 | 1.0e-06 |" in text
    assert "| s | fast-low | 100 | 100 to 100 | 3.20x | 4000 | - |" in text
    assert "| g | 5.00 | 2.00 | 2.50x | 50% |" in text
    (written,) = (tmp_path / "results").iterdir()
    assert written.name == "nvidia-h200-2026-11-22.json"
    data = json.loads(written.read_text())
    assert data["machine"]["commit"] == "abc" and len(data["rows"]) == 7
    assert data["rows"][1] | {"median": 0.004, "peer": "fast"} == data["rows"][1]


def test_sections_without_rows_are_left_out(tmp_path, capsys):
    path = _written(tmp_path)
    data = json.loads(path.read_text())
    data["benchmarks"] = data["benchmarks"][5:]
    path.write_text(json.dumps(data))
    gpu_report.main([str(path), "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert "## Stages" in text and "## Inference" not in text
