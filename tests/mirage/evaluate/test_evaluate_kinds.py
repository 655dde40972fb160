"""mirage evaluate on clean images that get a degradation: ``--kind``."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

for _module in ("PIL", "imagecodecs", "tifffile", "skimage"):
    pytest.importorskip(_module, reason="the extra [evaluate] is not installed")

from mirage.cli import main  # noqa: E402
from mirage.degradations import GaussianNoise, create  # noqa: E402
from mirage.degradations.files import Pairs, degrade_files, read_pixels  # noqa: E402
from mirage.evaluate import Task, evaluate, find_sets  # noqa: E402
from mirage.evaluate.methods import Identity, NonLocalMeans  # noqa: E402
from mirage.evaluate.protocols import plan  # noqa: E402
from mirage.evaluate.run import prepare  # noqa: E402
from mirage.images import ImageFile, write_image  # noqa: E402


@pytest.fixture
def clean(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "clean").mkdir()
    for name in "ab":
        write_image(tmp_path / "clean" / f"{name}.png", ImageFile(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)))
    return tmp_path / "clean"


def call(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize("kind", ("GN", "low_haze"))
def test_inputs_are_those_that_degrade_writes(clean, tmp_path, kind):
    degradation = create(kind)
    degrade_files([clean], tmp_path / "pairs", Pairs({degradation.label: degradation}, seed=3))
    (found,) = find_sets("S", clean)
    for item in found.items:
        degraded, target = prepare(item, None, seed=3, crop=0, kind=kind)
        assert degraded.dtype == target.dtype == np.float32
        assert np.array_equal(degraded, read_pixels(tmp_path / "pairs" / "degraded" / f"{item.name}.png"))
        assert np.array_equal(target, read_pixels(item.target))


def test_kinds_are_tasks_of_their_own_and_go_on(clean, tmp_path):
    path = tmp_path / "results.json"
    arguments = ("--set", f"S={clean}", "--method", "identity", "--json", path, "--csv", tmp_path / "t.csv")
    result = call(*arguments, "--kind", "GN", "--kind", "jpeg")
    assert result.exit_code == 0, result.output
    assert "S gaussian_noise" in result.output and "S jpeg" in result.output and "sigma" not in result.output
    first = json.loads(path.read_text())
    assert [(row["kind"], row["image"]) for row in first["images"]] == [
        ("gaussian_noise", "a"), ("gaussian_noise", "b"), ("jpeg", "a"), ("jpeg", "b")]  # fmt: skip
    more = call(*arguments, "--kind", "all", "--sigma", "25")
    assert more.exit_code == 0 and "S sigma 25" in more.output and "S salt_and_pepper" in more.output
    second = json.loads(path.read_text())
    assert second["images"][:4] == first["images"] and len(second["images"]) == 2 * 12
    with open(tmp_path / "t.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == "average"]
    assert len(rows) == 12 and {row["kind"] for row in rows if not row["sigma"]} == {
        create(kind).label for kind in ("GB", "MB", "RL", "SR", "RI", "DB", "JP", "PO", "IN", "GN", "SP")
    }


def test_averages_are_of_their_kind(clean):
    (found,) = find_sets("S", clean)
    tasks, _ = plan([found], (), None, ["gaussian_noise", "defocus_blur"])
    assert tasks == [Task(found, kind="gaussian_noise"), Task(found, kind="defocus_blur")]
    done = evaluate(tasks, [Identity(), NonLocalMeans()], metrics=["psnr"], crop=0)
    assert [(each.method, each.kind, each.images) for each in done.averages] == [
        ("input", "gaussian_noise", 2), ("input", "defocus_blur", 2)]  # fmt: skip
    assert any("left out of S gaussian_noise: it removes noise of known sigma" in note for note in done.notes)
    for task, average in zip(tasks, done.averages, strict=True):
        errors = [prepare(item, None, crop=0, kind=task.kind) for item in found.items]
        psnr = np.mean([-10 * np.log10(np.mean((a - b).astype(np.float64) ** 2)) for a, b in errors])
        assert average.values["psnr"] == pytest.approx(psnr, abs=1e-4)


def test_other_ranges_are_computed_again(clean, tmp_path, monkeypatch):
    (found,) = find_sets("S", clean)
    task, path = Task(found, kind="gaussian_noise"), tmp_path / "r.json"

    def psnr():
        (average,) = evaluate([task], [Identity()], metrics=["psnr"], path=path).averages
        return average.values["psnr"]

    first = psnr()
    assert psnr() == first
    monkeypatch.setattr(GaussianNoise.__init__, "__defaults__", ((1, 2),))  # as another version of the package may have
    assert psnr() > first + 10


def test_kinds_that_are_none_and_pairs(clean, tmp_path):
    result = call("--set", f"S={clean}", "--method", "identity", "--kind", "gausian_noise")
    assert result.exit_code == 2 and "the nearest is 'gaussian_noise'" in result.output
    degrade_files([clean], tmp_path / "pairs", Pairs({"jpeg": create("JP")}))
    (pairs,) = find_sets("P", tmp_path / "pairs")
    done = evaluate([Task(pairs, kind="jpeg")], [Identity()], metrics=["psnr"])
    assert "kind jpeg goes with clean images" in done.failures[0].error and done.failures[0].kind == "jpeg"
    assert plan([pairs], (), None, ["jpeg"])[0] == [Task(pairs)]


@pytest.mark.parametrize("option, value", [("--sigma", 25), ("--kind", "GB")])
def test_what_no_image_would_get_is_refused(option, value, clean, tmp_path):
    """Pairs and the sets of a protocol; another set of clean images beside them gets it."""
    degrade_files([clean], tmp_path / "pairs", Pairs({"jpeg": create("JP")}, seed=0))
    arguments = ("--method", "identity", option, value)
    of_protocol = call("--protocol", "denoise", "--set", f"CBSD68={clean}", *arguments)
    of_pairs = call("--set", f"P={tmp_path / 'pairs'}", *arguments)
    assert of_protocol.exit_code == of_pairs.exit_code == 2
    assert f"{option} {value}: expected a set of clean images to apply it to, got CBSD68" in of_protocol.output
    assert "got P; pairs have inputs" in of_pairs.output
    beside = call("--protocol", "denoise", "--set", f"CBSD68={clean}", "--set", f"S={clean}", *arguments)
    assert beside.exit_code == 0 and ("S sigma 25" if option == "--sigma" else "S gaussian_blur") in beside.output
