"""What the router's choice is worth: every picture restored by every expert, and what each way to choose reaches.

So that the router stands beside the root, always the finest level, and the best leaf and the best node, which know the
clean picture; and beside itself with the task named.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirage.whole_files import write_whole

if TYPE_CHECKING:
    from mirage.unirestorer.system import UniRestorer
    from mirage.unirestorer.tree import ExpertTree

__all__ = ["WAYS", "measure_choices", "measured_choices", "summarise_choices"]

WAYS = ("degraded", "root", "finest", "router", "instructed", "best leaf", "best node")
"""Ways to choose an expert; ``instructed`` is the router that is told the task."""

Record = dict[str, Any]


def measure_choices(system: UniRestorer, seen: np.ndarray, clean: np.ndarray, task: str | None = None) -> Record:
    """PSNR of a picture by every expert, and where the router sends it, with and without its task.

    Args:
        system: the system.
        seen, clean: ``[H, W, 3]``, floating point in [0, 1].
        task: what is wrong with the picture; one that the tree does not know is not told.

    Returns:
        ``degraded`` and ``psnr`` (of each node), in dB of RGB; ``leaf``, ``level``, ``expert``, ``instructed`` (the
        expert with the task told), ``expected_level``, ``p_leaf`` and ``uncertainty`` of the router.
    """
    from mirage.grids.training import psnr

    own = system.select(seen)
    told = own if task not in system.tree.tasks else system.select(seen, task)
    values = [
        psnr(clean, system.restore(seen, explanation=dataclasses.replace(own, expert=node)).image)
        for node in range(len(system.tree))
    ]
    return {
        "degraded": psnr(clean, seen), "psnr": values, "leaf": own.leaf, "level": own.level, "expert": own.expert,
        "instructed": told.expert, "expected_level": sum(t * p for t, p in enumerate(own.p_level)),
        "p_leaf": max(own.p_leaf), "uncertainty": own.uncertainty,
    }  # fmt: skip


def measured_choices(
    system: UniRestorer, pairs: Iterable[tuple[np.ndarray, np.ndarray]], task: str | None, file: Path,
    identity: Mapping[str, Any],
) -> list[Record]:  # fmt: skip
    """A record of each pair (`measure_choices`), which a file keeps; it is read where it is of the same router, tree
    and pictures.

    Args:
        system: the system.
        pairs: degraded and clean pictures; not looked at where the file has them.
        task: what is wrong with all of them.
        file: JSON, written when all pairs are measured.
        identity: what the pictures are, as JSON has it.
    """
    stamp = {"system": system.fingerprint, "test": json.loads(json.dumps(identity))}
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if {key: found.get(key) for key in stamp} != stamp:
        found = {**stamp, "images": [measure_choices(system, seen, clean, task) for seen, clean in pairs]}
        write_whole(file, (json.dumps(found) + "\n").encode("utf-8"))
    return found["images"]


def ways_of(tree: ExpertTree, image: Record) -> dict[str, float]:
    """PSNR of a picture by each way to choose its expert."""
    values, leaves = image["psnr"], list(tree.leaves)
    best_leaf = max(values[leaf] for leaf in leaves)
    chosen = (image["degraded"], values[0], values[leaves[image["leaf"]]], values[image["expert"]],
              values[image["instructed"]], best_leaf, max(values))  # fmt: skip
    return dict(zip(WAYS, chosen, strict=True))


def summarise_choices(
    tree: ExpertTree, measured: Mapping[str, Sequence[Record]], known: Collection[str]
) -> dict[str, Any]:
    """Means of the records of each degradation, and of those that the tree was trained on and of the others.

    Args:
        tree: the system's tree.
        measured: records by degradation, at least one of each.
        known: the degradations that were trained on.

    Returns:
        ``degradations``: a row for each, with `WAYS` and the share of each level; ``means``: rows ``in`` and ``out``
        of the trained and of the held-out ones, where there are some (a degradation counts once); ``experts``: how
        many pictures each got; and where there are both, ``coarser``: levels of ``in`` and ``out`` (a picture counts
        once), with the p-values of Mann-Whitney's test that those of ``out`` are lower.
    """
    rows = {}
    for name, images in measured.items():
        ways = [ways_of(tree, image) for image in images]
        levels = np.bincount([image["level"] for image in images], minlength=tree.levels) / len(images)
        rows[name] = {
            "images": len(images), "in_distribution": name in known, "levels": levels.tolist(),
            **{way: float(np.mean([each[way] for each in ways])) for way in WAYS},
        }  # fmt: skip
    groups = {"in": [name for name in rows if name in known], "out": [name for name in rows if name not in known]}
    groups = {part: names for part, names in groups.items() if names}
    means = {
        part: {
            "images": sum(rows[name]["images"] for name in names),
            "levels": np.mean([rows[name]["levels"] for name in names], 0).tolist(),
            **{way: float(np.mean([rows[name][way] for name in names])) for way in WAYS},
        }
        for part, names in groups.items()
    }
    parts = {part: [image for name in names for image in measured[name]] for part, names in groups.items()}
    experts = np.bincount([i["expert"] for own in parts.values() for i in own], minlength=len(tree)).tolist()
    found = {"degradations": rows, "means": means, "experts": experts}
    return {**found, "coarser": _coarser(tree, parts)} if len(parts) == 2 else found


def _coarser(tree: ExpertTree, parts: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    from scipy.stats import mannwhitneyu

    levels = {part: [image["level"] for image in images] for part, images in parts.items()}
    expected = {part: [image["expected_level"] for image in images] for part, images in parts.items()}
    return {
        "mean_level": {part: float(np.mean(values)) for part, values in levels.items()},
        "above_leaves": {part: float(np.mean(np.array(v) < tree.levels - 1)) for part, v in levels.items()},
        "mean_expected_level": {part: float(np.mean(values)) for part, values in expected.items()},
        "images": {part: len(values) for part, values in levels.items()},
        "p_level": float(mannwhitneyu(levels["out"], levels["in"], alternative="less").pvalue),
        "p_expected_level": float(mannwhitneyu(expected["out"], expected["in"], alternative="less").pvalue),
    }
