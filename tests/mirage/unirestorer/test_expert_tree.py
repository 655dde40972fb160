"""Hierarchical k-means: what every tree holds to, planted clusters found again, seeds, tasks, files."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from mirage.unirestorer import RELEASED_CHILDREN, ExpertTree, Node
from mirage.unirestorer.clustering import Auto, kmeans, nearest, parse_children

pytest.importorskip("sklearn", reason="the extra [unirestorer] is not installed")

DIM = 6


def blobs(counts=((40, 25, 15), (30, 22), (12, 9, 8)), seed=0):
    """Two-level blobs: outer centres 100 apart, inner ones 10, samples 0.5; points, and outer and inner labels."""
    rng = np.random.default_rng(seed)
    points, outer, inner = [], [], []
    for place, own in enumerate(counts):
        for part, count in enumerate(own):
            centre = 100.0 * np.eye(DIM)[place] + 10.0 * np.eye(DIM)[3 + part]
            points.append(centre + 0.5 * rng.standard_normal((count, DIM)))
            outer += [place] * count
            inner += [(place, part)] * count
    order = rng.permutation(len(outer))
    return np.concatenate(points)[order], [outer[i] for i in order], [inner[i] for i in order]


def noise(count=300, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32))


def partition(tree, level):
    return {frozenset(node.members.tolist()) for node in tree.nodes if node.level == level}


def planted(labels):
    return {frozenset(i for i, other in enumerate(labels) if other == label) for label in set(labels)}


# --- properties of every tree


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "children",
    [[], 5, [4, 3], [4, "auto:9"], [3, [1, 4, 2], "auto:11"], "2 3+1"],
    ids=["root", "5", "4-3", "auto", "three", "text"],
)
def test_members_centres_and_assignments_agree(children, normalize):
    points = noise()
    tree = ExpertTree.fit(points, children, seed=3, normalize=normalize)
    seen = points.double()
    seen = seen / seen.norm(dim=1, keepdim=True) if normalize else seen
    assert torch.equal(tree.nodes[0].members, torch.arange(len(points)))
    for node in tree.nodes:
        assert node.size == len(node.members) > 0
        torch.testing.assert_close(node.centre, seen[node.members].mean(0), rtol=0, atol=1e-14)
        if node.level < tree.levels - 1:
            parts = [tree.nodes[child].members for child in tree.children(node.id)]
            assert torch.equal(torch.cat(parts).sort().values, node.members)
            centres = torch.stack([tree.nodes[child].centre for child in tree.children(node.id)])
            for place, part in enumerate(parts):  # the nearest sibling is the own one
                distances = (seen[part][:, None] - centres).square().sum(-1)
                assert (distances.argmin(1) == place).all()
    leaf = tree.assign(points)
    for number, node in enumerate(tree.leaves):
        assert torch.equal((leaf == number).nonzero()[:, 0], tree.nodes[node].members)
    assert torch.equal(tree.assign(points[5:6]), leaf[5:6])


def test_ids_run_level_by_level_and_children_by_size():
    tree = ExpertTree.fit(noise(), [4, 3])
    assert [node.id for node in tree.nodes] == list(range(17))
    assert Counter(node.level for node in tree.nodes) == {0: 1, 1: 4, 2: 12}
    assert repr(tree) == "ExpertTree({1, 4, 12})" and tree.levels == 3 and tree.leaves == tuple(range(5, 17))
    for node in tree.nodes[:5]:
        sizes = [tree.nodes[child].size for child in tree.children(node.id)]
        assert sizes == sorted(sizes, reverse=True)
        first = tree.children(node.id)[0]
        assert tree.children(node.id) == tuple(range(first, first + len(sizes)))
    for number, row in enumerate(tree.paths.tolist()):
        assert row[0] == 0 and row[-1] == tree.leaves[number]
        assert all(tree.nodes[below].parent == above for above, below in zip(row, row[1:], strict=False))


def test_children_of_one_size_stand_by_their_centres():
    points = np.array([[0.0, 5], [0, 6], [9, 0], [9, 1], [-3, 0], [-3, 1]])
    tree = ExpertTree.fit(points, 3)
    assert [node.centre[0].item() for node in tree.nodes[1:]] == [-3, 0, 9]


def test_planted_blobs_are_found_exactly():
    points, outer, inner = blobs()
    for children in ([3, [3, 2, 3]], [3, "auto:8"]):
        tree = ExpertTree.fit(points, children, seed=0)
        assert partition(tree, 1) == planted(outer)
        assert partition(tree, 2) == planted(inner)
        assert [node.size for node in tree.nodes[1:4]] == [80, 52, 29]
        assert [len(tree.children(node)) for node in (1, 2, 3)] == [3, 2, 3]


def test_auto_gives_more_children_to_the_group_whose_inertia_falls_most():
    points, _, _ = blobs(counts=((30, 30, 30), (30,), (30,)))
    tree = ExpertTree.fit(points, [3, "auto:5"])
    assert [len(tree.children(node)) for node in (1, 2, 3)] == [3, 1, 1]
    with pytest.raises(ValueError, match="at least as many nodes as the 3"):
        ExpertTree.fit(points, [3, "auto:2"])


def test_the_seed_decides_the_tree():
    points = noise(400)
    first, again, other = (ExpertTree.fit(points, [5, "auto:14"], seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint and torch.equal(first.centres, again.centres)
    assert first.fingerprint != other.fingerprint


def test_kmeans_is_a_fixed_point_and_no_worse_than_sklearn():
    from sklearn.cluster import KMeans

    points = noise(500, seed=4).double().numpy()
    clusters = kmeans(points, 7, seed=9)
    assert len(clusters) == 7 and sorted(np.concatenate(clusters)) == list(range(500))
    centres = np.stack([points[cluster].mean(0) for cluster in clusters])
    places, distance = nearest(points, centres)
    assert all((places[cluster] == place).all() for place, cluster in enumerate(clusters))
    theirs = KMeans(7, n_init=10, max_iter=300, tol=1e-4, random_state=9).fit(points).inertia_
    assert (distance**2).sum() <= theirs * (1 + 1e-12)


def test_small_and_equal_groups_are_not_divided():
    points, _, _ = blobs(counts=((40, 25), (10, 9)))
    tree = ExpertTree.fit(points, [2, 2], min_samples=20)
    assert [len(tree.children(node)) for node in (1, 2)] == [2, 1]
    whole, copy = tree.nodes[2], tree.nodes[tree.children(2)[0]]
    assert torch.equal(whole.members, copy.members) and torch.equal(whole.centre, copy.centre)
    assert len(tree.leaves) == 3 and tree.paths.shape == (3, 3)

    same = np.repeat([[1.0, 2.0], [3.0, 4.0]], 5, axis=0)
    assert [node.size for node in ExpertTree.fit(same, 4).nodes] == [10, 5, 5]
    assert len(ExpertTree.fit(np.ones((3, 2)), [2, 2])) == 3


def test_more_clusters_than_points_give_one_each():
    tree = ExpertTree.fit(np.arange(3.0)[:, None], 8)
    assert [node.centre.item() for node in tree.nodes[1:]] == [0, 1, 2]


# --- tasks


def with_tasks():
    points, outer, inner = blobs(counts=((40, 25), (30, 60)))
    names = [("noise", "rain")[place] for place in outer]
    names[outer.index(0)] = "snow"  # one among 65, by mistake
    return ExpertTree.fit(points, [2, 2], names), names, outer


def test_nodes_count_tasks_and_a_named_task_masks_leaves():
    tree, names, outer = with_tasks()
    assert tree.tasks == ("noise", "rain", "snow")
    assert tree.nodes[0].tasks == dict(Counter(names)) == {"noise": 64, "rain": 90, "snow": 1}
    assert tree.node_tasks()[:3] == (("rain", "noise"), ("rain",), ("noise",))
    assert tree.node_tasks(0.0)[2] == ("noise", "snow")
    assert tree.leaf_mask("rain").tolist() == [True, True, False, False]
    assert tree.leaf_mask("noise").tolist() == [False, False, True, True]
    snow = tree.leaf_mask("snow")  # below 5 % everywhere: the leaf that holds it
    assert snow.sum() == 1 and names.index("snow") in tree.nodes[tree.leaves[int(snow.nonzero())]].members
    with pytest.raises(ValueError, match="expected one of noise, rain, snow; got 'fog'"):
        tree.leaf_mask("fog")
    with pytest.raises(ValueError, match="made without tasks"):
        ExpertTree.fit(noise(20), 2).leaf_mask("fog")


# --- files


def test_a_tree_survives_its_files(tmp_path):
    tree, _, _ = with_tasks()
    tree.save(tmp_path / "runs" / "tree.json")
    found = ExpertTree.load(tmp_path / "runs" / "tree.json")
    assert found.fingerprint == tree.fingerprint and found.normalize == tree.normalize
    for mine, theirs in zip(tree.nodes, found.nodes, strict=True):
        assert (mine.id, mine.level, mine.parent, mine.tasks) == (theirs.id, theirs.level, theirs.parent, theirs.tasks)
        assert torch.equal(mine.members, theirs.members) and torch.equal(mine.centre, theirs.centre)
    points = blobs()[0]
    assert torch.equal(tree.assign(points), found.assign(points))
    content = json.loads((tmp_path / "runs" / "tree.json").read_text())
    assert content["format"].endswith("version 1") and content["nodes"][1]["size"] == 90


def test_files_that_are_no_tree_or_not_of_one_tree(tmp_path):
    path = tmp_path / "tree.json"
    with pytest.raises(FileNotFoundError):
        ExpertTree.load(path)
    first, second = (ExpertTree.fit(noise(), children) for children in (2, 3))
    second.save(path)
    tensors = path.with_suffix(".safetensors").read_bytes()
    first.save(path)
    path.with_suffix(".safetensors").write_bytes(tensors)
    with pytest.raises(ValueError, match="not the one that was written with it"):
        ExpertTree.load(path)
    for text, message in (("{", "not readable as JSON"), ("[]", "got 'list'"), ('{"format": "2"}', "got '2'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            ExpertTree.load(path)
    with pytest.raises(ValueError, match=r"ends in \.json"):
        first.save(tmp_path / "tree.pt")


# --- trees without samples


def test_the_released_tree_from_its_table(tmp_path):
    level1 = [1] * 3 + [2] * 3 + [3] * 3 + [4] * 7 + [5] * 2 + [6] * 2 + [7] * 2
    table = [[0, parent, 8 + leaf] for leaf, parent in enumerate(level1)]
    tree = ExpertTree.from_paths(table)
    assert tree.paths.tolist() == table == ExpertTree.from_children(RELEASED_CHILDREN).paths.tolist()
    assert tree.levels == 3 and len(tree) == 30 and tree.leaves == tuple(range(8, 30)) and tree.tasks == ()
    with pytest.raises(ValueError, match="made without embeddings"):
        tree.assign(torch.zeros(1, 3))
    tree.save(tmp_path / "tree.json")
    assert torch.equal(ExpertTree.load(tmp_path / "tree.json").paths, tree.paths)
    assert ExpertTree.from_paths([[0]]).levels == 1


@pytest.mark.parametrize(
    "table, message",
    [
        ([[0, 1, 3], [0, 2, 3]], "node 3 twice"),
        ([[0, 1, 2], [0, 1, 1]], "node 1 twice"),
        ([[0, 2], [0, 1]], "ascending"),
        ([[0, 1], [0, 3]], "ids 0, 1, 2"),
        ([[1, 0]], "a root first"),
        ([0, 1], r"got torch.int64 \[2\]"),
        ([[0.0, 1.0]], "got torch.float32"),
    ],
)
def test_tables_that_are_no_tree(table, message):
    with pytest.raises(ValueError, match=message):
        ExpertTree.from_paths(table)


# --- refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embeddings": torch.zeros(3)}, r"embeddings: expected \[N, D\], got \[3\]"),
        ({"embeddings": torch.zeros(0, 3)}, "at least one sample"),
        ({"embeddings": torch.tensor([[0.0], [float("nan")]])}, "others in row 1"),
        ({"tasks": ["a"]}, "each of 20 samples, got 1"),
        ({"min_samples": 0}, "min_samples: expected at least 1, got 0"),
        ({"children": [2, [1, 2, 3]]}, r"each of 2 groups, got 3"),
        ({"children": [0]}, "at least 1; got 0"),
        ({"children": ["many"]}, "got 'many'"),
        ({"children": ["auto:x"]}, "got 'auto:x'"),
        ({"children": [2, []]}, r"got \(\)|got \[\]"),
    ],
)
def test_what_cannot_be_fitted(change, message):
    with pytest.raises(ValueError, match=message):
        ExpertTree.fit(**{"embeddings": noise(20), "children": [2], **change})


def test_children_as_text():
    assert parse_children("7 3+3+3+7+2+2+2") == (7, (3, 3, 3, 7, 2, 2, 2))
    assert parse_children("4,auto:8") == (4, Auto(8)) and str(Auto(8)) == "auto:8"
    assert parse_children([2, np.int64(3), [1, 2]]) == (2, 3, (1, 2)) and parse_children(5) == (5,)
    assert parse_children("") == parse_children([]) == ()


def test_nodes_that_are_no_tree():
    ids = torch.arange
    with pytest.raises(ValueError, match="a root first"):
        ExpertTree([])
    with pytest.raises(ValueError, match="children of node 1"):
        ExpertTree([Node(0, 0, None), Node(1, 1, 0), Node(2, 1, 0), Node(3, 2, 2)])
    with pytest.raises(ValueError, match="the members of node 0, each in one"):
        ExpertTree([Node(0, 0, None, None, ids(3)), Node(1, 1, 0, None, ids(2))])
    with pytest.raises(ValueError, match="ascending order, each once, in node 0"):
        ExpertTree([Node(0, 0, None, None, torch.tensor([1, 0]))])
    with pytest.raises(ValueError, match="in all of them or in none"):
        ExpertTree([Node(0, 0, None, torch.zeros(2)), Node(1, 1, 0)])
    with pytest.raises(ValueError, match=r"embeddings: expected \[N, 6\], got \[1, 5\]"):
        ExpertTree.fit(noise(20), 2).assign(torch.zeros(1, 5))
