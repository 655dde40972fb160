"""A job on a local Ray of two workers, one of which is killed on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import mirage
from mirage.images import ImageFile, read_image, write_image

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
pytest.importorskip("pyarrow", reason="needs the extra 'ray'")

from mirage import distributed  # noqa: E402

COUNT = 24


@pytest.fixture(scope="module")
def cluster():
    """Ray on two CPUs of this machine, with little shared memory."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = str(Path(mirage.__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    ray.init(
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return mirage.MIRAGE(dim=12, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1).eval()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / "in" / ("deep" if i % 3 == 0 else "") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, ImageFile(rng.integers(0, 256, (16 + i % 4, 24, 3), dtype=np.uint8)))
    (tmp_path / "in" / "broken.png").write_bytes((tmp_path / "in" / "01.png").read_bytes()[:100])
    return tmp_path


def test_a_killed_worker_loses_nothing_and_the_next_run_has_nothing_to_do(cluster, network, folder):
    killed, listed, seen = [], [], []

    def on_done(record):
        seen.append(record)
        host_and_process = record.worker.split(":")
        if not killed and record.status == "restored":
            killed.append(int(host_and_process[1]))
            os.kill(killed[0], signal.SIGKILL)

    def run(**more):
        return distributed.restore(
            folder / "in", f"file://{folder}/out", network, workers=2, batch=4, **more,
            on_listed=lambda *counts: listed.append(counts),
        )  # fmt: skip

    done = run(on_done=on_done)
    assert len(killed) == 1 and listed == [(COUNT + 1, COUNT + 1)]
    assert (done.listed, done.restored, done.failed, done.present) == (COUNT + 1, COUNT, 1, 0)
    assert len(seen) == COUNT + 1 and len({record.worker for record in seen}) > 1

    rows = {row["input"]: row for row in distributed.read_manifest(done.manifest).to_pylist()}
    assert len(rows) == COUNT + 1
    restorer = mirage.Restorer(network)
    for source in sorted((folder / "in").rglob("*.png")):
        target = folder / "out" / source.relative_to(folder / "in")
        row = rows[f"file://{source}"]
        assert row["output"] == f"file://{target}" and row["size"] == source.stat().st_size
        assert row["version"] == str(source.stat().st_mtime_ns)
        if source.name == "broken.png":
            assert row["status"] == "failed" and row["error"].startswith("broken PNG") and not target.exists()
            continue
        assert row["status"] == "restored" and row["error"] is None and row["seconds"] > 0
        pixels, restored = read_image(source).pixels, read_image(target).pixels
        assert (row["height"], row["width"]) == pixels.shape[:2]
        assert np.abs(restored.astype(int) - restorer(pixels)).max() <= 1  # threads may differ; ties round either way
        assert np.abs(restored.astype(int) - pixels).max() > 1
    names = [path.name for path in (folder / "out").rglob("*") if path.is_file() and path.suffix != ".parquet"]
    assert len(names) == COUNT and not [name for name in names if name.startswith(".")]

    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.png")}
    again = run()
    assert (again.restored, again.failed, again.finished_before, again.failed_before) == (0, 0, COUNT, 1)
    assert listed[1] == (COUNT + 1, 0)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.png")}
    with pytest.raises(ValueError, match=rf"has {COUNT} results of other settings \(format same there, jpeg here\)"):
        run(format="jpeg")


def test_what_the_caller_raises_ends_the_job_and_leaves_a_manifest(cluster, network, folder):
    def on_done(record):
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        distributed.restore(folder / "in", folder / "out", network, workers=1, batch=4, on_done=on_done)
    kept = distributed.read_manifest(folder / "out" / "manifest.parquet").to_pylist()
    written = [Path(row["output"].removeprefix("file://")) for row in kept if row["status"] == "restored"]
    assert written and all(path.exists() for path in written)
    with pytest.raises(ValueError, match="enough for 2 with 1 each, got 9"):
        distributed.restore(folder / "in", folder / "other", network, workers=9)
