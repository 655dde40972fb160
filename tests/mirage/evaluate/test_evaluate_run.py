"""mirage evaluate from images to numbers, files and sheets, with a tiny network."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("imagecodecs")
pytest.importorskip("skimage")

import mirage
from mirage.cli import main
from mirage.evaluate import SettingsDiffer, Task, evaluate, find_sets, measure
from mirage.evaluate.methods import Identity, Method, Network, NonLocalMeans
from mirage.evaluate.run import crop_to_multiple, prepare
from mirage.images import ImageFile, read_image, write_image


def picture(path, seed=0, size=(32, 40)):
    """A smooth picture, larger than the window of any metric."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    waves = np.stack([np.sin(6 * x + seed), np.cos(5 * y), np.sin(4 * (x + y))], axis=2) * 0.4 + 0.5
    write_image(path, ImageFile(np.round(waves * 255).astype(np.uint8)))
    return path


@pytest.fixture
def clean(tmp_path):
    for i, name in enumerate("abc"):
        picture(tmp_path / "clean" / f"{name}.png", i)
    return tmp_path / "clean"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mini.safetensors"
    model = mirage.MIRAGE(dim=6, num_blocks=(1, 0, 0, 0), num_refinement_blocks=0, heads=(1, 1, 1, 1))
    mirage.save_checkpoint(model, path)
    return path


class Counting(Method):
    """Brightens by a tenth, and counts."""

    label = "counting"
    definition = "a tenth brighter"

    def __init__(self):
        self.calls = 0

    def restore(self, image, sigma):
        self.calls += 1
        return image + np.float32(0.1)


def tasks_of(folder, *sigmas):
    (found,) = find_sets("S", folder)
    return [Task(found, sigma) for sigma in sigmas or (None,)]


def call(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def test_the_crop_is_the_released_one():
    image = np.arange(37 * 45).reshape(37, 45, 1)
    np.testing.assert_array_equal(crop_to_multiple(image, 16), image[2:34, 6:38])  # 5 // 2 above, 13 // 2 left
    assert crop_to_multiple(image, 0) is image
    with pytest.raises(ValueError, match="45x5 pixels cannot be cut to multiples of 16"):
        crop_to_multiple(image[:5], 16)


def test_noise_does_not_depend_on_the_order_of_images(clean, tmp_path):
    whole = evaluate(tasks_of(clean, 25), [Identity()])
    (clean / "a.png").unlink()
    (clean / "b.png").rename(tmp_path / "b.png")
    last = evaluate(tasks_of(clean, 25), [Identity()])
    assert last.rows[0].image == "c" and last.rows[0].values == whole.rows[2].values


def test_the_average_is_that_of_the_images(clean):
    done = evaluate(tasks_of(clean, 15, 25), [Identity(), NonLocalMeans()], metrics=["psnr", "ssim_y", "psnr_pooled"])
    assert [(each.method, each.sigma, each.images) for each in done.averages] == [
        ("input", 15, 3), ("NLM", 15, 3), ("input", 25, 3), ("NLM", 25, 3),
    ]  # fmt: skip
    for each in done.averages:
        values = [row.values for row in done.rows if (row.method, row.sigma) == (each.method, each.sigma)]
        assert each.values["psnr"] == pytest.approx(np.mean([v["psnr"] for v in values]))
        assert each.values["ssim_y"] == pytest.approx(np.mean([v["ssim_y"] for v in values]))
        errors = [10 ** (-v["psnr"] / 10) for v in values]
        assert each.values["psnr_pooled"] == pytest.approx(-10 * math.log10(np.mean(errors)))
    by_method = {(each.method, each.sigma): each.values["psnr"] for each in done.averages}
    assert by_method["NLM", 25] > by_method["input", 25] + 5  # smooth pictures


def test_pairs_and_their_known_error(tmp_path):
    target = picture(tmp_path / "target" / "a.png")
    pixels = read_image(target).pixels
    (tmp_path / "input").mkdir()
    write_image(tmp_path / "input" / "a.png", ImageFile((pixels // 2).astype(np.uint8)))
    done = evaluate(tasks_of(tmp_path), [Identity(), NonLocalMeans()], crop=0)
    error = np.mean((pixels / 255 - pixels // 2 / 255) ** 2)
    assert done.rows[0].values["psnr"] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert len(done.averages) == 1  # non-local means cannot know a sigma
    assert done.notes == ("NLM left out of S: it removes noise of known sigma",)


def test_grey_alpha_and_16_bits_are_rgb_in_0_1(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (16, 16, 2), dtype=np.uint16)
    (tmp_path / "t").mkdir()
    write_image(tmp_path / "t" / "a.png", ImageFile(pixels))
    _, target = prepare(tasks_of(tmp_path / "t")[0].set.items[0], 25)
    np.testing.assert_allclose(target, np.repeat(pixels[..., :1] / 65535, 3, axis=2), atol=1e-7)


def test_float_images_are_taken_as_they_are(tmp_path):
    values = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
    write_image(tmp_path / "a.tiff", ImageFile(values), "tiff")
    _, target = prepare(tasks_of(tmp_path)[0].set.items[0], 25)
    np.testing.assert_array_equal(target, values)


def test_a_network_gets_the_image_as_it_is(clean, weights):
    method = Network(weights, fast=False)
    assert method.label == "mini"
    item = tasks_of(clean, 25)[0].set.items[0]
    noisy, _ = prepare(item, 25, crop=0)  # 32x40: multiples of 8
    with torch.inference_mode():
        expected = method.restorer.model(torch.from_numpy(noisy).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(method(noisy), np.clip(expected, 0, 1), atol=1e-6)
    assert len(np.unique(method(noisy))) > 1000  # not rounded to 8 bits
    assert method(noisy[:30, :39]).shape == (30, 39, 3)
    fast = Network(weights)(noisy)
    np.testing.assert_allclose(fast, method(noisy), atol=1e-5)


def test_results_of_tiles_are_not_those_of_one_pass(weights):
    whole, forced = Network(weights), Network(weights, attention="whole")
    assert whole.identity() == forced.identity() and "as in one pass" in whole.definition
    tiles = Network(weights, tile=64, overlap=16)
    assert tiles.identity() == Network(weights, attention="tile", tile=64, overlap=16).identity() != whole.identity()
    assert "attention tile, tile 64, overlap 16" in tiles.definition
    local = Network(weights, attention="local", window=64)
    assert local.identity() not in (whole.identity(), Network(weights, attention="local", window=72).identity())


def test_a_second_run_computes_nothing(clean, tmp_path):
    path = tmp_path / "results.json"
    first = evaluate(tasks_of(clean, 25), [Counting()], path=path)
    again = Counting()
    second = evaluate(tasks_of(clean, 25), [again], path=path)
    assert again.calls == 0 and second.rows == first.rows and second.averages == first.averages
    evaluate(tasks_of(clean, 25, 50), [again], path=path)
    assert again.calls == 3  # the new sigma alone
    evaluate(tasks_of(clean, 25), [again], metrics=["psnr", "psnr_y"], path=path)
    assert again.calls == 6  # a metric that was not computed
    picture(clean / "b.png", 9)
    evaluate(tasks_of(clean, 50), [again], path=path)
    assert again.calls == 7  # a file that has changed


def test_an_interrupted_run_goes_on(clean, tmp_path):
    path = tmp_path / "results.json"

    class Interrupted(Counting):
        def restore(self, image, sigma):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().restore(image, sigma)

    with pytest.raises(KeyboardInterrupt):
        evaluate(tasks_of(clean, 25), [Interrupted()], path=path)
    rest = Counting()
    done = evaluate(tasks_of(clean, 25), [rest], path=path)
    assert rest.calls == 1 and len(done.rows) == 3
    assert done.averages == pytest.approx(done.averages)
    whole = evaluate(tasks_of(clean, 25), [Counting()])
    assert done.averages[0].values == whole.averages[0].values


@pytest.mark.parametrize(("option", "value"), [("seed", 1), ("noise", "truncated"), ("crop", 8)])
def test_results_of_other_settings_are_not_mixed(clean, tmp_path, option, value):
    path = tmp_path / "results.json"
    evaluate(tasks_of(clean, 25), [Counting()], path=path)
    with pytest.raises(SettingsDiffer, match=f"holds an evaluation with {option} .*; name another file, or overwrite"):
        evaluate(tasks_of(clean, 25), [Counting()], path=path, **{option: value})
    again = Counting()
    evaluate(tasks_of(clean, 25), [again], path=path, overwrite=True, **{option: value})
    assert again.calls == 3


def test_results_of_another_method_or_file_are_not_taken(clean, tmp_path):
    path = tmp_path / "results.json"
    evaluate(tasks_of(clean, 25), [Counting()], path=path)
    other = Counting()
    other.definition = "something else"
    with pytest.raises(SettingsDiffer, match=r"holds results of another counting \(a tenth brighter\)"):
        evaluate(tasks_of(clean, 25), [other], path=path)
    path.write_text("{}")
    with pytest.raises(SettingsDiffer, match="is no evaluation of this version"):
        evaluate(tasks_of(clean, 25), [Counting()], path=path)
    path.write_text("{")
    with pytest.raises(SettingsDiffer, match="cannot be read"):
        evaluate(tasks_of(clean, 25), [Counting()], path=path)


def test_a_broken_image_is_reported_and_the_others_are_measured(clean):
    (clean / "b.png").write_bytes((clean / "b.png").read_bytes()[:60])
    picture(clean / "small.png", size=(8, 40))
    done = evaluate(tasks_of(clean, 25), [Identity()])
    assert [failure.image for failure in done.failures] == ["b", "small"]
    assert "broken PNG" in done.failures[0].error
    assert done.failures[1].error == "40x8 pixels cannot be cut to multiples of 16"
    assert (done.averages[0].images, done.averages[0].of) == (2, 4)


def test_input_and_target_of_different_sizes(tmp_path):
    picture(tmp_path / "input" / "a.png", size=(32, 48))
    picture(tmp_path / "target" / "a.png", size=(48, 48))
    done = evaluate(tasks_of(tmp_path), [Identity()])
    assert [each.error for each in done.failures] == ["input and target have different sizes: 48x32 and 48x48"]
    assert done.averages == ()


def test_equal_images_are_infinitely_good_in_json_too(tmp_path):
    picture(tmp_path / "input" / "a.png")
    picture(tmp_path / "target" / "a.png")
    path = tmp_path / "results.json"
    for _ in range(2):  # computed, then read
        assert evaluate(tasks_of(tmp_path), [Identity()], path=path).averages[0].values["psnr"] == math.inf
    assert json.loads(path.read_text())["averages"][0]["values"]["psnr"] == "inf"


def test_sheets_show_the_four_pictures(clean, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate(tasks_of(clean, 25), [Counting()], sheets=tmp_path / "sheets", limit=1, crop=0)
    (path,) = (tmp_path / "sheets").rglob("*.png")
    assert path.relative_to(tmp_path / "sheets").as_posix() == "S/sigma25/a_counting.png"
    sheet = read_image(path).pixels[..., :3]
    assert sheet.shape == (32 + 44, 4 * 40 + 3 * 8, 3)
    row = sheet[44:]
    noisy, target = prepare(tasks_of(clean)[0].set.items[0], 25, crop=0)
    np.testing.assert_array_equal(row[:, :40], np.round(noisy * 255))
    np.testing.assert_array_equal(row[:, 48:88], np.round(np.clip(noisy + np.float32(0.1), 0, 1) * 255))
    np.testing.assert_array_equal(row[:, 96:136], np.round(target * 255))
    error = np.abs(np.clip(noisy + 0.1, 0, 1) - target).mean(axis=2)
    brightness = row[:, 144:].sum(axis=2)  # inferno grows brighter all the way
    assert np.corrcoef(error.ravel(), brightness.ravel())[0, 1] > 0.9


def test_the_command_prints_and_writes(clean, tmp_path, weights):
    for kind in ("input", "target"):
        picture(tmp_path / "rain" / kind / "1.png")
    files = {"--json": tmp_path / "out" / "r.json", "--csv": tmp_path / "out" / "r.csv"}
    arguments = ["--set", f"CBSD68={clean}", "--set", f"Rain100L={tmp_path / 'rain'}", "--weights", f"ours={weights}",
                 "--method", "identity", "--protocol", "3deg", "--device", "cpu",
                 *(str(each) for pair in files.items() for each in pair)]  # fmt: skip
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    for text in ("MIRAGE-T (Ours) 6M", "32.77 .919", "ours, here", "input, here", "psnr: PSNR of RGB in [0, 1]",
                 "SOTS left out: no --set SOTS=DIR", "BSD68 sigma 25: 3 images, the paper's has 68",
                 "truncated: clipped and truncated to 8 bits", "cut to multiples of 16"):  # fmt: skip
        assert text in result.output, text
    content = json.loads(files["--json"].read_text())
    assert len(content["images"]) == 2 * (3 * 3 + 1) and len(content["averages"]) == 8
    with open(files["--csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 + 8
    first = next(row for row in rows if row["image"] == "a" and row["sigma"] == "25" and row["method"] == "input")
    noisy, target = prepare(tasks_of(clean)[0].set.items[0], 25, noise="truncated")
    assert float(first["psnr"]) == pytest.approx(measure(target, noisy)["psnr"])
    assert (first["height"], first["width"]) == ("32", "32")


def test_the_command_says_what_is_wrong(clean, weights, tmp_path):
    place = ("--set", f"A={clean}")
    for arguments, text in [
        ((), "no sets: give --set NAME=PLACE"),
        (place, "nothing to evaluate: give --weights CKPT or --method"),
        (("--set", "A", "--method", "identity"), "--set: expected NAME=PLACE, got 'A'"),
        ((*place, "--method", "identity", "--metrics", "psnr,mse"), "metrics: expected some of psnr"),
        (("--root", tmp_path, "--method", "identity"), "--root needs --protocol"),
        (("--root", tmp_path, "--protocol", "udc", "--method", "identity"), "no set of Table D below"),
        ((*place, *place, "--method", "identity"), "sets: expected different names, got more than one A"),
        ((*place, "--weights", tmp_path / "no.ckpt"), "no.ckpt"),
    ]:
        result = call(*arguments)
        assert result.exit_code != 0 and text in " ".join(result.output.split()), (arguments, result.output)


def test_a_failure_is_the_commands_exit_status(clean):
    (clean / "b.png").write_bytes(b"no picture")
    result = call("--set", f"A={clean}", "--method", "identity", "--sigma", 25)
    assert result.exit_code == 1 and "failed: input: A sigma 25 b" in result.output


def test_the_command_lists_the_metrics():
    result = call("--list-metrics")
    assert result.exit_code == 0 and "psnr_y: PSNR of Y, ITU-R BT.601 studio range" in result.output
