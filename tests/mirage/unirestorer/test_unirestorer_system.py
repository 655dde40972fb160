"""The whole system on a toy: routes, instructions, mixed sizes, explanations, arrays, files, saved and loaded."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from unirestorer_toy import TASKS, Stripes, batch, experts, parts, router, tree

from mirage.unirestorer import ExpertModules, Router, UniRestorer


class Counted(ExpertModules):
    """Notes which experts ran, and on how many images."""

    def __init__(self, modules):
        super().__init__(modules)
        self.calls = []

    def run(self, images, numbers):
        self.calls.append((numbers[0], len(numbers), tuple(images.shape[2:])))
        return super().run(images, numbers)


@pytest.fixture
def system():
    return UniRestorer(Stripes(), tree(), router(), Counted(experts()))


def images(count=12, size=8, seed=0):
    return batch(count, size=size, generator=torch.Generator().manual_seed(seed))[0]


def test_every_image_is_restored_by_the_expert_of_its_route_and_by_no_other(system):
    x = images()
    routes = system.route(x)
    assert len(set(routes.expert.tolist())) > 1
    restored = system(x)
    for image, expert, result in zip(x, routes.expert.tolist(), restored, strict=True):
        assert torch.equal(experts()[expert](image[None])[0], result)
    ran = [number for number, _, _ in system.experts.calls]
    assert ran == sorted(set(routes.expert.tolist()))  # each once
    assert sum(count for _, count, _ in system.experts.calls) == len(x)


def test_a_batch_of_mixed_sizes_is_its_images_one_by_one(system):
    x = [*images(5), *images(4, size=16, seed=1), images(1, size=24, seed=2)[0, :, :19, :13]]
    together = system(x)
    assert isinstance(together, list) and [r.shape for r in together] == [image.shape for image in x]
    for image, result in zip(x, together, strict=True):
        assert torch.allclose(system([image])[0], result, rtol=0, atol=4e-7)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    for i, result in zip(order, system([x[i] for i in order]), strict=True):
        assert torch.allclose(result, together[i], rtol=0, atol=4e-7)


def test_naming_a_task_restricts_the_leaves_and_not_the_levels(system):
    x = images(40)
    free = system.route(x)
    for leaf, task in enumerate(TASKS):
        routes = system.route(x, task)
        assert (routes.leaf == leaf).all() and torch.equal(routes.level, free.level)
        assert routes.expert.tolist() == system.tree.paths[leaf][free.level].tolist()
        assert (routes.expert[routes.level == 0] == 0).all()  # the root stays
    mixed = system.route(x[:2], [TASKS[3], None])
    assert int(mixed.leaf[0]) == 3 and int(mixed.leaf[1]) == int(free.leaf[1])
    with pytest.raises(
        ValueError, match="task: expected one of columns less, columns more, rows less, rows more; got 'fog'"
    ):
        system(x, "fog")
    with pytest.raises(ValueError, match="expected one for each of 2 images, got 1"):
        system(x[:2], ["rows more"])


def test_an_explanation_has_the_numbers_of_the_route(system):
    x = images(3)
    restored, found = system(x, explain=True)
    routes = system.route(x)
    assert torch.equal(restored, system(x))
    variance = system.router.log_variance(routes.uncertainty).exp().mean(1).detach()
    for i, one in enumerate(found):
        assert (one.leaf, one.level, one.expert) == (routes.leaf[i], routes.level[i], routes.expert[i])
        assert one.p_leaf == tuple(routes.p_leaf[i].tolist()) and one.p_level == tuple(routes.p_level[i].tolist())
        assert one.uncertainty == pytest.approx(float(variance[i]))
        assert set(one.tasks) == set(system.tree.nodes[one.expert].tasks)


def test_parts_that_are_not_of_each_other_are_refused():
    extractor, own_tree, own_router, own_experts = parts()
    with pytest.raises(ValueError, match="experts: expected one for each of the tree's 7 nodes, got 2"):
        UniRestorer(extractor, own_tree, own_router, ExpertModules(experts()[:2]))
    with pytest.raises(ValueError, match="router: expected one of the tree's paths"):
        UniRestorer(extractor, own_tree, Router([[0, 1, 2]], 8), own_experts)
    system = UniRestorer(extractor, own_tree, own_router.train(), own_experts)
    assert not system.router.training  # single images can be routed
    for wrong in (torch.rand(3, 8, 8), [torch.rand(1, 8, 8)], [torch.zeros(3, 8, 8, dtype=torch.uint8)], []):
        with pytest.raises(ValueError, match="images: expected"):
            system(wrong)


def test_arrays_of_8_bits_grey_and_alpha(system):
    pixels = (images(1, size=16)[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    found = system.restore(pixels)
    assert found.image.shape == pixels.shape and found.image.dtype == np.uint8
    x = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255
    direct = (system(x)[0].clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(found.image, direct) and found.explanation == system.select(pixels)
    alpha = np.dstack([pixels, np.full(pixels.shape[:2], 128, np.uint8)])
    assert np.array_equal(system.restore(alpha).image, np.dstack([direct, alpha[..., 3:]]))
    grey = system.restore(pixels[..., 0])
    assert grey.image.shape == pixels.shape[:2]
    named = system.restore(pixels, "columns less")
    assert named.explanation.leaf == 3


def write(folder, count=3):
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(images(count, size=16)):
        Image.fromarray((image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")


def test_files_have_a_record_each_and_are_not_done_twice(system, tmp_path):
    write(tmp_path / "in")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    outcomes = list(system.files(tmp_path / "in", tmp_path / "out"))
    assert [o.error is None for o in outcomes] == [True, True, True, False]
    head, *lines = map(json.loads, (tmp_path / "out" / "experts.jsonl").read_text().splitlines())
    assert head["system"] == f"{system.fingerprint} task=any" and len(lines) == 3
    for outcome, line in zip(outcomes, lines, strict=False):
        assert line["expert"] == outcome.explanation.expert and line["p_leaf"] == list(outcome.explanation.p_leaf)
    with open(tmp_path / "out" / "experts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["level"]) for row in rows] == [line["level"] for line in lines]
    assert json.loads(rows[0]["p_level"]) == lines[0]["p_level"]

    system.experts.calls.clear()
    again = list(system.files(tmp_path / "in", tmp_path / "out"))
    assert [o.skipped for o in again] == [True, True, True, False]
    assert again[0].explanation == outcomes[0].explanation
    with pytest.raises(ValueError, match="has results of another system, task or confidence"):
        system.files(tmp_path / "in", tmp_path / "out", task="rows less")
    system.confidence = 0.9
    with pytest.raises(ValueError, match="has results of another system, task or confidence"):
        system.files(tmp_path / "in", tmp_path / "out")
    confident = list(system.files(tmp_path / "in", tmp_path / "confident"))
    seen = [(image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy() for image in images(3, size=16)]
    assert [o.explanation for o in confident[:3]] == [system.select(each) for each in seen]
    system.confidence = 0.8
    with pytest.raises(ValueError, match="has results of another system, task or confidence"):
        system.files(tmp_path / "in", tmp_path / "confident")
    system.confidence = None
    with pytest.raises(ValueError, match="task: expected one of"):
        system.files(tmp_path / "in", tmp_path / "elsewhere", task="fog")
    named = list(system.files(tmp_path / "in", tmp_path / "out", task="rows less", overwrite=True))
    assert {o.explanation.leaf for o in named if o.explanation} == {1}


def test_a_system_in_a_folder_is_the_same_system(tmp_path):
    """With networks that have files, and the extractor given again."""
    import mirage
    from mirage.unirestorer import SystemFolder

    torch.manual_seed(0)
    networks = [mirage.MIRAGE(dim=6, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1).eval() for _ in range(7)]
    system = UniRestorer(Stripes(), tree(), router(), ExpertModules(networks))
    folder = SystemFolder(tmp_path / "system")
    folder.save(system, extractor=False)
    again = UniRestorer.load(tmp_path / "system", device="cpu", extractor=Stripes(), fast=False)
    assert again.fingerprint == system.fingerprint
    assert again.confidence is None
    hedged = UniRestorer.load(tmp_path / "system", device="cpu", extractor=Stripes(), fast=False, confidence=0.9)
    assert hedged.confidence == 0.9
    x = images(6, size=16)
    assert torch.equal(again.route(x).expert, system.route(x).expert)
    assert torch.allclose(again(x), system(x), rtol=0, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="no extractor in"):
        UniRestorer.load(tmp_path / "system", device="cpu")
    with pytest.raises(FileNotFoundError, match="no tree in .*cluster makes it"):
        SystemFolder(tmp_path / "nowhere").system(device="cpu", extractor=Stripes())
    described = folder.describe()
    assert described["levels"] == [1, 2, 4] and described["router"] and not described["extractor"]
    assert [node["samples"] for node in described["nodes"]] == [40, 20, 20, 10, 10, 10, 10]
    assert all(node["expert"] for node in described["nodes"])
