"""A system of experts in a folder, as the stages of ``mirage unirestorer`` fill it one after the other.

tree.json, tree.safetensors    the tree
extractor.safetensors          what makes embeddings
samples.json                   of which data, seed and count the tree's samples are
experts/                       an expert for each node
router.safetensors             the router
router/                        the run that trained it
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mirage.unirestorer.dispatcher import ExpertModules, Experts, StoredExperts
from mirage.unirestorer.extractors import Extractor, load_extractor, save_extractor
from mirage.unirestorer.router import Router
from mirage.unirestorer.system import UniRestorer
from mirage.unirestorer.tree import ExpertTree
from mirage.whole_files import write_whole

__all__ = ["SystemFolder"]

FORMAT = "mirage unirestorer samples, version 1"


class SystemFolder:
    """What lies in the folder of a system, by its parts.

    Args:
        path: the folder, which need not be there yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.tree_file = self.path / "tree.json"
        self.extractor_file = self.path / "extractor.safetensors"
        self.samples_file = self.path / "samples.json"
        self.experts_folder = self.path / "experts"
        self.router_file = self.path / "router.safetensors"
        self.router_run = self.path / "router"

    def _there(self, file: Path, what: str, how: str) -> Path:
        if not file.is_file():
            raise FileNotFoundError(f"no {what} in {str(self.path)!r} ({file.name}): {how}")
        return file

    # --- reading

    def tree(self) -> ExpertTree:
        """The tree.

        Raises:
            FileNotFoundError: the tree is not there yet.
            ValueError: it cannot be read.
        """
        return ExpertTree.load(self._there(self.tree_file, "tree", "mirage unirestorer cluster makes it"))

    def samples(self) -> dict[str, Any]:
        """Of which samples the tree is: ``data`` (`mirage.unirestorer.samples.data_identity`) and ``count``.

        Raises:
            FileNotFoundError: that is not there.
            ValueError: it cannot be read.
        """
        path = self._there(self.samples_file, "samples", "mirage unirestorer cluster writes them")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT or "data" not in content:
                raise ValueError(f"expected the format {FORMAT!r}")
        except ValueError as error:
            raise ValueError(f"{path}: not readable as a description of samples: {error}") from error
        return content

    def extractor(self, device: str | torch.device = "cpu") -> Extractor:
        """The extractor.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it cannot be read.
        """
        how = "mirage unirestorer cluster copies it here; from Python, give one"
        return load_extractor(self._there(self.extractor_file, "extractor", how), device=device)

    def router(self) -> Router:
        """The router, in evaluation mode on the CPU.

        Raises:
            FileNotFoundError: it is not there yet.
            ValueError: it cannot be read.
        """
        from mirage.unirestorer.router_training import load_router

        return load_router(self._there(self.router_file, "router", "mirage unirestorer router trains it"))

    def experts(
        self, *, memory: int | str | None = None, device: str | torch.device = "auto", fast: bool = True
    ) -> Experts:
        """The experts, read when images need them.

        Args:
            memory, device, fast: as of `mirage.unirestorer.ExpertStore`.

        Raises:
            FileNotFoundError: one is not there yet.
            ValueError: one cannot be read.
        """
        from mirage.unirestorer.expert_training import expert_file
        from mirage.unirestorer.store import ExpertStore
        from mirage.unirestorer.store_files import MANIFEST

        options: dict[str, Any] = {"memory": memory, "device": device, "fast": fast}
        if (self.experts_folder / MANIFEST).is_file():
            return StoredExperts(ExpertStore.load(self.experts_folder, **options))
        files = [expert_file(self.experts_folder, node.id) for node in self.tree().nodes]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(files)} experts are not in {str(self.experts_folder)!r}, such as "
                f"{missing[0]}: mirage unirestorer experts trains them"
            )
        return StoredExperts(_store_of(files, options))

    def system(
        self,
        *,
        device: str | torch.device = "auto",
        memory: int | str | None = None,
        extractor: Extractor | None = None,
        fast: bool = True,
        confidence: float | None = None,
    ) -> UniRestorer:
        """The whole of it.

        Args:
            device: of extractor, router and experts.
            memory: bytes for the weights of experts that are loaded, as of `mirage.unirestorer.ExpertStore`.
            extractor: in the place of the folder's.
            fast: experts run on `mirage.fast`.
            confidence: of the level, as of `UniRestorer`.

        Raises:
            FileNotFoundError: a part is not there yet.
            ValueError: a part cannot be read, they are not of each other, or ``confidence`` is out of its range.
        """
        from mirage.restore.loading import resolve_device

        where = resolve_device(device)
        experts = self.experts(memory=memory, device=where, fast=fast)
        found = self.extractor(where) if extractor is None else extractor
        return UniRestorer(found, self.tree(), self.router().to(where), experts, confidence=confidence)

    # --- writing

    def write_samples(self, data: Mapping[str, Any], count: int, **settings: Any) -> None:
        """Write what `samples` reads."""
        content = {"format": FORMAT, "count": count, "data": dict(data), **settings}
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.samples_file, (json.dumps(content, indent=1) + "\n").encode("utf-8"))

    def save(self, system: UniRestorer, extractor: bool = True) -> None:
        """Write a system that is there.

        Args:
            system: the system.
            extractor: write its extractor, too; one that cannot be written is given to `system` again.

        Raises:
            ValueError: an expert or the extractor is of a kind that cannot be written.
        """
        from mirage.unirestorer.router_training import save_router

        self.path.mkdir(parents=True, exist_ok=True)
        _as_store(system.experts).save(self.experts_folder)
        if extractor:
            save_extractor(system.extractor, self.extractor_file)
        system.tree.save(self.tree_file)
        save_router(system.router, self.router_file)

    # --- describing

    def describe(self) -> dict[str, Any]:
        """What there is: nodes with their tasks, which experts are trained, how the router was used.

        Raises:
            FileNotFoundError: there is no tree.
        """
        from mirage.unirestorer.expert_training import expert_file
        from mirage.unirestorer.store_files import MANIFEST

        tree = self.tree()
        stored = (self.experts_folder / MANIFEST).is_file()
        nodes = [
            {
                "node": node.id,
                "level": node.level,
                "parent": node.parent,
                "samples": node.size,
                "tasks": {
                    name: count for name, count in sorted(node.tasks.items(), key=lambda item: -item[1]) if count
                },
                "expert": stored or expert_file(self.experts_folder, node.id).is_file(),
            }
            for node in tree.nodes
        ]
        return {
            "levels": [sum(node.level == level for node in tree.nodes) for level in range(tree.levels)],
            "tasks": list(tree.tasks),
            "extractor": self.extractor_file.is_file(),
            "router": self.router_file.is_file(),
            "usage": self._usage(),
            "nodes": nodes,
        }

    def _usage(self) -> dict[str, float]:
        """The last row of the router's ``usage.csv``."""
        import csv

        path = self.router_run / "usage.csv"
        if not path.is_file():
            return {}
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: float(value) for name, value in rows[-1].items() if name != "step"} if rows else {}


def _store_of(files: list[Path], options: Mapping[str, Any]) -> Any:
    """The root and those that add to it, or that are networks of their own, as `mirage.unirestorer.ExpertStore`."""
    from mirage import networks
    from mirage.unirestorer.store import ExpertStore

    store = ExpertStore(networks.load(files[0]), **options)
    for file in files:
        store.add(file.stem, None if file == files[0] else file)
    return store


def _as_store(experts: Experts) -> Any:
    from mirage.unirestorer.store import ExpertStore

    if isinstance(experts, StoredExperts):
        return experts.store
    if not isinstance(experts, ExpertModules):
        raise ValueError(f"experts: expected an ExpertStore's, or modules, to be saved, got {type(experts).__name__}")
    store = ExpertStore(experts.modules[0])
    for number, module in enumerate(experts.modules):
        store.add(f"{number:03d}", module if number else None)
    return store
