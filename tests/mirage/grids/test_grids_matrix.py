"""Degradations measured on patches, and how far they lie apart; what goes on where it was stopped; the command."""

import csv
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mirage.cli import main
from mirage.degradations import create, generator_of
from mirage.grids import (
    GGD,
    SimilarityMatrix,
    SRResNetDescriptor,
    fit_ggd,
    sample_patches,
    similarity,
    similarity_matrix,
)
from mirage.grids.matrix import degraded_patches
from mirage.networks import create as create_network

pytest.importorskip("scipy", reason="the extra [grids] is not installed")

TOY = {"0": GGD(0.687, 2.718), "1": GGD(0.596, 2.333), "2": GGD(0.466, 2.007), "3": GGD(0.75, 4.0), "4": GGD(0.70, 3.0)}
FAST = ("GN", "SP", "PO", "RL")


def photographs(count=3, size=(40, 48), seed=0):
    """Smooth pictures with edges, as float32 arrays."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        coarse = torch.from_numpy(rng.random((1, 3, 6, 7), dtype=np.float32))
        image = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0].clone()
        image[:, : size[0] // 3] *= 0.5
        found.append(((image * 255).round() / 255).permute(1, 2, 0).numpy())
    return found


def descriptor():
    torch.manual_seed(0)
    return SRResNetDescriptor(create_network("srresnet", dim=4, num_blocks=1, upscale=2))


class Counting:
    """A descriptor that counts how often it is asked for features of many."""

    def __init__(self):
        self.inner, self.calls = descriptor(), 0
        self.fingerprint = self.inner.fingerprint

    def features(self, images):
        return self.inner.features(images)

    def feature_blocks(self, images, memory):
        self.calls += 1
        return self.inner.feature_blocks(images, memory)


# --- patches


def test_patches_are_crops_of_every_image_and_the_seed_decides_them():
    images = photographs()
    found = sample_patches(images, 10, 16, seed=1)
    assert found.shape == (10, 3, 16, 16) and found.dtype == torch.float32
    taken = [0, 0, 0]
    for patch in found.numpy().transpose(0, 2, 3, 1):
        here = [bool((np.lib.stride_tricks.sliding_window_view(image, (16, 16), (0, 1))
                      == patch.transpose(2, 0, 1)).all((2, 3, 4)).any()) for image in images]  # fmt: skip
        assert sum(here) == 1
        taken[here.index(True)] += 1
    assert sorted(taken) == [3, 3, 4] or sorted(taken) == [2, 4, 4]
    assert torch.equal(found, sample_patches(images, 10, 16, seed=1))
    assert not torch.equal(found, sample_patches(images, 10, 16, seed=2))
    assert len(found.unique(dim=0)) > 8


def test_patches_of_folders_and_files_are_those_of_their_pixels(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
    pytest.importorskip("imagecodecs", reason="the extra [images] is not installed")
    images = photographs()
    (tmp_path / "below").mkdir()
    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "below" / "c.png"]
    for file, image in zip(files, images, strict=True):
        Image.fromarray((image * 255).round().astype(np.uint8)).save(file)
    expected = sample_patches(images, 7, 16)
    for given in (tmp_path, str(tmp_path), files, [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "below"]):
        torch.testing.assert_close(sample_patches(given, 7, 16), expected, rtol=0, atol=1e-7)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    left_out = []
    found = sample_patches(tmp_path, 9, 16, skip=lambda name, why: left_out.append((name, why)))
    assert len(found) == 9
    assert [name for name, _ in left_out] == [str(tmp_path / "broken.png")]


def test_images_smaller_than_a_crop_are_left_out_and_named():
    images = [*photographs(2), np.random.default_rng(0).random((15, 90, 3))]
    with pytest.warns(UserWarning, match="left out array 2: 90x15 pixels, smaller than a crop of 16x16"):
        found = sample_patches(images, 9, 16)
    assert len(found) == 9 and len(found.unique(dim=0)) > 7


@pytest.mark.parametrize(
    ("images", "count", "message", "error"),
    [
        ([], 5, "images: expected some, got none in an empty list", ValueError),
        ("no/such/folder", 5, "images: no file or folder 'no/such/folder'", FileNotFoundError),
        (photographs(1), 0, "count: expected at least 1, got 0", ValueError),
        ([np.zeros((40, 40), np.float32)], 5, r"images: expected arrays \[H, W, 3\]", TypeError),
        ([np.zeros((40, 40, 3), np.uint8)], 5, r"expected arrays .* of floating point, got uint8", TypeError),
    ],
)
def test_bad_images_are_named(images, count, message, error):
    with pytest.raises(error, match=message):
        sample_patches(images, count, 16)


def test_an_empty_folder_and_images_that_are_all_small(tmp_path):
    with pytest.raises(ValueError, match="images: expected some, got none in"):
        sample_patches(tmp_path, 5, 16)
    with pytest.raises(ValueError, match="expected some of at least 64x64 pixels, got none among 2"):
        sample_patches(photographs(2), 5, 64, skip=lambda *_: None)


# --- the matrix


def test_a_matrix_is_that_of_its_ggds_and_distances_are_means_over_ordered_pairs():
    matrix = SimilarityMatrix(TOY)
    assert matrix.names == ("0", "1", "2", "3", "4")
    for i, p in enumerate(TOY.values()):
        for j, q in enumerate(TOY.values()):
            assert matrix.values[i, j] == similarity(p, q)
    assert matrix.distance(["0", "4"]) == pytest.approx(2.616015, abs=1e-6)
    assert matrix.distance(["0", "1"]) == pytest.approx(3.325259, abs=1.1e-6)
    assert matrix.distance(["4", "1", "0", "0"]) == pytest.approx(3.189536, abs=1e-6)
    assert matrix.distance(["3"]) == 0
    np.testing.assert_array_equal(np.array(matrix), matrix.values)
    np.testing.assert_array_equal(matrix.symmetric, (matrix.values + matrix.values.T) / 2)
    with pytest.raises(ValueError, match="group: expected some of 0, 1, 2, 3, 4, got '7'"):
        matrix.distance(["0", "7"])
    with pytest.raises(ValueError, match="group: expected at least one degradation, got none"):
        matrix.distance([])
    with pytest.raises(ValueError, match="ggds: expected at least one degradation, got none"):
        SimilarityMatrix({})


def test_neighbours_of_the_clustering_are_alike():
    tree, order = SimilarityMatrix(TOY).clustered()
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert set(tree[0, :2]) == {0, 4}
    assert tree[0, 2] == pytest.approx(2.616015, abs=1e-6)
    assert abs(order.index(0) - order.index(4)) == 1
    with pytest.raises(ValueError, match="expected at least two degradations to cluster, got 1"):
        SimilarityMatrix({"a": GGD(1, 1)}).clustered()


def test_a_matrix_goes_to_files_and_comes_back(tmp_path):
    matrix = SimilarityMatrix(TOY, {"seed": 3})
    matrix.save(tmp_path / "s.json")
    back = SimilarityMatrix.load(tmp_path / "s.json")
    assert back == matrix
    content = json.loads((tmp_path / "s.json").read_text())
    np.testing.assert_array_equal(content["similarity"], matrix.values)
    np.testing.assert_array_equal(content["divergence"], matrix.divergences)
    matrix.save(tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["", *matrix.names]
    assert [row[0] for row in rows] == list(matrix.names)
    np.testing.assert_array_equal([[float(value) for value in row[1:]] for row in rows], matrix.values)
    with pytest.raises(ValueError, match="path: expected a name that ends in .json or .csv"):
        matrix.save(tmp_path / "s.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a mapping, got list"),
        ("{}", "expected a file of 'mirage degradation similarity, version 1', got None"),
        ('{"format": "mirage degradation similarity, version 1", "parameters": {"a": {"alpha": 1}}}', "expected alpha"),
        (
            '{"format": "mirage degradation similarity, version 1", "parameters": {"a": {"alpha": 0, "sigma": 1}}}',
            "alpha",
        ),
    ],
)
def test_files_that_are_no_matrix_are_named(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=f"s.json: .*{message}"):
        SimilarityMatrix.load(tmp_path / "s.json")


# --- measuring


def test_each_degradation_is_applied_to_whole_patches_whose_middles_are_looked_at():
    patches = sample_patches(photographs(), 40, 24)
    found = degraded_patches(create("SP"), patches, "SP", 8, seed=5)
    expected, _ = create("SP")(patches, generator_of(5, "SP"))
    assert torch.equal(found, expected[:, :, 8:16, 8:16])


def test_measured_is_the_fit_of_each_ones_features():
    patches = sample_patches(photographs(), 40, 24)
    matrix = similarity_matrix(descriptor(), patches, FAST, components=12, patch=8)
    assert matrix.names == FAST
    for name in FAST:
        seen = degraded_patches(create(name), patches, name, 8)
        expected = fit_ggd(descriptor().features(seen), 12)
        assert matrix.ggds[name].alpha == pytest.approx(expected.alpha, abs=0.002)
        assert matrix.ggds[name].sigma == pytest.approx(expected.sigma, rel=1e-5)
    assert matrix.settings["components"] == 12 and matrix.settings["patches"] == 40
    assert matrix.settings["degradations"]["GN"] == repr(create("GN"))


def test_what_else_is_measured_and_in_which_order_does_not_matter():
    patches = sample_patches(photographs(), 20, 16)
    all_of_them = similarity_matrix(descriptor(), patches, FAST, components=5, patch=8)
    some = similarity_matrix(descriptor(), patches, ["poisson_noise", {"kind": "GN"}], components=5, patch=8)
    assert some.names == ("PO", "GN")
    for name in some.names:
        assert some.ggds[name] == all_of_them.ggds[name]


def test_degradations_may_be_named_and_be_any_function():
    patches = sample_patches(photographs(), 20, 16)

    def darker(batch, generator):
        assert isinstance(generator, torch.Generator)
        return batch / 2, None

    matrix = similarity_matrix(descriptor(), patches, {"dark": darker, "weak": {"kind": "GN", "sigma": 5}},
                               components=5, patch=8)  # fmt: skip
    assert matrix.names == ("dark", "weak")
    expected = fit_ggd(descriptor().features(patches[:, :, 4:12, 4:12] / 2), 5)
    assert matrix.ggds["dark"].sigma == pytest.approx(expected.sigma, rel=1e-5)


def test_what_was_measured_is_not_measured_again_unless_something_changed(tmp_path):
    patches = sample_patches(photographs(), 20, 16)
    cache = tmp_path / "below" / "measured.json"
    told = []

    def measure(counting, degradations=FAST[:2], patches=patches, **more):
        arguments = {"components": 5, "patch": 8, "cache": cache, **more}
        before = counting.calls
        found = similarity_matrix(
            counting, patches, degradations, progress=lambda *each: told.append(each), **arguments
        )
        return found, counting.calls - before

    first, calls = measure(Counting())
    assert calls == 2 and told == list(first.ggds.items())
    again, calls = measure(Counting())
    assert calls == 0 and again == first and told == 2 * list(first.ggds.items())
    more, calls = measure(Counting(), FAST[1:4])
    assert calls == 2 and more.ggds["SP"] == first.ggds["SP"]
    assert measure(Counting(), FAST)[1] == 0
    other = Counting()
    other.fingerprint = "other"
    assert measure(other)[1] == 2
    assert measure(Counting(), components=6)[1] == 2
    assert measure(Counting(), seed=1)[1] == 2
    assert measure(Counting(), patch=10)[1] == 2
    assert measure(Counting(), [{"kind": "GN", "sigma": 7}])[1] == 1
    assert measure(Counting(), patches=patches.flip(0))[1] == 2
    assert measure(Counting())[1] == 0


def test_an_interrupted_measurement_goes_on(tmp_path):
    patches = sample_patches(photographs(), 20, 16)
    arguments = {"components": 5, "patch": 8, "cache": tmp_path / "measured.json"}

    def stop(name, ggd):
        if name == FAST[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        similarity_matrix(Counting(), patches, FAST, progress=stop, **arguments)
    counting = Counting()
    found = similarity_matrix(counting, patches, FAST, **arguments)
    assert counting.calls == 2
    assert found == similarity_matrix(descriptor(), patches, FAST, components=5, patch=8)


@pytest.mark.parametrize(
    ("degradations", "arguments", "message"),
    [
        (["GN"], {"components": 20}, "20 of them need at least 21 patches, got 20"),
        (["GN", "gaussian_noise"], {}, "degradations: expected each once, got GN twice"),
        (["GX"], {}, "unknown degradation 'GX'"),
        ([], {}, "degradations: expected at least one, got none"),
        (["GN"], {"patch": 17}, r"images: expected \[N, 3, H, W\] of at least 17x17 pixels, got \[20, 3, 16, 16\]"),
        (
            {"flat": lambda batch, generator: (batch * 0 + 0.5, None)},
            {},
            "flat: features: expected patches that differ",
        ),
        ({"nan": lambda batch, generator: (batch * float("nan"), None)}, {}, "nan: features: expected finite numbers"),
    ],
)
def test_what_cannot_be_measured_is_said(degradations, arguments, message):
    patches = sample_patches(photographs(), 20, 16)
    with pytest.raises(ValueError, match=message):
        similarity_matrix(descriptor(), patches, degradations, **{"components": 5, "patch": 8, **arguments})


def test_caches_that_are_none_and_descriptors_that_cannot_have_one(tmp_path):
    patches = sample_patches(photographs(), 20, 16)
    (tmp_path / "c.json").write_text('{"measured": 3}')
    with pytest.raises(ValueError, match="c.json: expected a cache of .*; remove it, or name another file"):
        similarity_matrix(descriptor(), patches, ["GN"], components=5, patch=8, cache=tmp_path / "c.json")

    class Pixels:
        def features(self, images):
            return images.flatten(1)

    with pytest.raises(ValueError, match="cache: needs a descriptor with a fingerprint, and Pixels has none"):
        similarity_matrix(Pixels(), patches, ["GN"], components=5, patch=8, cache=tmp_path / "new.json")


# --- the command


@pytest.fixture
def place(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra [grids] is not installed")
    pytest.importorskip("imagecodecs", reason="the extra [grids] is not installed")
    Image = pytest.importorskip("PIL.Image", reason="the extra [grids] is not installed")
    (tmp_path / "clean").mkdir()
    for i, image in enumerate(photographs()):
        Image.fromarray((image * 255).round().astype(np.uint8)).save(tmp_path / "clean" / f"{i}.png")
    torch.manual_seed(0)
    network = create_network("srresnet", dim=4, num_blocks=1, upscale=2)
    torch.save(network.state_dict(), tmp_path / "descriptor.pth")
    return tmp_path


def command(place, *more):
    arguments = ["grids", "similarity", str(place / "clean"), "--weights", str(place / "descriptor.pth"), "-o"]
    arguments += [str(place / "out"), "--patches", "20", "--components", "5", "--crop", "16", "--patch", "8"]
    return CliRunner().invoke(main, [*arguments, "--device", "cpu", *more])


def test_the_command_writes_tables_and_the_picture_and_goes_on(place):
    from PIL import Image

    result = command(place, "--degradations", "GN,salt_and_pepper")
    assert result.exit_code == 0, result.output
    found = SimilarityMatrix.load(place / "out" / "similarity.json")
    assert found.names == ("GN", "SP")
    read = SRResNetDescriptor.from_weights(place / "descriptor.pth")
    patches = sample_patches(place / "clean", 20, 16)
    expected = similarity_matrix(read, patches, ["GN", "SP"], components=5, patch=8)
    assert found.ggds == expected.ggds
    assert f"{found.values[0, 1]:.2f}" in result.output
    with open(place / "out" / "parameters.csv", newline="") as file:
        assert [(row["degradation"], float(row["alpha"])) for row in csv.DictReader(file)] == [
            (name, ggd.alpha) for name, ggd in found.ggds.items()
        ]
    with Image.open(place / "out" / "similarity.png") as picture:
        assert min(picture.size) > 200
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    kept = (place / "out" / "measured.json").read_text()
    again = command(place, "--degradations", "GN,SP,PO", "--symmetric")
    assert again.exit_code == 0, again.output
    assert SimilarityMatrix.load(place / "out" / "similarity.json").ggds["GN"] == found.ggds["GN"]
    before, after = (json.loads(text)["measured"] for text in (kept, (place / "out" / "measured.json").read_text()))
    assert before.items() < after.items() and len(after) == 3


def test_the_command_says_what_is_wrong_in_a_sentence(place):
    for more, message in (
        (("--degradations", "GX"), "unknown degradation 'GX'"),
        (("--components", "20"), "expected less than --patches 20, got 20"),
        (("--patch", "17"), "expected at most --crop 16, got 17"),
        (("--crop", "64"), "expected some of at least 64x64 pixels, got none among 3"),
        (("--weights", "no-such-weights"), "of descriptors and extractors: descriptor-srresnet"),
        (("--memory", "much"), "much"),
    ):
        result = command(place, *more)
        assert result.exit_code != 0 and message in result.output, result.output
        assert "Traceback" not in result.output


def test_ctrl_c_keeps_what_was_measured(place, monkeypatch):
    from mirage.grids import matrix

    def stopped(*arguments, progress, **options):
        similarity_matrix(*arguments[:2], ["GN"], progress=progress, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "similarity_matrix", stopped)
    result = command(place, "--degradations", "GN,SP")
    assert result.exit_code == 130 and "the same command goes on from here" in result.output
    assert list(json.loads((place / "out" / "measured.json").read_text())["measured"])


def test_groups_of_the_paper_are_shown_beside_its_distances(place):
    result = command(place, "--degradations", "GN,SP,JP,PO")
    assert result.exit_code == 0, result.output
    found = SimilarityMatrix.load(place / "out" / "similarity.json")
    rows = [line.split() for line in result.output.splitlines()]
    assert ["GN+SP", f"{found.distance(['GN', 'SP']):.2f}", "3.54"] in rows
    assert ["JP+PO+GN", f"{found.distance(['JP', 'PO', 'GN']):.2f}", "3.49"] in rows
    assert not any(row and row[0] == "SR+DB" for row in rows)
