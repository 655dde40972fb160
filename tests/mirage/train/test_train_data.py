"""Data: pairs by rule and list, shards, what a sample is, and that it depends on its number alone."""

from __future__ import annotations

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import settings, write_pictures

from mirage.degradations.rain import rain_streaks
from mirage.train import ConfigError
from mirage.train.config import Data, PictureSet
from mirage.train.data import TrainingSet, ValidationSet, augment, batches, find_pairs
from mirage.train.data.pictures import Picture, Reader
from mirage.train.data.samples import draw_mode

for _module in ("yaml", "fsspec", "braceexpand"):
    pytest.importorskip(_module, reason="the extra [train] is not installed")


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def noise_set(folder, **more):
    return Data(sets=[PictureSet(name="n", clean=str(folder), sigma=[15, 50])], crop=16, batch=4, **more)


# --- samples


def test_a_sample_is_a_crop_of_the_picture_with_noise_of_the_stated_range(tmp_path):
    folder = write_pictures(tmp_path / "clean", count=3, size=(64, 80))
    data = TrainingSet(Data(sets=[PictureSet(clean=str(folder), sigma=[15, 50])], crop=64), seed=0)
    sigmas, names = [], set()
    for number in range(60):
        degraded, clean, name = data[number]
        assert degraded.dtype == clean.dtype == torch.float32 and clean.shape == (3, 64, 64)
        whole = pixels(name)
        back = (clean.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        found = [
            np.array_equal(augment(whole[top : top + 64, left : left + 64], mode), back)
            for mode in range(8) for top in range(1) for left in range(17)
        ]  # fmt: skip
        assert any(found)
        sigmas.append(float((degraded - clean).std()) * 255)
        names.add(name)
        assert abs(float((degraded - clean).mean())) * 255 < 3
    assert len(names) == 3 and 14 < min(sigmas) < 20 and 45 < max(sigmas) < 52
    assert float(degraded.min()) < 0 or float(degraded.max()) > 1 or sigmas[-1] < 30  # not clipped


def test_noise_is_clipped_and_truncated_as_in_the_released_code_or_rounded(tmp_path):
    folder = write_pictures(tmp_path / "clean", count=1, size=(64, 64))
    sets = [PictureSet(clean=str(folder), sigma=25, noise="truncated")]
    data = TrainingSet(Data(sets=sets, crop=64), seed=0)
    degraded, clean, _ = data[0]
    levels = degraded.double() * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3) and 0 <= levels.min() and levels.max() <= 255
    inside = (clean > 0.35) & (clean < 0.65)
    assert float((degraded - clean)[inside].mean()) * 255 == pytest.approx(-0.5, abs=0.9)  # truncation's bias
    other = TrainingSet(Data(sets=[PictureSet(clean=str(folder), sigma=25)], crop=64), seed=0)[0]
    assert torch.equal(torch.trunc((other.degraded * 255).clamp(0, 255)) / 255, degraded)
    rounded = TrainingSet(Data(sets=[PictureSet(clean=str(folder), sigma=25, noise="rounded")], crop=64), seed=0)[0]
    assert torch.equal(torch.round((other.degraded * 255).clamp(0, 255)) / 255, rounded.degraded)


def test_a_sample_depends_on_seed_and_number_alone(tmp_path):
    folder = write_pictures(tmp_path / "clean")
    a, b = TrainingSet(noise_set(folder), 1), TrainingSet(noise_set(folder, cache=0.0), 1)
    forward = [a[number] for number in range(10)]
    for number in reversed(range(10)):
        assert torch.equal(b[number].degraded, forward[number].degraded) and b[number].name == forward[number].name
    other = TrainingSet(noise_set(folder), 2)
    assert not any(torch.equal(other[number].degraded, forward[number].degraded) for number in range(10))


def test_an_epoch_has_every_picture_as_often_as_its_set_is_repeated_in_another_order_each_time(tmp_path):
    first, second = write_pictures(tmp_path / "a", 3), write_pictures(tmp_path / "b", 5, seed=1)
    sets = [PictureSet(clean=str(first), sigma=15, repeat=2), PictureSet(clean=str(second), sigma=50)]
    data = TrainingSet(Data(sets=sets, crop=16), seed=0)
    assert data.epoch == 11
    epochs = [[data[e * 11 + i].name for i in range(11)] for e in range(3)]
    for names in epochs:
        counts = {name: names.count(name) for name in names}
        assert len(counts) == 8 and all(count == (2 if "/a/" in name else 1) for name, count in counts.items())
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("passes", "world", "workers"), [(1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 2)])
def test_processes_and_passes_share_the_batches_of_one(tmp_path, passes, world, workers):
    folder = write_pictures(tmp_path / "clean")
    data = TrainingSet(noise_set(folder, workers=workers), 0)
    whole = torch.cat([data[number].degraded[None] for number in range(4, 12)])
    shares = [list(batches(data, 4, 2, passes, rank, world)) for rank in range(world)]
    size = 4 // world // passes
    for step in range(2):
        parts = [shares[rank][step * passes + i] for rank in range(world) for i in range(passes)]
        assert all(part.degraded.shape == (size, 3, 16, 16) and len(part.name) == size for part in parts)
        assert torch.equal(torch.cat([part.degraded for part in parts]), whole[4 * step : 4 * step + 4])
    with pytest.raises(ValueError, match=r"data.batch: expected a multiple of .*\(3 x 1\), got 4"):
        batches(data, 0, 1, 1, 0, 3)


def test_augmentations():
    image = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    eight = {augment(image, mode).tobytes() + bytes(augment(image, mode).shape) for mode in range(8)}
    assert len(eight) == 8 and np.array_equal(augment(image, 0), image)
    rng = np.random.default_rng(0)
    modes = {kind: {draw_mode(kind, rng) for _ in range(300)} for kind in ("all", "flips", "released", "none")}
    assert modes["all"] == set(range(8)) and modes["released"] == set(range(1, 8)) and modes["none"] == {0}
    flips = {augment(image, mode).tobytes() for mode in modes["flips"]}
    assert flips == {image.tobytes(), image[::-1].tobytes(), image[:, ::-1].tobytes(), image[::-1, ::-1].tobytes()}


def test_pictures_smaller_than_the_crop_are_mirrored(tmp_path):
    folder = write_pictures(tmp_path / "clean", 1, size=(10, 40))
    degraded, clean, name = TrainingSet(
        Data(sets=[PictureSet(clean=str(folder), sigma=1)], crop=16, augment="none"), 0
    )[0]
    assert clean.shape == (3, 16, 16)
    assert torch.equal(clean[:, 10:], clean[:, 4:10].flip(1))


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match="a.png: not readable as a picture"):
        Reader()(Picture(str(tmp_path / "a.png"), "a.png"))


def test_the_cache_keeps_what_fits(tmp_path):
    files = sorted(write_pictures(tmp_path, 3).iterdir())
    read = Reader(2 * 24 * 32 * 3)
    first = [read(Picture(str(file), file.name)) for file in files]
    again = [read(Picture(str(file), file.name)) for file in files]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


# --- pairs


def test_pairs_of_folders(tmp_path):
    write_pictures(tmp_path / "low" / "sub", 2)
    for file in (tmp_path / "low" / "sub").iterdir():
        save(tmp_path / "gt" / "sub" / f"{file.stem}.bmp", pixels(file) // 2)
    pairs = find_pairs(PictureSet(degraded="low", clean="gt"), tmp_path)
    assert [(p.degraded.name, p.clean.name) for p in pairs] == [
        (str(tmp_path / "low" / "sub" / f"0{i}.png"), str(tmp_path / "gt" / "sub" / f"0{i}.bmp")) for i in range(2)
    ]
    data = TrainingSet(Data(root=str(tmp_path), sets=[PictureSet(degraded="low", clean="gt")], crop=16), 0)
    for number in range(8):  # both are cropped and turned alike
        degraded, clean, _ = data[number]
        assert ((degraded * 255 / 2).floor() - (clean * 255)).abs().max() < 1e-3
    (tmp_path / "gt" / "sub" / "00.bmp").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 pictures in .* have no clean one by the rule 'same'.*00.png"):
        find_pairs(PictureSet(degraded="low", clean="gt"), tmp_path)


def test_the_released_codes_lists_and_names(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    for name in ("Derain/rainy/rain-1.png", "Derain/rainy/rain-22.png", "Derain/rainy/rain-3.png"):
        save(tmp_path / name, image)
        save(tmp_path / name.replace("rainy/rain", "gt/norain"), image)
    for name in ("part1/0025_0.8_0.04.jpg", "part2/0025_1_0.2.jpg", "part2/7_1_0.2.jpg"):
        save(tmp_path / "Dehaze/synthetic" / name, image)
    for name in ("0025", "7"):
        save(tmp_path / f"Dehaze/original/{name}.jpg", image)
    for name in ("a.bmp", "b.jpg", "c.jpg"):
        save(tmp_path / "Denoise" / name, image)
    (tmp_path / "rain.txt").write_text("rainy/rain-22.png\nrainy/rain-1.png")
    (tmp_path / "hazy.txt").write_text("synthetic/part2/7_1_0.2.jpg\nsynthetic/part1/0025_0.8_0.04.jpg\n")
    (tmp_path / "noisy.txt").write_text("c.jpg\na.bmp\n")

    def names(**one):
        pairs = find_pairs(PictureSet(**one), tmp_path)
        short = [str(p.clean.name).removeprefix(f"{tmp_path}/") for p in pairs]
        return [(p.name.removeprefix(f"{tmp_path}/"), c) for p, c in zip(pairs, short, strict=True)]

    rain = {"degraded": "Derain/rainy", "clean": "Derain/gt", "pair": "derain"}
    haze = {"degraded": "Dehaze/synthetic", "clean": "Dehaze/original", "pair": "dehaze"}
    assert names(**rain, names="rain.txt") == [
        ("Derain/rainy/rain-22.png", "Derain/gt/norain-22.png"), ("Derain/rainy/rain-1.png", "Derain/gt/norain-1.png"),
    ]  # fmt: skip
    assert len(names(**rain)) == 3 and len(names(**haze)) == 3
    assert names(**haze, names="hazy.txt") == [
        ("Dehaze/synthetic/part2/7_1_0.2.jpg", "Dehaze/original/7.jpg"),
        ("Dehaze/synthetic/part1/0025_0.8_0.04.jpg", "Dehaze/original/0025.jpg"),
    ]
    assert names(clean="Denoise", sigma=15, names="noisy.txt") == [("Denoise/c.jpg",) * 2, ("Denoise/a.bmp",) * 2]
    (tmp_path / "noisy.txt").write_text("c.jpg\nd.jpg\n")
    with pytest.raises(FileNotFoundError, match="1 of the 2 files that .*noisy.txt' lists are not in .*d.jpg"):
        names(clean="Denoise", sigma=15, names="noisy.txt")
    with pytest.raises(
        ConfigError, match="pair: expected same, derain, dehaze or 'PATTERN => REPLACEMENT', got 'rain'"
    ):
        names(**{**rain, "pair": "rain"})
    assert names(**{**rain, "pair": "^rain-(.*) => norain-\\1"}) == names(**rain)


def test_what_is_held_out_is_not_trained_on(tmp_path):
    write_pictures(tmp_path / "clean", 6)
    noisy = [PictureSet(clean="clean", sigma=s) for s in (15, 25)]
    data = TrainingSet(Data(root=str(tmp_path), sets=noisy, crop=16, hold_out=2), 0)
    assert len(data.held_out) == 4 and len(data.pairs) == 8
    assert {p.clean for p in data.held_out}.isdisjoint({p.clean for p in data.pairs})
    write_pictures(tmp_path / "bad", 6)
    sets = [PictureSet(clean="clean", sigma=15), PictureSet(degraded="bad", clean="clean", pair="0(.).png => 00.png")]
    with pytest.raises(ValueError, match="pictures that one set holds out are trained on by another"):
        TrainingSet(Data(root=str(tmp_path), sets=sets, crop=16, hold_out=1), 0)
    with pytest.raises(ValueError, match="data.hold_out: set '' has 6 pictures, got 6"):
        TrainingSet(Data(root=str(tmp_path), sets=noisy, crop=16, hold_out=6), 0)


def test_validation_pictures_are_the_same_every_time(tmp_path):
    write_pictures(tmp_path / "clean", 3)
    one = PictureSet(name="v", clean="clean", sigma=[15, 50])
    a, b = (
        list(ValidationSet(Data(root=str(tmp_path), validation=[one], validation_crop=16), [], 0)) for _ in range(2)
    )
    assert [measure for measure, _ in a] == ["v_15", "v_25", "v_50"] * 3
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert torch.equal(x.degraded, y.degraded)
    for measure, (degraded, clean, _) in a:
        assert float((degraded - clean).std()) * 255 == pytest.approx(float(measure[2:]), rel=0.15)


# --- shards


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, image in members:
            data = io.BytesIO()
            Image.fromarray(image).save(data, "PNG")
            info = tarfile.TarInfo(name)
            info.size = data.tell()
            data.seek(0)
            archive.addfile(info, data)


def test_shards_give_what_their_folders_give(tmp_path):
    clean = sorted(write_pictures(tmp_path / "clean", 4).iterdir())
    members = [(f"{file.stem}.png", pixels(file)) for file in clean]
    write_shard(tmp_path / "train-000.tar", members[:3])
    write_shard(tmp_path / "train-001.tar", members[3:])
    folders = TrainingSet(Data(root=str(tmp_path), sets=[PictureSet(clean="clean", sigma=25)], crop=16), 0)
    for pattern in ("train-{000..001}.tar", "train-*.tar"):
        shards = TrainingSet(Data(root=str(tmp_path), sets=[PictureSet(shards=pattern, sigma=25)], crop=16), 0)
        for number in range(8):
            assert torch.equal(shards[number].degraded, folders[number].degraded)
    assert shards[0].name.startswith(str(tmp_path / "train-00")) and shards[0].name.endswith(".png")


def test_pairs_in_shards_as_webdataset_writes_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    images = [np.full((16, 16, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    with webdataset.TarWriter(str(tmp_path / "pairs.tar")) as sink:
        for i in range(2):
            sink.write(
                {"__key__": f"d/{i}", "degraded.png": images[2 * i], "clean.png": images[2 * i + 1], "x.txt": "x"}
            )
    pairs = find_pairs(PictureSet(shards="pairs.tar"), tmp_path)
    read = Reader()
    assert [(int(read(p.degraded).max()), int(read(p.clean).max())) for p in pairs] == [(10, 20), (30, 40)]


def test_shards_by_url(tmp_path):
    import fsspec

    (file,) = sorted(write_pictures(tmp_path, 1).iterdir())
    write_shard(tmp_path / "a.tar", [("k.png", pixels(file))])
    with fsspec.open("memory://shards/a.tar", "wb") as remote:
        remote.write((tmp_path / "a.tar").read_bytes())
    (pair,) = find_pairs(PictureSet(shards="memory://shards/*.tar", sigma=25), tmp_path)
    assert np.array_equal(Reader()(pair.clean), pixels(file))


def test_shards_that_cannot_be_read_one_by_one(tmp_path):
    write_shard(tmp_path / "a.tar", [("k.clean.png", np.zeros((8, 8, 3), np.uint8))])
    with pytest.raises(ConfigError, match="a.tar: sample 'k': expected clean.EXT and degraded.EXT, got clean.png"):
        find_pairs(PictureSet(shards="a.tar"), tmp_path)
    import gzip

    with open(tmp_path / "a.tar", "rb") as raw, gzip.open(tmp_path / "b.tar.gz", "wb") as packed:
        shutil.copyfileobj(raw, packed)
    with pytest.raises(ValueError, match="b.tar.gz: not readable as an uncompressed tar file"):
        find_pairs(PictureSet(shards="b.tar.gz", sigma=1), tmp_path)
    with pytest.raises(FileNotFoundError, match="no shard at .*c.tar"):
        find_pairs(PictureSet(shards="c.tar", sigma=1), tmp_path)
    assert settings(tmp_path).data.sets[0].clean == "clean"


# --- rain


def test_rain_is_bright_streaks_of_one_direction_drawn_for_each_sample(tmp_path):
    angles, covered = [], []
    for seed in range(40):
        streaks = rain_streaks(64, 96, np.random.default_rng(seed))
        assert streaks.shape == (64, 96) and streaks.dtype == np.float32
        assert streaks.min() >= 0 and streaks.max() <= 0.9
        down, right = np.gradient(streaks.astype(float))
        tensor = np.array([[(down * down).sum(), (down * right).sum()], [(down * right).sum(), (right * right).sum()]])
        values, vectors = np.linalg.eigh(tensor)
        assert values[0] < 0.3 * values[1]  # along the streaks there is little change
        along = vectors[:, 0] * np.sign(vectors[0, 0])
        drawn = np.random.default_rng(seed).uniform(-30, 30)
        angles.append((drawn, np.rad2deg(np.arctan2(along[1], along[0])) - drawn))
        covered.append((streaks > 0.05).mean())
    drawn, errors = np.array(angles).T
    assert np.abs(errors).max() < 10 and np.std(drawn) > 10
    assert 0.01 < min(covered) < 0.15 < max(covered) < 0.7
    assert np.array_equal(rain_streaks(8, 8, np.random.default_rng(0)), rain_streaks(8, 8, np.random.default_rng(0)))


def test_a_streak_is_a_line_of_its_length_through_its_drop():
    class Fixed:
        """One drop in the middle, falling straight down."""

        values = iter([0.0, 20.0, 0.5, 1.0, 0.5])

        def uniform(self, low, high, size=None):
            return np.full(size, 1.0) if size is not None else next(self.values)

        def random(self, size):
            drops = np.ones(size)
            drops[size[0] // 2, size[1] // 2] = 0
            return drops

    streaks = rain_streaks(41, 41, Fixed())
    column = streaks[:, 20]
    assert np.allclose(column[11:30], 0.5, atol=1e-6) and np.allclose(column[:10], 0, atol=1e-6)
    assert column.sum() == pytest.approx(0.5 * 20, rel=0.01)  # its length
    assert np.allclose(streaks[20, [19, 21]], 0.5 * np.exp(-2), atol=1e-6) and np.allclose(
        streaks[20, :17], 0, atol=1e-6
    )


def test_samples_of_rain(tmp_path):
    write_pictures(tmp_path / "clean", 2, size=(64, 64))
    sets = [PictureSet(clean="clean", rain=True), PictureSet(clean="clean", rain=True, sigma=25)]
    rainy, noisy = (TrainingSet(Data(root=str(tmp_path), sets=[one], crop=64), 0) for one in sets)
    differences = []
    for number in range(8):
        degraded, clean, _ = rainy[number]
        assert torch.allclose((degraded * 255).round(), degraded * 255, atol=1e-3) and degraded.max() <= 1
        assert (degraded - clean).min() >= -1e-6
        differences.append(float((degraded - clean).max()))
        other = noisy[number].degraded - degraded
        assert float(other.std()) * 255 == pytest.approx(25, rel=0.1)
    assert max(differences) > 0.2
