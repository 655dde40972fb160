"""Trees in files: JSON that people read, and tensors beside it.

The JSON says which nodes there are, and their tasks; the safetensors file has the centres, the samples, and the leaf of
each sample, from which the members of all nodes follow. The JSON holds the digest of the tensors: files of two trees,
left by a process that was stopped between them, are not taken for one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mirage.unirestorer.tree import ExpertTree, Node
from mirage.whole_files import write_whole

__all__ = ["load", "pack", "save"]

FORMAT = "mirage expert tree, version 1"


def pack(tree: ExpertTree) -> tuple[dict[str, Any], bytes]:
    """What goes into the two files, the digest left out."""
    nodes = [
        {"id": node.id, "level": node.level, "parent": node.parent, "size": node.size, "tasks": dict(node.tasks)}
        for node in tree.nodes
    ]
    samples = tree.nodes[0].members
    leaf = torch.empty(len(samples), dtype=torch.int32)
    for number, node in enumerate(tree.leaves):
        leaf[torch.searchsorted(samples, tree.nodes[node].members)] = number
    tensors = {"samples": samples, "leaf": leaf}
    if tree.nodes[0].centre is not None:
        tensors["centres"] = tree.centres
    return {"format": FORMAT, "normalize": tree.normalize, "nodes": nodes}, save_tensors(tensors)


def save(tree: ExpertTree, path: Path) -> None:
    """See `ExpertTree.save`."""
    tensors_path = _tensors_of(path)
    structure, tensors = pack(tree)
    structure["tensors"] = {"file": tensors_path.name, "sha256": hashlib.sha256(tensors).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(tensors_path, tensors)
    write_whole(path, (json.dumps(structure, indent=1) + "\n").encode())


def load(path: Path) -> ExpertTree:
    """See `ExpertTree.load`."""
    tensors_path = _tensors_of(path)
    try:
        structure = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        found = structure.get("format") if isinstance(structure, dict) else type(structure).__name__
        raise ValueError(f"{path}: expected a file of {FORMAT!r}, got {found!r}")
    data = tensors_path.read_bytes()
    try:
        digest = structure["tensors"]["sha256"]
        if digest != hashlib.sha256(data).hexdigest():
            raise ValueError(f"{tensors_path.name} is not the one that was written with it; make the tree again")
        return _unpack(structure, load_tensors(data))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as a tree: {error}") from error


def _unpack(structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ExpertTree:
    rows = structure["nodes"]
    samples, leaf, centres = tensors["samples"], tensors["leaf"], tensors.get("centres")
    last = max(row["level"] for row in rows)
    leaves = [row["id"] for row in rows if row["level"] == last]
    parts: dict[int, list[torch.Tensor]] = {row["id"]: [] for row in rows}
    for number, node in enumerate(leaves):
        place: int | None = node
        while place is not None:
            parts[place].append(samples[leaf == number])
            place = rows[place]["parent"]
    nodes = [
        Node(
            row["id"], row["level"], row["parent"], None if centres is None else centres[row["id"]],
            torch.cat(parts[row["id"]]).sort().values, row["tasks"],
        )
        for row in rows
    ]  # fmt: skip
    return ExpertTree(nodes, normalize=structure["normalize"])


def _tensors_of(path: Path) -> Path:
    if path.suffix != ".json":
        raise ValueError(f"path: expected a name that ends in .json, got {str(path)!r}")
    return path.with_suffix(".safetensors")
