"""Figures of trees and embeddings: what they show, and whether it can be written."""

import numpy as np
import pytest
import torch

from mirage.unirestorer import ExpertTree
from mirage.unirestorer.draw import embedding_map, tree_figure, write_figure, write_plots

for module in ("matplotlib", "sklearn"):
    pytest.importorskip(module, reason="the extra [unirestorer] is not installed")


def sample():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.standard_normal((20, 4)) + 9 * place for place in range(3)])
    return points, [name for name in ("rain", "snow", "noise") for _ in range(20)]


def test_a_tree_shows_each_node_with_its_tasks(tmp_path):
    points, tasks = sample()
    tree = ExpertTree.fit(points, [3, "auto:4"], tasks)
    figure = tree_figure(tree)
    [axes] = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == len(tree) and texts[0].splitlines()[0] == "0: 60"
    assert sum("rain" in text for text in texts) == 1 + sum("rain" in names for names in tree.node_tasks()[1:])
    heights = {patch.get_height() for patch in axes.patches}
    assert {float(tree.nodes[leaf].size) for leaf in tree.leaves} <= heights
    write_figure(figure, tmp_path / "tree.png")
    assert (tmp_path / "tree.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="expected one with tasks"):
        tree_figure(ExpertTree.fit(points, 2))
    with pytest.raises(ValueError, match=r"ends in \.png"):
        write_figure(figure, tmp_path / "tree.svg")


def test_embeddings_of_one_kind_lie_together():
    points, tasks = sample()
    figure = embedding_map(points, {"degradation": tasks, "leaf": [n % 11 for n in range(60)]})
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["degradation", "leaf"]
    assert [text.get_text() for text in second.get_legend().get_texts()] == [str(n) for n in range(11)]
    groups = [np.asarray(each.get_offsets()) for each in first.collections]
    assert [len(group) for group in groups] == [20, 20, 20]
    middles = np.stack([group.mean(0) for group in groups])
    spread = max(np.linalg.norm(group - middle, axis=1).max() for group, middle in zip(groups, middles, strict=True))
    gaps = [np.linalg.norm(a - b) for n, a in enumerate(middles) for b in middles[:n]]
    assert min(gaps) > spread
    with pytest.raises(ValueError, match="expected 60 names of 'leaf', got 1"):
        embedding_map(points, {"leaf": [1]})
    with pytest.raises(ValueError, match=r"three or more, got \[2, 4\]"):
        embedding_map(points[:2], {})


def test_plots_of_a_tree_and_of_some_of_its_samples(tmp_path):
    points, tasks = sample()
    tree = ExpertTree.fit(points, 3, tasks)
    files = write_plots(tree, torch.from_numpy(points), tasks, tmp_path, most=30)
    assert [file.name for file in files] == ["tree.png", "embeddings.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
