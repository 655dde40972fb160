"""Which group an image belongs to: the golden values, and crops of photographs."""

import math

import numpy as np
import pytest
import torch

from mirage.grids import GGD, fit_ggd, mean_ggd, query_ggd, select
from mirage.grids.selection import random_crops

GROUPS = [
    mean_ggd([GGD(0.687, 2.718), GGD(0.596, 2.333), GGD(0.466, 2.007)]),
    mean_ggd([GGD(0.75, 4.0), GGD(0.70, 3.0)]),
]


class Pixels:
    """A descriptor whose features are the pixels."""

    def features(self, images):
        return images.flatten(1)


@pytest.mark.parametrize(
    ("query", "group", "divergence", "distance", "foreign"),
    [
        ((0.60, 2.4), 0, 0.00059289, 1.780239, False),
        ((0.72, 3.4), 1, 0.00038569, 1.597354, False),
        ((1.5, 0.5), 0, 3.748020, 5.573803, True),
    ],
)
def test_selection_is_the_golden_one(query, group, divergence, distance, foreign):
    found = select(GROUPS, GGD(*query))
    assert (found.group, found.foreign) == (group, foreign)
    assert found.divergence == pytest.approx(divergence, abs=5.1e-9 if divergence < 1 else 5.1e-7)
    assert found.distance == pytest.approx(distance, abs=5.1e-7)
    assert found.distances[group] == found.distance == min(found.distances)
    assert len(found.distances) == 2


def test_the_first_of_equal_groups_is_taken_and_the_limit_itself_is_not_foreign():
    twice = [GROUPS[1], GROUPS[0], GROUPS[0]]
    found = select(twice, GGD(0.60, 2.4))
    assert found.group == 1
    assert not select(GROUPS, GGD(0.60, 2.4), foreign=found.distance).foreign
    assert select(GROUPS, GGD(0.60, 2.4), foreign=math.nextafter(found.distance, 0)).foreign
    with pytest.raises(ValueError, match="groups: expected at least one, got none"):
        select([], GROUPS[0])


def test_a_query_is_the_fit_of_random_crops_that_the_seed_decides():
    image = np.random.default_rng(0).random((90, 70, 3))
    crops = random_crops(image, 40, 8, seed=3)
    assert crops.shape == (40, 3, 8, 8)
    assert crops.dtype == torch.float32
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(np.float32), (8, 8), (0, 1)).reshape(-1, 3 * 64)
    known = {row.tobytes() for row in windows}
    assert all(crop.numpy().tobytes() in known for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) > 35
    expected = fit_ggd(crops.flatten(1), 10)
    found = query_ggd(image, Pixels(), 40, 10, seed=3, patch=8)
    assert found.alpha == pytest.approx(expected.alpha, abs=0.001)
    assert found.sigma == pytest.approx(expected.sigma, rel=1e-5)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    assert query_ggd(tensor, Pixels(), 40, 10, seed=3, patch=8) == found
    assert query_ggd(image, Pixels(), 40, 10, seed=4, patch=8) != found


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (3, 3), (1, 2)])
def test_small_images_are_continued_by_reflection(shape):
    image = np.random.default_rng(0).random((*shape, 3)).astype(np.float32)
    crops = random_crops(image, 30, 8, seed=0)
    assert crops.shape == (30, 3, 8, 8)
    assert set(crops.flatten().tolist()) <= set(image.flatten().tolist())
    assert len(crops.unique(dim=0)) > (1 if shape == (1, 2) else 10)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((80, 80)), r"image: expected floating point \[H, W, 3\] in \[0, 1\], got float64 \[80, 80\]"),
        (np.zeros((80, 80, 3), np.uint8), "image: expected floating point .* got uint8"),
        (np.full((80, 80, 3), 0.5), "image: expected one with some structure, got the same colour everywhere"),
        (np.broadcast_to([0.1, 0.2, 0.3], (80, 80, 3)), "got the same colour everywhere"),
        (np.full((80, 80, 3), np.nan), "image: expected finite values, got 19200 others"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        query_ggd(image, Pixels(), 40, 10, patch=8)


def test_too_few_crops_are_refused_before_the_descriptor_runs():
    class Never:
        def features(self, images):
            raise AssertionError("ran")

    with pytest.raises(ValueError, match="300 of them need at least 301 patches, got 300"):
        query_ggd(np.random.default_rng(0).random((80, 80, 3)), Never(), 300)
