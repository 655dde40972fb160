"""The similarity of degradations as a picture: a heat map in the order of its clustering, with the tree beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from mirage.grids.matrix import SimilarityMatrix

__all__ = ["heat_map"]


def heat_map(matrix: SimilarityMatrix, *, symmetric: bool = False) -> Any:
    """A Matplotlib figure of S, rows and columns ordered so that what is alike stands together.

    Args:
        symmetric: show the mean of S and its transpose. The order and the tree are of that in any case.

    Raises:
        ModuleNotFoundError: Matplotlib or SciPy is not installed (the extra ``grids``).
        ValueError: as `SimilarityMatrix.clustered`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram

    tree, order = matrix.clustered()
    values = (matrix.symmetric if symmetric else matrix.values)[np.ix_(order, order)]
    names = [matrix.names[place] for place in order]
    side = 2.0 + 0.52 * len(names)
    figure = Figure(figsize=(side + 1.6, side), layout="constrained")
    FigureCanvasAgg(figure)
    branches, cells = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 4]})
    dendrogram(tree, orientation="left", ax=branches, no_labels=True, color_threshold=0, above_threshold_color="0.3")
    branches.set_ylim(10 * len(names), 0)  # from the top, as the rows go; SciPy puts leaves 10 apart
    branches.set_xlabel("mean S of what joins")
    branches.spines[["left", "right", "top"]].set_visible(False)
    low = float(values[~np.eye(len(names), dtype=np.bool_)].min())  # not the diagonal's 0
    image = cells.imshow(values, cmap="viridis_r", vmin=low, aspect="auto", interpolation="nearest")
    cells.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    cells.set_yticks(range(len(names)), names)
    cells.set(xlabel="j", ylabel="i", title="S(i, j), smaller is more alike" + (" (symmetric)" if symmetric else ""))
    middle = (low + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > middle else "black"
        cells.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
    figure.colorbar(image, ax=cells, label="S = log10(KL + 1e-5) + 5", shrink=0.8)
    return figure
