"""The limit of foreign images, from images of known degradations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mirage.grids import GGD, GroupedRestorer, RestorerGroup, calibrate

CROPS, COMPONENTS, PATCH = 40, 6, 8


class Pixels:
    """A descriptor: the pixels' differences to their right neighbours."""

    fingerprint = "pixels"

    def features(self, images):
        return (images[..., 1:] - images[..., :-1]).flatten(1)


def picture(sigma, seed):
    values = np.random.default_rng(seed).normal(0.5, sigma, (40, 48, 3))
    return np.clip(values, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def restorer():
    torch.manual_seed(0)
    groups = [RestorerGroup({name: GGD(2.0, sigma) for name, sigma in each.items()}, torch.nn.Identity())
              for each in ({"weak": 0.1, "faint": 0.08}, {"strong": 0.6})]  # fmt: skip
    return GroupedRestorer(groups, Pixels(), crops=CROPS, components=COMPONENTS, patch=PATCH, device="cpu")


def pictures(count=10):
    return [(name, picture(sigma, seed)) for name, sigma in (("weak", 0.03), ("strong", 0.3)) for seed in range(count)]


def test_the_limit_is_passed_by_as_many_as_are_allowed(restorer):
    seen = pictures()
    expected = sorted(restorer.distance(image) for _, image in seen)
    for share, place in ((1.0, 19), (0.95, 19), (0.9, 18), (0.5, 10)):
        found = calibrate(restorer, seen, share)
        assert found.limit == expected[place], share
        assert np.mean([value <= found.limit for each in found.distances.values() for value in each]) >= share
    assert found.own_group == {"weak": 1.0, "strong": 1.0}
    assert found.distances["strong"] == tuple(restorer.distance(image) for _, image in seen[10:])
    assert restorer.foreign == 4.0  # it is for the caller to set


def test_images_of_another_group_count_as_such(restorer):
    seen = [("weak", picture(0.03, 1)), ("weak", picture(0.3, 2)), ("faint", picture(0.3, 3))]
    assert calibrate(restorer, seen).own_group == {"weak": 0.5, "faint": 0.0}


@pytest.mark.parametrize(
    "seen, share, sentence",
    [
        ([], 0.9, "pictures: expected at least one, got none"),
        ([("else", picture(0.1, 0))], 0.9, "pictures: "),
        ([("weak", picture(0.1, 0))], 0.0, "share: expected a number above 0 and at most 1, got 0.0"),
        ([("weak", picture(0.1, 0))], 1.01, "share: "),
        ([("weak", picture(0.1, 0))], float("nan"), "share: "),
    ],
)
def test_what_is_wrong_is_told(restorer, seen, share, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibrate(restorer, seen, share)


def test_it_is_kept(restorer, tmp_path):
    found = calibrate(restorer, pictures(2))
    found.save(tmp_path / "calibration.json")
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert content["limit"] == found.limit and content["distances"]["weak"] == list(found.distances["weak"])


# --- what was stopped goes on


class Counting(Pixels):
    def __init__(self):
        self.count = 0

    def features(self, images):
        self.count += 1
        return super().features(images)


def stopped_after(pictures, count):
    yield from pictures[:count]
    raise KeyboardInterrupt


def test_what_was_stopped_goes_on_from_there(restorer, tmp_path, monkeypatch):
    cache, seen, counting = tmp_path / "below" / "kept.json", pictures(3), Counting()
    expected = calibrate(restorer, seen)
    monkeypatch.setattr(restorer, "descriptor", counting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(restorer, stopped_after(seen, 4), cache=cache)
    once = counting.count // 4
    assert once and calibrate(restorer, seen, cache=cache) == expected
    assert counting.count == 6 * once
    assert calibrate(restorer, seen, 0.5, cache).limit < expected.limit and counting.count == 6 * once
    monkeypatch.setattr(restorer, "foreign", expected.limit)  # the limit itself changes no distance
    assert calibrate(restorer, seen, cache=cache) == expected and counting.count == 6 * once

    changed = [(seen[0][0], seen[0][1] + np.float32(1e-3)), *seen[1:]]
    assert calibrate(restorer, changed, cache=cache).distances != expected.distances and counting.count == 7 * once
    monkeypatch.setattr(restorer, "seed", 1)
    calibrate(restorer, seen, cache=cache)
    assert counting.count == 13 * once


def test_a_cache_that_is_none_is_told(restorer, tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text('{"format": "something"}')
    with pytest.raises(ValueError, match="c.json: expected a cache of .*; remove it, or name another file"):
        calibrate(restorer, pictures(1), cache=tmp_path / "c.json")
    nameless = Counting()
    nameless.fingerprint = None
    monkeypatch.setattr(restorer, "descriptor", nameless)
    with pytest.raises(ValueError, match="cache: needs a descriptor with a fingerprint, and Counting has none"):
        calibrate(restorer, pictures(1), cache=tmp_path / "new.json")
