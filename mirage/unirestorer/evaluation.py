"""What the router's choice is worth: every picture restored by every expert, and what each way to choose reaches.

So that the router stands beside the root, always the finest level, and the best leaf and the best node, which know the
clean picture; beside itself with the task named; and, where that is asked for, beside the level that follows from the
leaves' probabilities.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mirage.unirestorer.confidence import finest_level, path_shares
from mirage.whole_files import write_whole

if TYPE_CHECKING:
    from mirage.unirestorer.system import UniRestorer
    from mirage.unirestorer.tree import ExpertTree

__all__ = ["CONFIDENT", "WAYS", "measure_choices", "measured_choices", "summarise_choices"]

WAYS = ("degraded", "root", "finest", "router", "instructed", "best leaf", "best node")
"""Ways to choose an expert; ``instructed`` is the router that is told the task."""
CONFIDENT = "confident"
"""The router's leaf, and the level by the leaves' probabilities (``confidence`` of `UniRestorer`)."""

Record = dict[str, Any]
FIELDS = frozenset(
    ("degraded", "psnr", "leaf", "level", "expert", "instructed", "expected_level", "p_leaf", "shares", "uncertainty")
)
"""Of a record: files of earlier versions may have fewer."""


def measure_choices(system: UniRestorer, seen: np.ndarray, clean: np.ndarray, task: str | None = None) -> Record:
    """PSNR of a picture by every expert, and where the router sends it, with and without its task.

    Args:
        system: one without ``confidence``, for which ``shares`` are recorded instead.
        seen, clean: ``[H, W, 3]``, float32 in [0, 1].
        task: what is wrong with the picture; one that the tree does not know is not told.

    Returns:
        ``degraded`` and ``psnr`` (of each node), in dB of RGB; ``leaf``, ``level``, ``expert``, ``instructed`` (the
        expert with the task told), ``expected_level``, ``p_leaf``, ``shares`` (of the leaves' probability, what each
        node on the leaf's path has) and ``uncertainty`` of the router.

    Raises:
        ValueError: the system has a ``confidence``.
    """
    from mirage.grids.training import psnr

    if system.confidence is not None:
        raise ValueError(f"system: expected one whose router says the level, got confidence={system.confidence}")
    own = system.select(seen)
    told = own if task not in system.tree.tasks else system.select(seen, task)
    values = [
        psnr(clean, system.restore(seen, explanation=dataclasses.replace(own, expert=node)).image)
        for node in range(len(system.tree))
    ]
    p_leaf, paths = torch.tensor([own.p_leaf], dtype=torch.float64), system.tree.paths
    return {
        "degraded": psnr(clean, seen), "psnr": values, "leaf": own.leaf, "level": own.level, "expert": own.expert,
        "instructed": told.expert, "expected_level": sum(t * p for t, p in enumerate(own.p_level)),
        "p_leaf": max(own.p_leaf), "shares": path_shares(p_leaf, torch.tensor([own.leaf]), paths)[0].tolist(),
        "uncertainty": own.uncertainty,
    }  # fmt: skip


def measured_choices(
    system: UniRestorer, pairs: Iterable[tuple[np.ndarray, np.ndarray]], task: str | None, file: Path,
    identity: Mapping[str, Any],
) -> list[Record]:  # fmt: skip
    """A record of each pair (`measure_choices`), which a file keeps; it is read where it is of the same router, tree
    and pictures, and has all that a record has.

    Args:
        system: the system.
        pairs: degraded and clean pictures; not looked at where the file has them.
        task: what is wrong with all of them.
        file: JSON, written when all pairs are measured.
        identity: what the pictures are, as JSON has it.
    """
    stamp = {"system": system.fingerprint, "test": json.loads(json.dumps(identity))}
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    whole = all(image.keys() >= FIELDS for image in found.get("images", ()))
    if not whole or {key: found.get(key) for key in stamp} != stamp:
        found = {**stamp, "images": [measure_choices(system, seen, clean, task) for seen, clean in pairs]}
        write_whole(file, (json.dumps(found) + "\n").encode("utf-8"))
    return found["images"]


def ways_of(tree: ExpertTree, image: Record) -> dict[str, float]:
    """PSNR of a picture by each way to choose its expert; `CONFIDENT` where `_with_confidence` has been there."""
    values, leaves = image["psnr"], list(tree.leaves)
    best_leaf = max(values[leaf] for leaf in leaves)
    chosen = (image["degraded"], values[0], values[leaves[image["leaf"]]], values[image["expert"]],
              values[image["instructed"]], best_leaf, max(values))  # fmt: skip
    found = dict(zip(WAYS, chosen, strict=True))
    return {**found, CONFIDENT: values[image[CONFIDENT]]} if CONFIDENT in image else found


def _with_confidence(tree: ExpertTree, images: Sequence[Record], confidence: float) -> list[Record]:
    """Records with the level by the leaves' probabilities, and its expert as `CONFIDENT`."""
    paths = tree.paths
    levels = finest_level(torch.tensor([image["shares"] for image in images], dtype=torch.float64), confidence).tolist()
    return [
        {**image, "level": level, CONFIDENT: int(paths[image["leaf"], level])}
        for image, level in zip(images, levels, strict=True)
    ]


def summarise_choices(
    tree: ExpertTree, measured: Mapping[str, Sequence[Record]], known: Collection[str], confidence: float | None = None
) -> dict[str, Any]:
    """Means of the records of each degradation, and of those that the tree was trained on and of the others.

    Args:
        tree: the system's tree.
        measured: records by degradation, at least one of each.
        known: the degradations that were trained on.
        confidence: in (0, 1]: there is one way more, `CONFIDENT`, and levels and experts are its.

    Returns:
        ``ways``: their names; ``degradations``: a row for each, with these and the share of each level; ``means``: rows
        ``in`` and ``out`` of the trained and of the held-out ones, where there are some (a degradation counts once);
        ``experts``: how many pictures each got; and where there are both, ``coarser``: levels of ``in`` and ``out`` (a
        picture counts once), with the p-values of Mann-Whitney's test that those of ``out`` are lower. Pictures of a
        degradation are much alike, so ``p_level_by_degradation`` is that of the degradations' mean levels.
    """
    ways: tuple[str, ...] = WAYS
    if confidence is not None:
        after = WAYS.index("router") + 1
        ways = (*WAYS[:after], CONFIDENT, *WAYS[after:])
        measured = {name: _with_confidence(tree, images, confidence) for name, images in measured.items()}
    rows = {}
    for name, images in measured.items():
        reached = [ways_of(tree, image) for image in images]
        levels = np.bincount([image["level"] for image in images], minlength=tree.levels) / len(images)
        rows[name] = {
            "images": len(images), "in_distribution": name in known, "levels": levels.tolist(),
            **{way: float(np.mean([each[way] for each in reached])) for way in ways},
        }  # fmt: skip
    groups = {"in": [name for name in rows if name in known], "out": [name for name in rows if name not in known]}
    groups = {part: names for part, names in groups.items() if names}
    means = {
        part: {
            "images": sum(rows[name]["images"] for name in names),
            "levels": np.mean([rows[name]["levels"] for name in names], 0).tolist(),
            **{way: float(np.mean([rows[name][way] for name in names])) for way in ways},
        }
        for part, names in groups.items()
    }
    parts = {part: [image for name in names for image in measured[name]] for part, names in groups.items()}
    by = "expert" if confidence is None else CONFIDENT
    experts = np.bincount([image[by] for own in parts.values() for image in own], minlength=len(tree)).tolist()
    found = {"ways": list(ways), "confidence": confidence, "degradations": rows, "means": means, "experts": experts}
    if len(parts) < 2:
        return found
    means_of = {part: [float(np.arange(tree.levels) @ rows[name]["levels"]) for name in groups[part]] for part in parts}
    return {**found, "coarser": {**_coarser(tree, parts), "p_level_by_degradation": _lower(means_of)}}


def _lower(values: Mapping[str, Sequence[float]]) -> float:
    """Mann-Whitney's p-value of those of ``out`` being lower than those of ``in``."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(values["out"], values["in"], alternative="less").pvalue)


def _coarser(tree: ExpertTree, parts: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    levels = {part: [image["level"] for image in images] for part, images in parts.items()}
    expected = {part: [image["expected_level"] for image in images] for part, images in parts.items()}
    return {
        "mean_level": {part: float(np.mean(values)) for part, values in levels.items()},
        "above_leaves": {part: float(np.mean(np.array(v) < tree.levels - 1)) for part, v in levels.items()},
        "mean_expected_level": {part: float(np.mean(values)) for part, values in expected.items()},
        "images": {part: len(values) for part, values in levels.items()},
        "p_level": _lower(levels),
        "p_expected_level": _lower(expected),
    }
