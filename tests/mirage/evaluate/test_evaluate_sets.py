"""Which folders are sets of test images, and the paper's protocols."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("imagecodecs")

from mirage.evaluate import Task, find_sets
from mirage.evaluate.protocols import find_below, plan, protocol, protocol_names
from mirage.evaluate.sets import target_of
from mirage.images import ImageFile, write_image


def picture(path, seed=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, ImageFile(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)))
    return path


def names(found):
    return [(item.name, item.input and item.input.name, item.target.name) for item in found.items]


@pytest.mark.parametrize(
    ("stem", "targets", "expected"),
    [
        ("a", ["a", "noa"], "a"),
        ("rain-1", ["norain-1", "norain-10"], "norain-1"),
        ("0001_0.8_0.2", ["0001", "0002"], "0001"),
        ("im_0001_s80_a04", ["im_0001", "im_0002"], "im_0001"),
        ("3_rain", ["3_clean"], "3_clean"),
        ("low00690", ["normal00690"], "normal00690"),
        ("b", ["a", "c"], None),
    ],
)
def test_the_target_of_an_input(stem, targets, expected):
    from pathlib import Path

    found = target_of(stem, {each: Path(each) for each in targets})
    assert (found and str(found)) == expected


@pytest.mark.parametrize(("inputs", "targets"), [("input", "target"), ("lq", "gt"), ("blur", "sharp"), ("raw", "GT")])
def test_pairs(tmp_path, inputs, targets):
    for name in ("b.png", "a.png", "sub/c.png"):
        picture(tmp_path / inputs / name)
        picture(tmp_path / targets / name)
    picture(tmp_path / inputs / "alone.png")
    (found,) = find_sets("S", tmp_path)
    assert not found.clean
    assert names(found) == [("a", "a.png", "a.png"), ("b", "b.png", "b.png"), ("sub/c", "c.png", "c.png")]
    assert [(path.name, reason) for path, reason in found.skipped] == [
        ("alone.png", f"no target for it in {tmp_path / targets}")
    ]


def test_clean_images(tmp_path):
    picture(tmp_path / "flat" / "a.png")
    picture(tmp_path / "flat" / "sub" / "a.png")
    picture(tmp_path / "folder" / "target" / "b.png")
    write_image(tmp_path / "flat" / "a.jpg", ImageFile(np.zeros((8, 8, 3), np.uint8)), "jpeg")
    (flat,) = find_sets("S", tmp_path / "flat")
    assert flat.clean and [item.name for item in flat.items] == ["a", "sub/a"]
    assert [reason for _, reason in flat.skipped] == ["its name is that of a.jpg"]
    (folder,) = find_sets("S", tmp_path / "folder")
    assert folder.clean and names(folder) == [("b", None, "b.png")]


def test_cdd11(tmp_path):
    for folder in ("clear", "haze", "low", "low_haze"):
        picture(tmp_path / "test" / folder / "00001.png")
    found = find_sets("CDD11", tmp_path)
    assert [each.name for each in found] == ["haze", "low", "low_haze"]
    assert all(names(each) == [("00001", "00001.png", "00001.png")] for each in found)
    tasks, notes = plan(found, of=protocol("cdd11"))
    assert [task.set.name for task in tasks] == ["low", "haze", "low_haze"]
    assert "rain left out: no --set rain=DIR" in notes and len(notes) == 8


def test_lists(tmp_path):
    picture(tmp_path / "rainy" / "rain-1.png")
    picture(tmp_path / "gt" / "norain-1.png")
    picture(tmp_path / "clean" / "a.png")
    (tmp_path / "rain.txt").write_text("rainy/rain-1.png\nrainy/rain-2.png\n")
    (tmp_path / "clean.txt").write_text("# comment\nclean/a.png\n\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "pairs.txt").write_text("rainy/rain-1.png, gt/norain-1.png\n")
    (rain,) = find_sets("R", tmp_path / "rain.txt")
    assert names(rain) == [("rainy/rain-1", "rain-1.png", "norain-1.png")] and not rain.clean
    assert [reason for _, reason in rain.skipped] == ["no such file"]
    (clean,) = find_sets("C", tmp_path / "clean.txt")
    assert names(clean) == [("clean/a", None, "a.png")] and clean.clean
    (pairs,) = find_sets("P", tmp_path / "lists" / "pairs.txt", root=tmp_path)
    assert names(pairs) == [("rainy/rain-1", "rain-1.png", "norain-1.png")]
    picture(tmp_path / "hazy" / "synthetic" / "part1" / "0025_0.8_0.04.png")
    picture(tmp_path / "hazy" / "original" / "0025.png")
    (tmp_path / "lists" / "hazy.txt").write_text("synthetic/part1/0025_0.8_0.04.png\n")
    (hazy,) = find_sets("H", tmp_path / "lists" / "hazy.txt", root=tmp_path / "hazy")
    assert names(hazy) == [("synthetic/part1/0025_0.8_0.04", "0025_0.8_0.04.png", "0025.png")]
    (tmp_path / "both.txt").write_text("clean/a.png\nrainy/rain-1.png\n")
    with pytest.raises(ValueError, match="set B: inputs with and without targets, which are two sets"):
        find_sets("B", tmp_path / "both.txt")
    (tmp_path / "bad.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="line 1 of .*: expected a path, or input and target, got 'a b c'"):
        find_sets("B", tmp_path / "bad.txt")


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="set S: no images in .* that could be evaluated"):
        find_sets("S", tmp_path)


def test_a_protocols_columns_come_in_its_order(tmp_path):
    picture(tmp_path / "test" / "denoise" / "bsd68" / "a.png")
    for kind in ("input", "target"):
        picture(tmp_path / "test" / "derain" / "Rain100L" / kind / "1.png")
        picture(tmp_path / "mine" / kind / "1.png")
    of = protocol("3deg")
    tasks, notes = plan([*find_below(tmp_path / "test", of), *find_sets("mine", tmp_path / "mine")], of=of)
    titles = [(task.set.name, task.sigma) for task in tasks]
    assert titles == [("Rain100L", None), ("BSD68", 15), ("BSD68", 25), ("BSD68", 50), ("mine", None)]
    assert notes == ["SOTS left out: no --set SOTS=DIR"]
    with pytest.raises(ValueError, match="set Rain100L: Table 1 asks for pairs of input and target"):
        plan(find_sets("Rain100L", tmp_path / "test" / "denoise" / "bsd68"), of=of)


def test_without_a_protocol_clean_images_get_each_noise(tmp_path):
    picture(tmp_path / "a.png")
    (clean,) = find_sets("C", tmp_path)
    assert plan([clean], [10, 30]) == ([Task(clean, 10.0), Task(clean, 30.0)], [])


def test_names_of_a_set_that_are_one():
    column = protocol("3deg").columns[3]
    assert (column.set, column.sigma, column.images) == ("BSD68", 25, 68)
    assert all(column.is_of(name) for name in ("BSD68", "CBSD68", "cbsd-68"))
    assert not column.is_of("BSD400")


@pytest.mark.parametrize("name", protocol_names())
def test_the_papers_figures_are_well_formed(name):
    of = protocol(name)
    assert of.rows and of.columns and set(of.metrics) <= {"psnr", "ssim", "lpips"}
    for row in of.rows:
        assert len(row.values) == len(of.columns) + of.average, row.method
        for values in row.values:
            assert len(values) == len(of.metrics), row.method
            for metric, value in zip(of.metrics, values, strict=True):
                low, high = (5, 45) if metric == "psnr" else (0.2, 1)
                assert value is None or low < value < high, (row.method, metric, value)
    assert sum(row.method.startswith("MIRAGE") for row in of.rows) >= 1


def test_some_of_the_papers_figures():
    rows = {(row.method, row.params): row for row in protocol("3deg").rows}
    assert rows["MIRAGE-T (Ours)", "6M"].values[-1] == (32.77, 0.919)
    assert rows["DA-CLIP", "125M"].values[-1] == (None, None)
    all_in_one = next(row for row in protocol("allweather").rows if row.method == "All-in-One")
    assert all_in_one.values == ((None, None), (28.33, 0.882), (24.71, 0.898), (31.12, 0.927), (28.05, 0.902))
    assert protocol("udc").rows[-1].values == ((28.01, 0.881, 0.293), (16.93, 0.604, 0.5))


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="protocol: expected one of 3deg, 5deg, .*, got '4deg'"):
        protocol("4deg")


def test_the_commands_choices_are_all_there_is():
    from mirage.evaluate.command import METHODS, PROTOCOLS
    from mirage.evaluate.methods import CLASSICAL

    assert protocol_names() == PROTOCOLS
    assert sorted(CLASSICAL) == sorted(METHODS)
