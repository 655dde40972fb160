"""Images restored by their groups' networks: choice, loading under a budget, folders, files and their records."""

from __future__ import annotations

import csv
import json
import threading

import numpy as np
import pytest
import torch

import mirage
from mirage.grids import GGD, Choice, GroupedRestorer, RestorerGroup, descriptor_ggd
from mirage.grids.selection import random_crops
from mirage.images import ImageFile, read_image, write_image

CROPS, COMPONENTS, PATCH = 40, 6, 8


class Pixels:
    """A descriptor: the pixels' differences to their right neighbours, and brightness."""

    fingerprint = "pixels"

    def features(self, images):
        return torch.cat([(images[..., 1:] - images[..., :-1]).flatten(1), images.mean((2, 3))], 1)


def picture(kind, seed=0, size=(40, 48)):
    """uint8: a smooth picture, or one with noise."""
    rng = np.random.default_rng(seed)
    down, right = np.mgrid[: size[0], : size[1]] / 20
    smooth = 0.5 + 0.3 * np.sin(down[..., None] * rng.uniform(0.8, 1.2, 3) + right[..., None] + seed)
    strength = {"smooth": 0.0, "noise": 0.2, "more": 0.3, "little": 0.004}[kind]
    return np.rint(255 * np.clip(smooth + strength * rng.standard_normal((*size, 3)), 0, 1)).astype(np.uint8)


def fitted(kind):
    image = picture(kind, 9).astype(np.float32) / 255
    return descriptor_ggd(Pixels(), random_crops(image, CROPS, PATCH, 1), COMPONENTS)


def network(seed=0):
    torch.manual_seed(seed)
    return mirage.MIRAGE(dim=6, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, spd=False).eval()


@pytest.fixture(scope="module")
def groups():
    return [
        RestorerGroup({"BL": fitted("smooth"), "JP": fitted("little")}, network(0)),
        RestorerGroup({"GN": fitted("noise"), "SP": fitted("more")}, network(1), {"GN": 30.5}),
    ]


def restorer(groups, **options):
    sizes = {"crops": CROPS, "components": COMPONENTS, "patch": PATCH}
    return GroupedRestorer(groups, Pixels(), **{**sizes, "device": "cpu", **options})


def test_parameters_of_a_group_are_plain_means():
    group = RestorerGroup({"a": GGD(0.687, 2.718), "b": GGD(0.596, 2.333), "c": GGD(0.466, 2.007)}, "weights")
    assert (group.ggd.alpha, group.ggd.sigma) == pytest.approx((0.583, 2.352667), abs=1e-6)
    assert group.name == "a+b+c" and group.degradations == ("a", "b", "c")


def test_images_go_to_their_group_s_network(groups):
    restore = restorer(groups)
    for kind, name, weights in (("smooth", "BL+JP", network(0)), ("noise", "GN+SP", network(1))):
        image = picture(kind)
        choice = restore.select(image)
        assert choice.group == name and set(choice.distances) == {"BL+JP", "GN+SP"}
        assert choice.distance == min(choice.distances.values()) == restore.distance(image)
        assert restore.loaded[-1:] != (name,)  # choosing loads nothing
        found, again = restore.restore(image)
        assert again == choice
        np.testing.assert_array_equal(found, mirage.Restorer(weights, device="cpu")(image))
        np.testing.assert_array_equal(restore.restore(image, Choice("BL+JP", 0, 0, False, {})).image,
                                      mirage.Restorer(network(0), device="cpu")(image))  # fmt: skip


def test_foreign_images_are_told(groups):
    image = picture("noise")
    near = restorer(groups).select(image)
    assert not restorer(groups, foreign=near.distance + 0.01).select(image).foreign
    assert restorer(groups, foreign=near.distance - 0.01).select(image).foreign
    stripes = np.zeros((40, 48, 3), np.uint8)
    stripes[::2, ::3] = 255
    assert restorer(groups).select(stripes).distance > near.distance
    assert restorer(groups).select(stripes).foreign


def test_kinds_of_images_are_chosen_for_alike(groups):
    restore, image = restorer(groups), picture("noise")
    plain = restore.select(image)
    alpha = np.concatenate([image, np.full((*image.shape[:2], 1), 9, np.uint8)], 2)
    for other in (alpha, image.astype(np.uint16) * 257, image.astype(np.float32) / 255):
        assert restore.select(other).group == plain.group
        assert restore.select(other).distance == pytest.approx(plain.distance, abs=1e-6)
    grey = image[..., 0]
    same = np.repeat(grey[..., None], 3, 2)
    assert restore.select(grey) == restore.select(same) == restore.select(grey[..., None])
    assert restore.restore(grey).image.shape == grey.shape


def test_networks_are_loaded_on_demand_and_let_go_within_the_budget(groups, tmp_path):
    files = []
    for i, group in enumerate(groups):
        mirage.save_checkpoint(group.weights, tmp_path / f"{i}.safetensors")
        files.append(RestorerGroup(group.ggds, tmp_path / f"{i}.safetensors"))
    one = sum(t.numel() * t.element_size() for t in (*network().parameters(), *network().buffers()))
    roomy = restorer(files)
    assert roomy.loaded == () and roomy.loaded_bytes == 0
    for name in ("BL+JP", "GN+SP", "BL+JP"):
        roomy.restorer(name)
    assert roomy.loaded == ("GN+SP", "BL+JP") and roomy.loaded_bytes == 2 * one
    assert roomy.restorer("BL+JP") is roomy.restorer("BL+JP")
    tight = restorer(files, memory=int(1.5 * one))
    first = tight.restorer("BL+JP")
    tight.restorer("GN+SP")
    assert tight.loaded == ("GN+SP",) and tight.loaded_bytes == one
    assert tight.restorer("BL+JP") is not first and tight.loaded == ("BL+JP",)
    assert restorer(files, memory=1).restorer("GN+SP")(picture("noise")).shape == (40, 48, 3)


def test_threads_load_each_network_once(groups):
    loads = []

    class Counting(GroupedRestorer):
        def _load(self, weights):
            loads.append(weights)
            return super()._load(weights)

    restore = Counting(groups, Pixels(), crops=CROPS, components=COMPONENTS, patch=PATCH, device="cpu")
    image = picture("noise")
    expected, results = restorer(groups).restore(image).image, []
    threads = [threading.Thread(target=lambda: results.append(restore.restore(image).image)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(results) == 4
    assert all(np.array_equal(each, expected) for each in results)


def test_own_restorers_serve_too(groups, tmp_path):
    own = [RestorerGroup(groups[0].ggds, groups[0].weights), RestorerGroup(groups[1].ggds, lambda image: 255 - image)]
    image = picture("noise")
    np.testing.assert_array_equal(restorer(own).restore(image).image, 255 - image)
    with pytest.raises(ValueError, match=r"GN\+SP has a restorer in the place of weights, which cannot be saved"):
        restorer(own).save(tmp_path)


# --- folders


def test_a_saved_folder_is_the_same_restorer(groups, tmp_path):
    saved = restorer(groups, foreign=3.5)
    saved.save(tmp_path / "groups")
    names = sorted(path.name for path in (tmp_path / "groups").iterdir())
    assert names == ["BL+JP.safetensors", "GN+SP.safetensors", "groups.json"]
    loaded = GroupedRestorer.load(tmp_path / "groups", Pixels(), device="cpu")
    assert loaded.loaded == () and loaded.foreign == 3.5 and list(loaded.groups) == list(saved.groups)
    assert loaded.groups["GN+SP"].psnr == {"GN": 30.5}
    for kind in ("smooth", "noise"):
        image = picture(kind)
        assert loaded.select(image) == saved.select(image)
        np.testing.assert_array_equal(loaded.restore(image).image, saved.restore(image).image)
    loaded.save(tmp_path / "groups")  # onto itself
    loaded.save(tmp_path / "copy")
    copy = GroupedRestorer.load(tmp_path / "copy", Pixels(), device="cpu")
    assert copy.fingerprint == loaded.fingerprint == GroupedRestorer.load(tmp_path / "groups", Pixels()).fingerprint
    assert GroupedRestorer.load(tmp_path / "copy", Pixels(), foreign=9.0).foreign == 9.0


def test_a_folder_with_its_descriptor(groups, tmp_path):
    from mirage.grids import SRResNetDescriptor
    from mirage.networks import create

    torch.manual_seed(0)
    descriptor = SRResNetDescriptor(create("srresnet", upscale=2, num_blocks=1, dim=4))
    sizes = {"crops": 12, "components": 4, "patch": PATCH, "device": "cpu"}
    saved = GroupedRestorer(groups, descriptor, **sizes)
    saved.save(tmp_path)
    loaded = GroupedRestorer.load(tmp_path, device="cpu")
    assert loaded.descriptor.fingerprint == descriptor.fingerprint
    assert loaded.select(picture("noise")) == saved.select(picture("noise"))


@pytest.mark.parametrize("change, error, sentence", [
    (lambda c: c.update(format="x"), ValueError, "expected the format 'mirage grouped restorer, version 1'"),
    (lambda c: c.pop("groups"), ValueError, r"not readable as groups of restorers: 'groups'"),
    (lambda c: c["groups"][0].update(weights="../x.safetensors"), ValueError, "expected the name of a file in the f"),
    (lambda c: c["groups"][0].update(weights="x.safetensors"), FileNotFoundError, "names x.safetensors, which is not"),
    (lambda c: c["groups"][0]["degradations"].update(BL=[-1, 1]), ValueError, "alpha: expected a positive"),
    (lambda c: c["groups"][0]["degradations"].update(GN=[1, 1]), ValueError, "in one group, got GN in several"),
    (lambda c: c.update(groups=[]), ValueError, "groups: expected at least one, got none"),
    (lambda c: c.update(descriptor="other"), ValueError, "the descriptor has other weights"),
])  # fmt: skip
def test_what_is_wrong_with_a_folder_is_told(groups, tmp_path, change, error, sentence):
    restorer(groups).save(tmp_path)
    content = json.loads((tmp_path / "groups.json").read_text())
    change(content)
    (tmp_path / "groups.json").write_text(json.dumps(content))
    with pytest.raises(error, match=sentence):
        GroupedRestorer.load(tmp_path, Pixels())


def test_a_folder_without_descriptor_asks_for_one(groups, tmp_path):
    restorer(groups).save(tmp_path)
    with pytest.raises(ValueError, match="was saved without its descriptor, which has to be given"):
        GroupedRestorer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no groups of restorers in .*: it has no groups.json"):
        GroupedRestorer.load(tmp_path / "other")


@pytest.mark.parametrize("call, error, sentence", [
    (lambda g: restorer([]), ValueError, "groups: expected at least one, got none"),
    (lambda g: restorer([g[0], RestorerGroup({"BL": GGD(1, 1)}, "x")]), ValueError, "got BL in several"),
    (lambda g: RestorerGroup({}, "x"), ValueError, "ggds: expected at least one degradation, got none"),
    (lambda g: RestorerGroup({"a": GGD(1, 1)}, "x", {"b": 1.0}), ValueError, "psnr: expected some of a, got 'b'"),
    (lambda g: restorer(g).select(np.full((20, 20, 3), 7, np.uint8)), ValueError, "the same colour everywhere"),
    (lambda g: restorer(g).select([1, 2]), TypeError, "array: expected a numpy array, got list"),
    (lambda g: restorer(g, crops=COMPONENTS).select(picture("noise")), ValueError, "at least 7 patches, got 6"),
    (lambda g: restorer(g).restorer("XX"), ValueError, r"group: expected some of BL\+JP, GN\+SP, got 'XX'"),
    (lambda g: restorer(g, memory="much"), ValueError, "memory: expected bytes such as 2G"),
])  # fmt: skip
def test_what_is_wrong_is_told(groups, call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(groups)


# --- files


@pytest.fixture
def folder(tmp_path):
    for i, kind in enumerate(("smooth", "noise", "more")):
        path = tmp_path / "in" / ("deep" if i else "") / f"{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, ImageFile(picture(kind, i)))
    write_image(tmp_path / "in" / "plain.png", ImageFile(np.full((20, 20, 3), 7, np.uint8)))
    return tmp_path


def records(folder):
    head, *lines = (json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines())
    return head, {line["target"]: line for line in lines}


def test_files_and_their_records(groups, folder):
    restore, out = restorer(groups), folder / "out"
    outcomes = {each.source.stem: each for each in restore.files(folder / "in", out)}
    assert {name: each.choice and each.choice.group for name, each in outcomes.items()} == {
        "smooth": "BL+JP", "noise": "GN+SP", "more": "GN+SP", "plain": None,
    }  # fmt: skip
    assert "the same colour everywhere" in outcomes["plain"].error
    for name in ("smooth", "noise", "more"):
        image = read_image(outcomes[name].source).pixels
        found = restore.restore(image)
        np.testing.assert_array_equal(read_image(outcomes[name].target).pixels, found.image)
        assert outcomes[name].choice == found.choice and outcomes[name].error is None
    head, lines = records(out)
    assert head["groups"] == restore.fingerprint and len(lines) == 3
    noise = lines[str(outcomes["noise"].target)]
    assert noise["group"] == "GN+SP" and noise["distance"] == outcomes["noise"].choice.distance
    assert noise["foreign"] is outcomes["noise"].choice.foreign
    with open(out / "groups.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == sorted(lines)
    assert {row["group"] for row in rows} == {"BL+JP", "GN+SP"} and float(rows[0]["distance"])


def test_a_second_run_goes_on(groups, folder):
    out = folder / "out"
    run = restorer(groups).files(folder / "in", out)
    first = next(run)
    run.close()  # stopped; the table is written all the same
    assert (out / "groups.csv").exists() and len(records(out)[1]) == 1
    with open(out / "groups.jsonl", "a") as file:
        file.write('{"source": "half a li')
    (out / "deep").mkdir(exist_ok=True)
    loaded = restorer(groups)
    outcomes = list(loaded.files(folder / "in", out))
    assert [each.skipped for each in outcomes if each.source == first.source] == [True]
    assert len(records(out)[1]) == 3
    ledger = (out / "groups.jsonl").read_text()
    again = restorer(groups)
    for each in again.files(folder / "in", out):
        assert each.skipped or each.error is not None
        assert each.error is not None or each.choice == next(o.choice for o in outcomes if o.target == each.target)
    assert again.loaded == () and (out / "groups.jsonl").read_text() == ledger
    # a result whose record is lost gets it again, without being restored
    (out / "groups.jsonl").unlink()
    assert all(each.skipped or each.error for each in again.files(folder / "in", out))
    assert again.loaded == () and len(records(out)[1]) == 3


def test_results_of_other_groups_are_refused(groups, folder):
    out = folder / "out"
    list(restorer(groups).files(folder / "in", out))
    other = restorer(groups, foreign=1.0)
    with pytest.raises(ValueError, match="groups.jsonl: has results of other groups or weights"):
        other.files(folder / "in", out)
    outcomes = list(other.files(folder / "in", out, overwrite=True))
    assert not any(each.skipped for each in outcomes)
    assert records(out)[0]["groups"] == other.fingerprint
    noted = [each for each in outcomes if each.choice and each.choice.foreign]
    assert noted and all("foreign: lies" in each.notes[-1] for each in noted)
    (out / "groups.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="not readable as records of results"):
        other.files(folder / "in", out)
