"""Pictures of a tree and of embeddings: which tasks each node holds, and what lies near what."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage.unirestorer.tree import ExpertTree
from mirage.whole_files import write_whole

__all__ = ["embedding_map", "tree_figure", "write_figure", "write_plots"]

MOST = 2000  # embeddings that t-SNE takes seconds for, not minutes
NAMED = 3  # tasks that a node's text names
MARKERS = "osD^vP*X"
LINE = 0.13  # inches of a line of text
GAP = 0.25  # between nodes of the last level, in heights of an average one


def tree_figure(tree: ExpertTree) -> Any:
    """A Matplotlib figure of a tree, root on the left: each node a bar of its tasks' shares, as high as its samples.

    Args:
        tree: with samples and tasks.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed (the extra ``unirestorer``).
        ValueError: the tree has no tasks.
    """
    from matplotlib.patches import Rectangle

    if not tree.tasks:
        raise ValueError("tree: expected one with tasks, got one that was made without them")
    height = max(4.0, 0.62 * len(tree.leaves))
    figure = _figure(3.2 * tree.levels + 2.4, height)
    axes = figure.subplots()
    gap = GAP * tree.nodes[0].size / len(tree.leaves)
    ranges = _ranges(tree, gap)
    top = max(high for _, high in ranges.values())
    lines = 0.85 * height / LINE / top  # of text, for each sample
    colours = _colours(tree.tasks)
    for node, named in zip(tree.nodes, tree.node_tasks(), strict=True):
        low, high = ranges[node.id]
        left = node.level + 0.02
        for name in sorted(node.tasks, key=lambda name: (-node.tasks[name], name)):
            width = 0.3 * node.tasks[name] / node.size
            axes.add_patch(Rectangle((left, low), width, high - low, facecolor=colours[name], edgecolor="none"))
            left += width
        text = _text(f"{node.id}: {node.size:,}", named, int((high - low + gap) * lines))
        axes.text(node.level + 0.35, (low + high) / 2, text, va="center", fontsize="x-small", linespacing=1.1)
        if node.parent is not None:
            above = ranges[node.parent]
            ends = [(above[0] + above[1]) / 2, (low + high) / 2]
            axes.plot([node.level - 0.16, node.level], ends, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlim=(0, tree.levels), ylim=(top * 1.01, -0.01 * top), yticks=[], title=f"{tree!r}: id, samples, tasks")
    axes.set_xticks([level + 0.17 for level in range(tree.levels)], [f"level {n}" for n in range(tree.levels)])
    axes.spines[["left", "right", "top"]].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, facecolor=colours[name]) for name in tree.tasks]
    figure.legend(handles, tree.tasks, loc="outside right center", fontsize="x-small", frameon=False)
    return figure


def _text(head: str, tasks: Sequence[str], lines: int) -> str:
    """A node's text: its tasks below each other where there is room for two lines or more, else beside it."""
    named = min(NAMED, max(1, lines - 1), len(tasks))
    more = f" +{len(tasks) - named}" if len(tasks) > named else ""
    if lines < 2:
        return f"{head}  {', '.join(tasks[:named])}{more}"
    return "\n".join([head, *tasks[:named]]) + more


def _ranges(tree: ExpertTree, gap: float) -> dict[int, tuple[float, float]]:
    """From where to where each node stands: leaves one below the other, others as far as their children."""
    found: dict[int, tuple[float, float]] = {}
    place = 0.0

    def go(node: int) -> None:
        nonlocal place
        children = tree.children(node)
        for child in children:
            go(child)
        if children:
            found[node] = found[children[0]][0], found[children[-1]][1]
        else:
            found[node] = place, place + tree.nodes[node].size
            place += tree.nodes[node].size + gap

    go(0)
    return found


def embedding_map(
    embeddings: Tensor | np.ndarray, colourings: Mapping[str, Sequence[Any]], *, perplexity: float = 30.0, seed: int = 0
) -> Any:
    """A Matplotlib figure of embeddings in two dimensions, by t-SNE (scikit-learn): one panel for each colouring.

    Args:
        embeddings: ``[N, dim]``, three or more.
        colourings: what is told apart by colour, by the panel's title: a name for each sample, such as its degradation
            or its leaf.
        perplexity: of t-SNE; less where there are few samples.
        seed: of t-SNE.

    Raises:
        ModuleNotFoundError: Matplotlib or scikit-learn is not installed (the extra ``unirestorer``).
        ValueError: there are fewer than three samples, or a colouring has another number of names.
    """
    from sklearn.manifold import TSNE

    points = torch.as_tensor(embeddings).detach().cpu().double().numpy()
    if points.ndim != 2 or len(points) < 3:
        raise ValueError(f"embeddings: expected [N, dim], three or more, got {list(points.shape)}")
    for title, names in colourings.items():
        if len(names) != len(points):
            raise ValueError(f"colourings: expected {len(points)} names of {title!r}, got {len(names)}")
    perplexity = min(perplexity, (len(points) - 1) / 3)
    flat = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(points)
    figure = _figure(7.4 * len(colourings), 6.2)
    panels = figure.subplots(1, len(colourings), squeeze=False)[0]
    for axes, (title, names) in zip(panels, colourings.items(), strict=True):
        different = list(dict.fromkeys(names))
        different.sort(key=lambda name: str(name).zfill(9) if str(name).isdigit() else str(name))
        colours = _colours(different)
        for number, name in enumerate(different):
            inside = np.array([other == name for other in names])
            marker = MARKERS[number // 20 % len(MARKERS)]
            axes.scatter(*flat[inside].T, s=12, marker=marker, color=colours[name], label=str(name), linewidths=0)
        axes.set(title=title, xticks=[], yticks=[])
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="x-small", frameon=False, markerscale=1.6)
    return figure


def write_plots(
    tree: ExpertTree, embeddings: Tensor, tasks: Sequence[str], folder: str | Path, *, most: int = MOST
) -> list[Path]:
    """Write ``tree.png``, and ``embeddings.png`` by task and by leaf, to a folder.

    Args:
        tree: of the embeddings.
        embeddings: ``[N, dim]``.
        tasks: of each.
        folder: that there is.
        most: embeddings that are shown, spread evenly over their order.

    Returns:
        The files.

    Raises:
        ValueError, OSError: as `tree_figure`, `embedding_map` and `write_figure`.
    """
    chosen = torch.linspace(0, len(embeddings) - 1, min(most, len(embeddings))).round().long()
    shown = embeddings[chosen]
    colourings = {"task": [tasks[place] for place in chosen.tolist()], "leaf": tree.assign(shown).tolist()}
    files = [Path(folder) / "tree.png", Path(folder) / "embeddings.png"]
    write_figure(tree_figure(tree), files[0])
    write_figure(embedding_map(shown, colourings), files[1])
    return files


def write_figure(figure: Any, path: str | Path) -> None:
    """Write a Matplotlib figure as PNG, whole or not at all.

    Raises:
        ValueError: the name does not end in ``.png``.
        OSError: the file cannot be written.
    """
    if Path(path).suffix != ".png":
        raise ValueError(f"path: expected a name that ends in .png, got {str(path)!r}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(path, picture.getvalue())


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colours(names: Sequence[Any]) -> dict[Any, Any]:
    """A colour for each name: those of tab20 and tab20b, again from the first on where there are more than 40."""
    from matplotlib import colormaps

    tables = [colormaps["tab20"], colormaps["tab20b"]]
    return {name: tables[number // 20 % 2](number % 20) for number, name in enumerate(names)}
