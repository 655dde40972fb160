"""The finest node that is likely enough, on numbers made up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from unirestorer_toy import TASKS, batch, parts

from mirage.unirestorer import UniRestorer
from mirage.unirestorer.confidence import finest_level, path_shares
from mirage.unirestorer.evaluation import FIELDS, WAYS, measure_choices, measured_choices, summarise_choices
from mirage.unirestorer.tree import ExpertTree

PATHS = torch.tensor([[0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]])
"""Two groups of two leaves."""


def levels(p_leaf, leaf, confidence, paths=PATHS):
    p_leaf = torch.as_tensor(p_leaf)
    return finest_level(path_shares(p_leaf[None], torch.tensor([leaf]), paths), confidence).item()


def test_an_image_goes_as_far_down_as_its_leaves_are_likely_together():
    p = [0.5, 0.25, 0.125, 0.125]
    assert path_shares(torch.tensor([p]), torch.tensor([0]), PATHS).tolist() == [[1, 0.75, 0.5]]
    for confidence, level in ((1e-9, 2), (0.5, 2), (0.5001, 1), (0.75, 1), (0.7501, 0), (1, 0)):  # a node at it is in
        assert levels(p, 0, confidence) == level, confidence
    # the path is that of the leaf that was chosen, also where another one is as likely, or more
    assert levels([0.25] * 4, 3, 0.5) == 1 and levels([0.25] * 4, 3, 0.25) == 2
    assert levels(p, 2, 0.25) == 1 and levels(p, 2, 0.3) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_has_everything_whatever_the_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    paths = ExpertTree.from_children([[7], [3, 3, 3, 7, 2, 2, 2]]).paths
    p = torch.randn(2000, 22, generator=generator, dtype=dtype).mul(3).softmax(1)
    assert (p.sum(1) != 1).any()
    shares = path_shares(p, p.argmax(1), paths)
    assert (shares[:, 0] == 1).all() and (shares.diff(dim=1) <= 1e-15).all()
    assert (finest_level(shares, 1.0) == 0).all()
    short = p * (1 - 1e-7)  # as if all of them had lost something
    assert (path_shares(short, p.argmax(1), paths)[:, 0] == 1).all()


def test_all_of_the_probability_in_one_leaf_is_enough_for_any_limit():
    assert levels([0.0, 1.0, 0.0, 0.0], 1, 1.0) == 2
    assert levels([0.75, 0.25, 0.0, 0.0], 0, 1.0) == 1
    assert levels([1.0, 1e-12, 0.0, 0.0], 0, 1.0) == 1  # 1.0 in float32, and not all of it
    assert levels([0.9999999, 0.0, 0.0, 0.0], 0, 1.0) == 2  # a softmax whose sum is less than 1


def test_a_batch_is_its_images_one_by_one():
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(64, 4, generator=generator).mul(2).softmax(1)
    leaf = torch.randint(4, (64,), generator=generator)
    for confidence in (0.3, 0.7, 0.9, 1.0):
        found = finest_level(path_shares(p, leaf, PATHS), confidence).tolist()
        assert found == [levels(p[i], int(leaf[i]), confidence) for i in range(64)]
        for i, level in enumerate(found):
            inside = [float(p[i, PATHS[:, t] == PATHS[leaf[i], t]].double().sum()) for t in range(3)]
            assert inside[level] >= confidence - 1e-6 and all(x < confidence + 1e-6 for x in inside[level + 1 :])


def test_groups_that_were_not_divided_are_their_only_child():
    tree = ExpertTree.from_children([[2], [1, 2]])
    assert tree.paths.tolist() == [[0, 1, 3], [0, 2, 4], [0, 2, 5]]
    assert levels([0.7, 0.2, 0.1], 0, 0.6, tree.paths) == 2  # nodes 1 and 3 have the same leaves: the finer one
    assert levels([0.7, 0.2, 0.1], 0, 0.8, tree.paths) == 0
    lonely = ExpertTree.from_children([[1], [1]]).paths
    assert levels([1.0], 0, 1.0, lonely) == 2
    repeated = torch.tensor([[0, 1, 1], [0, 2, 3], [0, 2, 4]])  # as a router's own table may have it
    assert levels([0.7, 0.2, 0.1], 0, 0.6, repeated) == 2 and levels([0.7, 0.2, 0.1], 0, 0.8, repeated) == 0


@pytest.fixture
def system():
    return UniRestorer(*parts())


@pytest.fixture
def images():
    return batch(60, generator=torch.Generator().manual_seed(0))[0]


def test_a_system_goes_by_it_and_leaves_everything_else_as_it_is(system, images):
    own = system.route(images)
    system.confidence = 0.6
    routes = system.route(images)
    assert torch.equal(routes.leaf, own.leaf) and torch.equal(routes.p_leaf, own.p_leaf)
    assert torch.equal(routes.p_level, own.p_level) and torch.equal(routes.gate, own.gate)
    expected = finest_level(path_shares(own.p_leaf, own.leaf, system.tree.paths), 0.6)
    assert torch.equal(routes.level, expected) and len(expected.unique()) > 1
    assert torch.equal(routes.expert, system.tree.paths[routes.leaf, routes.level])
    restored, found = system(images, explain=True)
    assert [(each.level, each.expert) for each in found] == list(
        zip(routes.level.tolist(), routes.expert.tolist(), strict=True)
    )
    assert torch.equal(restored, system.experts.run(images, routes.expert.tolist()))
    pixels = images[0].clamp(0, 1)
    expert = int(system.route(pixels[None]).expert)
    array = pixels.permute(1, 2, 0).numpy()
    assert system.restore(array).explanation.expert == system.select(array).expert == expert

    coarse = None
    for confidence in (0.01, 0.3, 0.5, 0.7, 0.9, 1.0):
        system.confidence = confidence
        level = system.route(images).level
        assert coarse is None or (level <= coarse).all()  # the more is asked, the coarser
        coarse = level
    assert (coarse == 0).all()
    system.confidence = None
    assert torch.equal(system.route(images).level, own.level)


def test_a_named_task_leaves_its_leaf_all_of_the_probability(system, images):
    system.confidence = 1.0
    routes = system.route(images[:4], [TASKS[0], TASKS[3], None, None])
    assert routes.level.tolist() == [2, 2, 0, 0] and routes.leaf[:2].tolist() == [0, 3]
    assert routes.expert.tolist() == [3, 6, 0, 0]


@pytest.mark.parametrize("wrong", [0, -0.5, 1.001, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(system, wrong):
    with pytest.raises(ValueError, match="confidence: expected a number above 0 and at most 1, or None, got"):
        system.confidence = wrong
    with pytest.raises(ValueError, match="confidence: "):
        UniRestorer(*parts(), confidence=wrong)
    assert system.confidence is None and UniRestorer(*parts(), confidence=1).confidence == 1


def record(leaf, shares, expert=0):
    return {"degraded": 10.0, "psnr": [20.0 + node for node in range(7)], "leaf": leaf, "level": 0, "expert": expert,
            "instructed": expert, "expected_level": 0.5, "p_leaf": shares[-1], "shares": shares}  # fmt: skip


def test_a_summary_has_the_rule_beside_the_router(system):
    sure, unsure = record(1, [1.0, 0.99, 0.95]), record(2, [1.0, 0.92, 0.3])
    measured = {"a": [sure] * 3, "b": [sure, sure, unsure], "c": [unsure] * 3, "d": [unsure] * 3}
    plain = summarise_choices(system.tree, measured, ("a", "b"))
    assert plain["ways"] == list(WAYS) and plain["confidence"] is None and plain["experts"][0] == 12
    assert plain["coarser"]["above_leaves"] == {"in": 1.0, "out": 1.0}

    found = summarise_choices(system.tree, measured, ("a", "b"), 0.9)
    assert found["ways"] == [*WAYS[:4], "confident", *WAYS[4:]]
    assert found["experts"] == [0, 0, 7, 0, 5, 0, 0]  # node 2 of the third leaf's path, and the second leaf
    row = found["degradations"]["b"]
    assert row["levels"] == pytest.approx([0, 1 / 3, 2 / 3]) and row["router"] == 20
    assert row["confident"] == pytest.approx((24 + 24 + 22) / 3)
    assert found["means"]["in"]["confident"] == pytest.approx((24 + row["confident"]) / 2)
    coarser = found["coarser"]
    assert coarser["above_leaves"] == {"in": pytest.approx(1 / 6), "out": 1.0}
    assert coarser["p_level"] < 0.01 and coarser["p_level_by_degradation"] > 0.1  # of two and two
    assert measured["a"][0]["level"] == 0  # records stay as they are

    system.confidence = 0.9  # which a record would not tell
    with pytest.raises(ValueError, match="system: expected one whose router says the level, got confidence=0.9"):
        measure_choices(system, None, None)


def test_records_of_an_earlier_version_are_measured_again(system, tmp_path):
    """Without the shares there is no level to choose by a confidence."""
    seen, clean = np.random.default_rng(0).random((2, 24, 24, 3), dtype=np.float32)
    file, identity = tmp_path / "records.json", {"pictures": 1}
    first = measured_choices(system, [(seen, clean)], None, file, identity)
    assert first[0].keys() == FIELDS and measured_choices(system, [], None, file, identity) == first
    found = json.loads(file.read_text())
    del found["images"][0]["shares"]
    file.write_text(json.dumps(found))
    assert measured_choices(system, [(seen, clean)], None, file, identity) == first
    assert json.loads(file.read_text())["images"] == first
