"""What a job over many machines is made of, without Ray: places, plan, manifest, and a worker in this process."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch

import mirage
from mirage.images import ImageFile, decode_image, encode_image

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("pyarrow", reason="needs the extra 'ray'")

from mirage.distributed import read_manifest  # noqa: E402
from mirage.distributed.cluster import Share, share_out  # noqa: E402
from mirage.distributed.ledger import Ledger  # noqa: E402
from mirage.distributed.manifest import FAILED, PRESENT, RESTORED, History, ManifestWriter, Record  # noqa: E402
from mirage.distributed.places import Place, retrying  # noqa: E402
from mirage.distributed.plan import Planner, Task, as_block, batches  # noqa: E402
from mirage.distributed.worker import Worker, WorkerOptions  # noqa: E402


@pytest.fixture
def memory():
    """fsspec's file system in this process's memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def picture(seed: int, height: int = 16, width: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode_image(ImageFile(pixels), "png")


def place(url) -> Place:
    return Place(str(url), {})


# --- places


def test_a_folder_is_listed_at_any_depth_with_sizes_and_versions(memory, tmp_path):
    for name, data in (("a.png", b"12345"), ("deep/er/b.jpg", b"1"), ("deep/c.png", b"")):
        memory.pipe_file(f"/in/{name}", data)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for url in ("memory://in/", tmp_path):
        found = list(place(url).entries())
        assert sorted((one.place, one.size) for one in found) == [("a.png", 5), ("deep/c.png", 0), ("deep/er/b.jpg", 1)]
        assert all(one.version for one in found)
        assert all(place(url).read(one.path) == place(url).fs.cat_file(one.path) for one in found)
    os.utime(tmp_path / "a.png", ns=(0, 12345))
    assert {one.place: one.version for one in place(tmp_path).entries()}["a.png"] == "12345"


def test_a_file_and_a_pattern_are_places_too(memory):
    for name in ("x/1.png", "x/y/2.png", "x/y/3.jpg"):
        memory.pipe_file(f"/in/{name}", b"1")
    assert [one.place for one in place("memory://in/x/1.png").entries()] == ["1.png"]
    assert sorted(one.place for one in place("memory://in/x/**/*.png").entries()) == ["1.png", "y/2.png"]
    for missing in ("memory://in/none", "memory://in/*.gif"):
        with pytest.raises(FileNotFoundError):
            list(place(missing).entries())
    with pytest.raises(ValueError, match="nosuch"):
        list(place("nosuch://in").entries())


def test_names_are_urls(tmp_path, memory):
    assert place(tmp_path).name(f"{tmp_path}/a.png") == f"file://{tmp_path}/a.png"
    assert place("memory://in").name("/in/a.png") == "memory:///in/a.png"


def test_links_to_folders_are_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"1")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    assert [one.place for one in place(tmp_path / "in").entries()] == ["a.png"]


def test_a_local_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = place(tmp_path)
    out.write(f"{tmp_path}/deep/a.png", b"first")
    out.write(f"{tmp_path}/deep/a.png", b"second")
    assert (tmp_path / "deep/a.png").read_bytes() == b"second"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        out.write(f"{tmp_path}/deep/a.png", b"third")
    assert (tmp_path / "deep/a.png").read_bytes() == b"second"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_elsewhere_a_file_is_moved_into_place_and_stores_take_it_in_one_put(tmp_path, memory, monkeypatch):
    calls = []
    other = Place("dir::file://", {"dir": {"path": str(tmp_path)}})
    assert other.protocols == ("dir",)
    monkeypatch.setattr(type(other.fs), "mv", lambda self, a, b, **k: calls.append((a, b)) or os.rename(
        tmp_path / a.lstrip("/"), tmp_path / b.lstrip("/")))  # fmt: skip
    other.write("sub/a.png", b"whole")
    assert (tmp_path / "sub/a.png").read_bytes() == b"whole"
    assert calls == [(other.temporary("sub/a.png", "0"), "sub/a.png")]
    place("memory://out").write("/out/b.png", b"object")
    assert memory.cat_file("/out/b.png") == b"object" and memory.find("/out") == ["/out/b.png"]


def test_errors_that_may_pass_are_tried_again():
    def failing(times, error):
        left = [error] * times
        return lambda: "done" if not left else raise_(left.pop())

    def raise_(error):
        raise error

    assert retrying(failing(2, ConnectionError("reset")), 2, wait=0) == "done"
    with pytest.raises(ConnectionError):
        retrying(failing(3, ConnectionError("reset")), 2, wait=0)
    with pytest.raises(FileNotFoundError):
        retrying(failing(1, FileNotFoundError("gone")), 2, wait=0)


# --- manifest

SETTINGS = {"weights": "abc", "format": "same"}
NOW = datetime(2026, 5, 4, tzinfo=timezone.utc)


def record(name: str, status: str = RESTORED, version: str = "1", **more) -> Record:
    return Record(f"memory:///in/{name}", f"memory:///out/{name}", status, version=version, size=1, finished=NOW,
                  **more)  # fmt: skip


def write(run: str, *records: Record, settings=SETTINGS, url="memory://out/manifest.parquet") -> None:
    writer = ManifestWriter(place(url), run, settings)
    for one in records:
        writer.add(one)
    writer.flush()


def test_the_manifest_has_the_last_row_of_each_input_and_all_its_columns(memory):
    write("run1", record("a.png", FAILED, error="broken"), record("b.png", notes=("no ICC",), width=7, height=5))
    write("run2", record("a.png", seconds=1.5, worker="host:1"))
    rows = {row["input"]: row for row in read_manifest("memory://out/manifest.parquet").to_pylist()}
    assert set(rows) == {"memory:///in/a.png", "memory:///in/b.png"}
    assert rows["memory:///in/a.png"] == {
        **dict(input="memory:///in/a.png", output="memory:///out/a.png", status="restored", seconds=1.5, error=None),
        **dict(notes=[], size=1, version="1", width=0, height=0, worker="host:1", finished=NOW),
    }
    assert rows["memory:///in/b.png"]["notes"] == ["no ICC"] and rows["memory:///in/b.png"]["width"] == 7
    with pytest.raises(FileNotFoundError, match="no manifest"):
        read_manifest("memory://elsewhere")


def test_parts_are_written_as_time_passes_so_that_a_crash_loses_little(memory):
    writer = ManifestWriter(place("memory://out/m"), "run", SETTINGS, every=0.0)
    writer.add(record("a.png"))
    assert read_manifest("memory://out/m")["input"].to_pylist() == ["memory:///in/a.png"]  # nothing was flushed
    writer = ManifestWriter(place("memory://out/n"), "run", SETTINGS, every=1e9, rows=2)
    writer.add(record("a.png"))
    assert not memory.exists("/out/n")
    writer.add(record("b.png"))
    assert len(read_manifest("memory://out/n")) == 2


def test_a_broken_part_is_named(memory):
    memory.pipe_file("/out/m/part-x.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"cannot read memory:///out/m/part-x\.parquet"):
        read_manifest("memory://out/m")


# --- plan


def plan(memory, *, inputs=("memory://in",), out="memory://out", format="same", overwrite=False, retry_failed=False,
         settings=SETTINGS):  # fmt: skip
    records = []
    history = History(place("memory://out/manifest.parquet"), settings)
    planner = Planner([place(url) for url in inputs], place(out), format, overwrite, retry_failed, history,
                      records.append)  # fmt: skip
    tasks = list(planner.tasks())
    return planner, [task.path for task in tasks], records


def versions(memory) -> dict[str, str]:
    return {one.path: one.version for one in place("memory://in").entries()}


def test_a_second_run_does_what_is_left(memory):
    for name in "abcde":
        memory.pipe_file(f"/in/{name}.png", b"1")
    memory.pipe_file("/out/e.png", b"from before there was a manifest")
    planner, todo, records = plan(memory)
    assert todo == [f"/in/{name}.png" for name in "abcd"] and planner.listed == 5
    assert [(one.input, one.status) for one in records] == [("memory:///in/e.png", PRESENT)]
    seen = versions(memory)
    write("run1", record("a.png", version=seen["/in/a.png"]), record("b.png", version="another"),
          record("c.png", FAILED, version=seen["/in/c.png"], error="x"), *records)  # fmt: skip
    for name in "ab":
        memory.pipe_file(f"/out/{name}.png", b"result")
    planner, todo, records = plan(memory)
    assert todo == ["/in/b.png", "/in/d.png"] and not records  # b has changed since, d is new, c failed
    assert (planner.finished, planner.failed_before) == (2, 1)
    assert plan(memory, retry_failed=True)[1] == ["/in/b.png", "/in/c.png", "/in/d.png"]
    assert plan(memory, overwrite=True)[1] == [f"/in/{name}.png" for name in "abcde"]


def test_results_of_other_settings_are_not_taken_for_finished(memory):
    memory.pipe_file("/in/a.png", b"1")
    write("run1", record("a.png", version=versions(memory)["/in/a.png"]))
    history = History(place("memory://out/manifest.parquet"), {**SETTINGS, "weights": "xyz"})
    assert history.with_other_settings == 1 and history.differences == {"weights": ("abc", "xyz")}
    write("run2", record("a.png", version=versions(memory)["/in/a.png"]), settings={**SETTINGS, "weights": "xyz"})
    history = History(place("memory://out/manifest.parquet"), {**SETTINGS, "weights": "xyz"})
    assert history.with_other_settings == 0 and not history.differences  # each was restored again


def test_what_is_no_image_is_skipped_and_two_inputs_never_share_an_output(memory):
    for name in ("a.png", "a.jpg", "notes.txt", "._a.png", "out/z.png", "out/.mirage-00-0.tmp"):
        memory.pipe_file(f"/in/{name}", b"1")
    planner, todo, records = plan(memory, out="memory://in/out", format="png")
    assert todo == ["/in/a.jpg"] and planner.listed == 2
    assert [(one.input, one.status) for one in records] == [("memory:///in/a.png", FAILED)]
    assert records[0].error == "its output memory:///in/out/a.png is already that of another input"
    assert planner.skipped_count == 2 and planner.skipped == ["memory:///in/._a.png", "memory:///in/notes.txt"]


def test_an_input_is_never_overwritten(memory):
    memory.pipe_file("/in/a.png", b"1")
    memory.pipe_file("/in/b.jpg", b"1")
    _, todo, records = plan(memory, out="memory://in", format="png", overwrite=True)
    assert todo == ["/in/b.jpg"]
    assert [(one.input, one.error) for one in records] == [("memory:///in/a.png", "refusing to overwrite an input")]


def test_batches_are_of_about_equal_work():
    tasks = [Task(0, f"{i}", f"{i}", size, "") for i, size in enumerate((5, 5, 5, 20, 1, 1, 1, 1))]
    assert [[task.size for task in one] for one in batches(iter(tasks), 3, 12)] == [[5, 5], [5], [20], [1, 1, 1], [1]]
    assert list(batches(iter([]), 3, 12)) == []
    assert as_block(tasks[:2], 7).to_pylist()[0]["tasks"][1] == {
        **dict(index=8, root=0, path="1", target="1", size=5, version=""),
    }


@pytest.mark.parametrize(
    ("machines", "workers", "cpus", "expected"),
    [
        ([(2, 0)], None, None, Share(1, 2, 0)),
        ([(2, 0)], 2, None, Share(2, 1, 0)),
        ([(16, 0), (8, 0)], None, None, Share(6, 4, 0)),
        ([(16, 0), (8, 0)], 3, None, Share(3, 8, 0)),
        ([(16, 0), (8, 0)], 2, 5, Share(2, 5, 0)),
        ([(16, 8), (16, 8)], None, None, Share(16, 0, 1)),
        ([(16, 8)], 3, None, Share(3, 0, 1)),
    ],
)
def test_machines_are_shared_out(machines, workers, cpus, expected):
    assert share_out(machines, workers, cpus) == expected


def test_more_workers_than_machines_hold_are_refused():
    for machines, workers, cpus in (([(2, 0)], 3, None), ([(2, 0)], 1, 4), ([(16, 2)], 3, None), ([(2, 0)], 0, None)):
        with pytest.raises(ValueError, match="workers: "):
            share_out(machines, workers, cpus)
    assert share_out([(16, 2)], 4, None, use_gpus=False) == Share(4, 4, 0)


# --- worker


def inverted(pixels: np.ndarray) -> np.ndarray:
    return 255 - pixels


def work(memory, restorer, ledger, tasks, **options):
    shared = WorkerOptions((place("memory://in"),), place("memory://out"), "run", **{"retries": 0, **options})
    return Worker(restorer, shared, ledger)(as_block(tasks, 0))


def tasks_for(memory, **files: bytes) -> list[Task]:
    for name, data in files.items():
        memory.pipe_file(f"/in/{name}.png", data)
    return [Task(0, f"/in/{name}.png", f"/out/sub/{name}.png", len(data), "v") for name, data in files.items()]


def test_a_worker_restores_a_batch_and_one_bad_file_stops_nothing(memory):
    good = {name: picture(seed, 10 + seed) for seed, name in enumerate("acd")}
    tasks = tasks_for(memory, a=good["a"], b=good["a"][:60], c=good["c"], d=good["d"])
    tasks.insert(1, replace(tasks[0], path="/in/gone.png", target="/out/gone.png"))
    ledger = Ledger()
    assert work(memory, inverted, ledger, tasks).to_pylist() == [{"files": 5}]
    rows = {one.input: one for one in ledger.fetch()}
    for name, data in good.items():
        before, after = decode_image(data).pixels, decode_image(memory.cat_file(f"/out/sub/{name}.png")).pixels
        assert np.array_equal(after, 255 - before)
        row = rows[f"memory:///in/{name}.png"]
        assert (row.status, row.error, row.output) == (RESTORED, None, f"memory:///out/sub/{name}.png")
        assert (row.height, row.width, row.size, row.version) == (*before.shape[:2], len(data), "v") and row.seconds > 0
    assert rows["memory:///in/b.png"].error.startswith("broken PNG")
    assert rows["memory:///in/gone.png"].error.startswith("FileNotFoundError")
    assert sorted(memory.find("/out")) == [f"/out/sub/{name}.png" for name in "acd"]
    assert not ledger.fetch()


def test_what_a_network_or_a_store_raises_is_a_record(memory, monkeypatch):
    def failing(pixels):
        raise RuntimeError("no such luck") if pixels[0, 0, 0] == 1 else MemoryError

    flat = [encode_image(ImageFile(np.full((8, 8, 3), value, np.uint8)), "png") for value in (1, 2)]
    ledger = Ledger()
    work(memory, failing, ledger, tasks_for(memory, a=flat[0], b=flat[1]))
    assert [one.error for one in ledger.fetch()] == ["RuntimeError: no such luck", "MemoryError: out of memory"]
    monkeypatch.setattr(type(memory), "pipe_file", lambda *_, **__: 1 / 0)
    ledger = Ledger()
    work(memory, inverted, ledger, [Task(0, "/in/a.png", "/out/a.png", 1, "")])
    assert [one.error for one in ledger.fetch()] == ["ZeroDivisionError: division by zero"]


class Killed(BaseException):
    """Stands for a signal: nothing in a worker's Python sees it coming or handles it."""


def test_after_a_death_a_batch_goes_on_and_the_file_that_kills_is_given_up(memory):
    deadly = encode_image(ImageFile(np.full((8, 8, 3), 9, np.uint8)), "png")
    tasks = tasks_for(memory, a=picture(1), b=picture(2), c=deadly, d=picture(3), e=picture(4))
    ledger, restored = Ledger(), []

    def restorer(pixels):
        if (pixels == 9).all():
            raise Killed
        restored.append(pixels)
        return 255 - pixels

    for _ in range(3):  # Ray builds the worker again, and gives it the same batch
        with pytest.raises(Killed):
            work(memory, restorer, ledger, tasks)
    assert work(memory, restorer, ledger, tasks).to_pylist() == [{"files": 5}]
    rows = ledger.fetch()
    assert sorted(one.input for one in rows) == [f"memory:///in/{name}.png" for name in "abcde"]  # once each
    failed = [one for one in rows if one.status == FAILED]
    assert [one.input for one in failed] == ["memory:///in/c.png"]
    assert failed[0].error.startswith("its worker died 3 times at this file")
    assert len(restored) in (4, 5)  # the one before may have been on its way to the store when the worker died
    for name, seed in (("a", 1), ("b", 2), ("d", 3), ("e", 4)):
        after = decode_image(memory.cat_file(f"/out/sub/{name}.png")).pixels
        assert np.array_equal(after, 255 - decode_image(picture(seed)).pixels)


def test_the_temporary_of_a_killed_worker_is_removed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture(1))
    out = place(tmp_path / "out")
    target = f"{out.root}/a.png"
    left = out.temporary(target, "run.0")
    out.fs.makedirs(out.root)
    out.fs.pipe_file(left, b"half of it")
    ledger = Ledger()
    ledger.begin(0)
    options = WorkerOptions((place(tmp_path / "in"),), out, "run")
    Worker(inverted, options, ledger)(as_block([Task(0, f"{tmp_path}/in/a.png", target, 1, "")], 0))
    assert [one.status for one in ledger.fetch()] == [RESTORED]
    assert os.listdir(out.root) == ["a.png"]


def test_formats_are_converted(memory):
    tasks = [replace(task, target="/out/a.jpg") for task in tasks_for(memory, a=picture(5))]
    ledger = Ledger()
    work(memory, inverted, ledger, tasks, format="jpeg", quality=100)
    assert [one.error for one in ledger.fetch()] == [None]
    image = decode_image(memory.cat_file("/out/a.jpg"))
    assert image.format == "jpeg"
    assert np.abs(image.pixels.astype(int) - (255 - decode_image(picture(5)).pixels.astype(int))).mean() < 2


# --- arguments


def test_arguments_that_cannot_be_are_refused_before_anything_starts(tmp_path):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    from mirage.distributed import restore

    net = torch.nn.Identity()
    for arguments, message in (
        ((["memory://in"], tmp_path, net, {}), "memory://in: memory:// is another one in each process"),
        (([], tmp_path, net, {}), "inputs: expected one or more"),
        ((tmp_path, tmp_path, net, {"format": "bmp"}), "format: expected same"),
        ((tmp_path, tmp_path, net, {"quality": 0}), "quality: expected 1 to 100, got 0"),
        ((tmp_path, tmp_path, net, {"batch": 0}), "batch: expected 1 or more, got 0"),
        ((tmp_path, tmp_path, net, {"retries": -1}), "retries: expected 0 or more, got -1"),
    ):
        *positional, options = arguments
        with pytest.raises(ValueError, match=message):
            restore(*positional, **options)
    with pytest.raises(FileNotFoundError):
        restore(tmp_path / "none", tmp_path / "out", mirage.mirage_tiny())
