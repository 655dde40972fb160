"""Figures 3 to 6 as PNG, and their numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mirage.analyze.collect import Analysis
from mirage.whole_files import write_whole

__all__ = ["PAPER_RANKS", "PAPER_SIMILARITY", "write"]

PAPER_RANKS = {"scale 1": (1, 24), "scale 4": (31, 192), "latent, projected": (35, 96)}
"""The paper's effective ranks and channels, of MIRAGE-T (Figure 4)."""

PAPER_SIMILARITY = {
    "without contrastive loss": (0.0784, 0.148),
    "Euclidean": (0.0024, 0.99),
    "SPD": (0.0787, 0.149),
}
"""The paper's off-diagonal mean and ratio (Figure 6, deraining)."""


def write(analysis: Analysis, folder: str | Path) -> list[Path]:
    """Write ``figure3`` to ``figure6``, each as .csv and .png, and ``figure4-ranks.csv``; Figure 6 where there is one.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "figure3": _figure3(analysis),
        "figure4": _figure4(analysis),
        "figure4-ranks": _ranks(analysis),
        "figure5": _matrix("shallow channel", "latent channel", analysis.channels),
    }
    if analysis.embeddings is not None:
        tables["figure6"] = _matrix("shallow of image", "latent of image", analysis.embeddings.matrix)
    files = []
    for name, (head, rows) in tables.items():
        files.append(folder / f"{name}.csv")
        text = io.StringIO(newline="")
        csv.writer(text).writerows([head, *rows])
        write_whole(files[-1], text.getvalue().encode("utf-8"))
    drawings = {"figure3": _draw3, "figure4": _draw4, "figure5": _draw5, "figure6": _draw6}
    for name, draw in drawings.items():
        if name in tables:
            files.append(folder / f"{name}.png")
            picture = io.BytesIO()
            draw(analysis).savefig(picture, format="png", dpi=150)
            write_whole(files[-1], picture.getvalue())
    return files


Table = tuple[Sequence[str], Iterable[Sequence[object]]]


def _figure3(analysis: Analysis) -> Table:
    head = ("place", "component", "explained variance, cumulative", "singular value, relative")
    rows = [
        (place, i + 1, explained, singular)
        for place, each in analysis.spectra.items()
        for i, (explained, singular) in enumerate(zip(each.explained, _relative(each.singular), strict=True))
    ]
    return head, rows


def _figure4(analysis: Analysis) -> Table:
    rows = [
        (place, i, j, each.similarity[i, j])
        for place, each in analysis.spectra.items()
        for i in range(each.channels)
        for j in range(each.channels)
    ]
    return ("place", "channel", "other channel", "cosine"), rows


def _ranks(analysis: Analysis) -> Table:
    head = ("place", "channels", "components with 90% of the variance",
            "singular values with 90% of the energy", "entropy rank", "mean |cosine| of channels",
            "paper's effective rank (MIRAGE-T)")  # fmt: skip
    rows = [
        (place, each.channels, each.rank(), each.energy_rank(), each.entropy_rank, each.mean_similarity,
         paper_rank(place))  # fmt: skip
        for place, each in analysis.spectra.items()
    ]
    return head, rows


def paper_rank(place: str) -> str:
    """As printed: ``31 of 192``; empty where the paper has none."""
    return "{} of {}".format(*PAPER_RANKS[place]) if place in PAPER_RANKS else ""


def _matrix(row: str, column: str, matrix: np.ndarray) -> Table:
    return (row, column, "cosine"), [(*index, value) for index, value in np.ndenumerate(matrix)]


def _relative(singular: np.ndarray) -> np.ndarray:
    return singular / singular[0] if singular[0] > 0 else singular


def _figure(columns: int, rows: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns + 0.6, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw3(analysis: Analysis):
    figure, ((left, right),) = _figure(2)
    for place, each in analysis.spectra.items():
        share = np.arange(1, each.channels + 1) / each.channels
        left.plot(share, each.explained, label=f"{place}, {each.channels} channels")
        right.semilogy(share, np.maximum(_relative(each.singular), 1e-12))
    left.axhline(0.9, color="grey", linewidth=0.7, linestyle=":")
    left.set(xlabel="share of components", ylabel="explained variance, cumulative", title="PCA", ylim=(0, 1.02))
    left.legend(fontsize="x-small")
    right.set(xlabel="share of components", ylabel="singular value / largest", title="SVD")
    return figure


def _draw4(analysis: Analysis):
    figure, (axes,) = _figure(len(analysis.spectra))
    for axis, (place, each) in zip(axes, analysis.spectra.items(), strict=True):
        image = axis.imshow(each.similarity, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(f"{place}\nrank {each.rank()} of {each.channels} (90%)", fontsize="small")
    figure.colorbar(image, ax=axes, label="cosine of channels", shrink=0.8)
    return figure


def _draw5(analysis: Analysis):
    figure, ((axis,),) = _figure(1)
    image = axis.imshow(analysis.channels, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set(xlabel="channel of the projected latent features", ylabel="channel of scale 1")
    axis.set_title("|cosine| of shallow and latent channels", fontsize="small")
    figure.colorbar(image, ax=axis)
    return figure


def _draw6(analysis: Analysis):
    figure, ((left, right),) = _figure(2)
    similarity = analysis.embeddings
    assert similarity is not None
    image = left.imshow(similarity.matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    left.set(xlabel="latent embedding of image", ylabel="shallow embedding of image")
    left.set_title(f"off-diagonal {similarity.off_diagonal:.4f}, ratio {similarity.ratio:.3f}", fontsize="small")
    figure.colorbar(image, ax=left)
    same = np.eye(len(similarity.matrix), dtype=np.bool_)
    bins = np.linspace(-1, 1, 41).tolist()
    right.hist(similarity.matrix[same], bins=bins, density=True, alpha=0.6, label="same image")
    if (~same).any():
        right.hist(similarity.matrix[~same], bins=bins, density=True, alpha=0.6, label="different images")
    right.set(xlabel="cosine", ylabel="density")
    right.legend(fontsize="x-small")
    return figure
