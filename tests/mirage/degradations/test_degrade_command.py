"""``mirage degrade``: pairs on disk, their parameters, going on, contact sheets, and what is refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from mirage.cli import main
from mirage.degradations import Applied, apply, create, generator_of

for _module in ("PIL", "imagecodecs", "tifffile"):
    pytest.importorskip(_module, reason="the extra [images] is not installed")

from mirage.degradations import files  # noqa: E402
from mirage.degradations.files import Pairs, SettingsDiffer, degrade_files, read_pixels  # noqa: E402
from mirage.images import ImageFile, read_image, write_image  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Three pictures: 8 bits, 16 bits with alpha in a folder below, grey."""
    rng = np.random.default_rng(0)
    place = tmp_path / "in"
    (place / "sub").mkdir(parents=True)
    write_image(place / "a.png", ImageFile(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)))
    write_image(place / "sub" / "b.png", ImageFile(rng.integers(0, 1 << 16, (36, 33, 4), dtype=np.uint16)))
    write_image(place / "c.png", ImageFile(rng.integers(0, 256, (33, 34, 1), dtype=np.uint8)))
    return place


def call(*arguments):
    return CliRunner().invoke(main, ["degrade", *map(str, arguments)])


def tree(place):
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def batch(path):
    return np.ascontiguousarray(read_pixels(path).transpose(2, 0, 1)[None])


def test_pairs_and_their_parameters(folder, tmp_path):
    out = tmp_path / "out"
    result = call(folder, "-o", out, "--kind", "motion_blur", "--seed", "3")
    assert result.exit_code == 0 and "degraded 3 of 3" in result.output
    names = ["a", "c", "sub/b"]
    places = [f"{kind}/{name}.png" for kind in ("clean", "degraded") for name in names]
    assert set(tree(out)) == {*places, "parameters.json", "parameters.csv"}
    content = json.loads((out / "parameters.json").read_text())
    assert sorted(content["images"]) == names and content["settings"]["seed"] == 3
    with open(out / "parameters.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    for name in names:
        clean, degraded = batch(out / "clean" / f"{name}.png"), batch(out / "degraded" / f"{name}.png")
        record = content["images"][name]["kinds"]["motion_blur"]
        assert np.array_equal(apply(clean, [Applied.from_dict(record)]), degraded)
        again, applied = create("MB")(clean, generator_of(3, f"motion_blur/{name}"))
        assert np.array_equal(again, degraded) and applied[0].as_dict() == record
        assert rows[name]["kind"] == "motion_blur" and float(rows[name]["angle"]) == record["angle"]
        assert rows[name]["degraded"] == f"degraded/{name}.png" and int(rows[name]["length"]) == record["length"]
    assert np.array_equal(batch(out / "clean" / "a.png"), batch(folder / "a.png"))
    sixteen = read_image(folder / "sub" / "b.png").pixels[..., :3]
    eight = read_image(out / "clean" / "sub" / "b.png").pixels
    assert np.array_equal(eight, np.rint(sixteen / 257).astype(np.uint8))


def test_all_kinds_have_a_folder_each_which_evaluate_takes_as_sets(folder, tmp_path):
    from mirage.evaluate import find_sets

    out = tmp_path / "out"
    assert call(folder, "-o", out).exit_code == 0
    sets = find_sets("mine", out)
    assert len(sets) == 11 and all(len(one.items) == 3 and not one.clean for one in sets)
    assert {one.name for one in sets} >= {"gaussian_blur", "jpeg", "salt_and_pepper"}
    alone = tmp_path / "alone"
    assert call(folder, "-o", alone, "--kind", "GN").exit_code == 0
    assert (alone / "degraded/a.png").read_bytes() == (out / "gaussian_noise/a.png").read_bytes()
    (one,) = find_sets("mine", alone)
    assert len(one.items) == 3 and one.items[0].input == alone / "degraded" / "a.png"


def test_it_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ("--kind", "GN", "--kind", "low_haze", "--crop", "24")
    assert call(folder, "-o", whole, *arguments).exit_code == 0
    write, written = files._write, []

    def interrupted(path, pixels):
        written.append(path)
        if len(written) == 5:  # in the second image, between its files
            raise KeyboardInterrupt
        write(path, pixels)

    monkeypatch.setattr(files, "_write", interrupted)
    stopped = call(folder, "-o", out, *arguments)
    assert stopped.exit_code == 130 and "the same command goes on from here" in stopped.output
    assert len(json.loads((out / "parameters.json").read_text())["images"]) == 1
    written.clear()
    monkeypatch.setattr(files, "_write", lambda path, pixels: (written.append(path), write(path, pixels)))
    going_on = call(folder, "-o", out, *arguments)
    assert going_on.exit_code == 0 and "degraded 2 of 3" in going_on.output and "1 were finished" in going_on.output
    assert len(written) == 6 and not any("a.png" == path.name for path in written)
    assert tree(out) == tree(whole)
    assert read_image(out / "clean/a.png").pixels.shape == (24, 24, 3)
    write_image(folder / "a.png", ImageFile(np.zeros((40, 52, 3), np.uint8)))  # changed since
    assert "degraded 1 of 3" in call(folder, "-o", out, *arguments).output
    assert not batch(out / "clean/a.png").any()
    (out / "low_haze" / "c.png").unlink()
    assert "degraded 1 of 3" in call(folder, "-o", out, *arguments).output
    assert "degraded 3 of 3" in call(folder, "-o", out, *arguments, "--overwrite").output


def test_other_settings_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    assert call(folder, "-o", out, "--kind", "GN").exit_code == 0
    before = tree(out)
    for change, message in (
        (("--kind", "GN", "--seed", "1"), "holds pairs with seed 0, these have 1"),
        (("--kind", "GN", "--crop", "8"), "holds pairs with crop None, these have 8"),
        (("--kind", "GN", "--range", "sigma=5"), "holds pairs with kinds"),
    ):
        result = call(folder, "-o", out, *change)
        assert result.exit_code == 2 and message in result.output and "overwrite it" in result.output
    (out / "parameters.json").write_text("[")
    assert "cannot be read" in call(folder, "-o", out, "--kind", "GN").output
    (out / "parameters.json").write_text("{}")
    with pytest.raises(SettingsDiffer, match="none of this version"):
        degrade_files([folder], out, Pairs({"gaussian_noise": create("GN")}))
    assert {name for name in tree(out)} == set(before)


def test_ranges_and_maps(folder, tmp_path):
    out, maps = tmp_path / "out", tmp_path / "depth"
    maps.mkdir()
    write_image(maps / "a.png", ImageFile(np.full((40, 52, 1), 65535, np.uint16)))
    result = call(folder / "a.png", "-o", out, "--kind", "GN", "--range", "sigma=5,6")
    record = json.loads((out / "parameters.json").read_text())["images"]["a"]["kinds"]["gaussian_noise"]
    assert result.exit_code == 0 and 5 <= record["sigma"] <= 6
    near = tmp_path / "near"
    result = call(folder, "-o", near, "--kind", "haze", "--map", f"depth={maps}")
    assert result.exit_code == 1 and "no map for it" in result.output and "degraded 1 of 3" in result.output
    assert np.array_equal(batch(near / "degraded/a.png"), batch(folder / "a.png"))  # near everywhere: no haze
    write_image(maps / "c.png", ImageFile(np.zeros((9, 9, 1), np.uint8)))
    result = call(folder / "c.png", "-o", tmp_path / "c", "--kind", "haze", "--map", f"depth={maps}")
    assert result.exit_code == 1 and "has 9x9 pixels, it has 34x33" in result.output


def test_files_that_fail_do_not_stop_the_others(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    out = tmp_path / "out"
    result = call(folder, tmp_path / "gone.png", "-o", out, "--kind", "RL", "--crop", "34")
    assert result.exit_code == 1 and "degraded 1 of 5" in result.output
    assert "broken PNG" in result.output and "no such file" in result.output
    assert "34x33 pixels are smaller than the crop of 34" in result.output and "33x36 pixels" in result.output
    assert set(tree(out)) == {"clean/a.png", "degraded/a.png", "parameters.json", "parameters.csv"}


def test_results_below_the_inputs_are_no_inputs(folder):
    assert "degraded 3 of 3" in call(folder, "-o", folder / "out", "--kind", "RL").output
    again = call(folder, "-o", folder / "out", "--kind", "RL")
    assert "degraded 0 of 3" in again.output and "3 were finished" in again.output


def test_the_sheet_shows_every_kind(folder, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    sheet = tmp_path / "new" / "sheet.png"
    assert call(folder, "--sheet", sheet, "--seed", "1").exit_code == 0
    first = sheet.read_bytes()
    pixels = np.asarray(Image.open(sheet))
    assert call(folder / "a.png", "--sheet", sheet, "--seed", "1").exit_code == 0 and sheet.read_bytes() == first
    clean = read_image(folder / "a.png").pixels
    rows, columns = 4, 6
    height, width = (pixels.shape[0] - 8) // rows, (pixels.shape[1] - 8) // columns
    tiles = [pixels[8 + r * height + 46 :, 8 + c * width :][:40, :52] for r in range(rows) for c in range(columns)]
    assert np.array_equal(tiles[0], clean)
    degraded, _ = create("MB")(batch(folder / "a.png"), generator_of(1, "MB"))
    assert np.array_equal(tiles[2], np.rint(degraded[0].transpose(1, 2, 0) * 255).astype(np.uint8))
    assert all((tile != clean).any() for tile in tiles[1:23]) and (tiles[23] == 255).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "GN"), "nothing to write: give -o OUT, --sheet PNG or both"),
        (("-o", "OUT", "--kind", "gausian_noise"), "the nearest is 'gaussian_noise'"),
        (("-o", "OUT", "--range", "sigma=3"), "--range: goes with one --kind, got 11"),
        (("-o", "OUT", "--kind", "GN", "--range", "sigma"), "--range: expected NAME=NUMBER or NAME=LOW,HIGH"),
        (("-o", "OUT", "--kind", "GN", "--range", "radius=2"), "unknown setting 'radius'"),
        (("-o", "OUT", "--kind", "haze", "--map", "depth=/nowhere"), "--map: expected one of depth, illumination"),
        (
            ("-o", "OUT", "--kind", "GB", "--map", "depth=."),
            "depth is read by none of gaussian_blur; they take no maps",
        ),
        (("-o", "OUT", "--kind", "haze", "--map", "rain=."), "rain is read by none of haze; they take depth"),
        (("-o", "OUT", "--kind", "haze", "--map", "depth=.", "--map", "depth=/"), "one folder of depth, got two"),
    ],
)
def test_what_is_refused(folder, tmp_path, arguments, message):
    result = call(folder, *(str(tmp_path / "out") if each == "OUT" else each for each in arguments))
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "out").exists()


def test_the_list_of_kinds():
    result = call("--list")
    assert result.exit_code == 0 and "MB  motion_blur: length 7 to 25, angle 0 to 3.142" in result.output
    assert "GN  gaussian_noise: sigma 10 to 50" in result.output and "low_haze_snow" in result.output
    assert "nothing to degrade" in call("-o", "x").output
